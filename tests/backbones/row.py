"""What a table of backbones says of one, and inputs for a model."""

import dataclasses
import importlib.util
import re
from collections.abc import Callable

import keras
import numpy as np

#: Token ids are below it in all tables, and so is the vocabulary no larger.
VOCABULARY = 24
#: Tokens of a text.
LENGTH = 6
BATCH = 2


@dataclasses.dataclass(frozen=True)
class Row:
    """A tiny backbone.

    Attributes:
        build: Function without arguments that returns a new model.
        inputs: dict from the name of an input to an array. An input without
            an entry gets numbers that suit its name, shape and dtype.
        size: int, the rows and columns of an image whose shape leaves them
            open.
        unmoved: dict from a site's address to the reason why a step can't
            move its adapter.
        exclude: Names of layers that can't be adapted, for `exclude`, or
            `None`.
        needs: dict from a backend to a package that KerasHub needs there.
        scale: float, by how much the first weights are moved at random, in
            units of their own size.
    """

    build: Callable
    inputs: dict = dataclasses.field(default_factory=dict)
    size: int = 32
    unmoved: dict = dataclasses.field(default_factory=dict)
    exclude: list | None = None
    needs: dict = dataclasses.field(default_factory=dict)
    scale: float = 0.1


def of_class(name, /, *, row=None, **arguments):
    """A row of a class of `keras_hub.models` that needs arguments alone."""

    def build():
        import keras_hub

        return getattr(keras_hub.models, name)(**arguments)

    return Row(build, **(row or {}))


def perturbed(model, scale):
    """Moves every weight, so that none is zero and no two layers are alike."""
    for i, weight in enumerate(model.weights):
        if not keras.backend.is_float_dtype(weight.dtype):
            continue
        # KerasHub computes one from the other when it loads a file.
        if re.search(
            "(interpolated_|tiled_|/)position_embeddings$", weight.path
        ):
            continue
        value = keras.ops.convert_to_numpy(weight).astype("float32")
        generator = np.random.default_rng([7, i])
        size = float(np.std(value)) or 1.0
        noise = scale * size * generator.normal(size=value.shape)
        if "variance" in weight.path:
            noise = np.abs(noise)
        weight.assign(value + noise.astype("float32"))
    return model


def built(row):
    """A new model of a row. All of them have the same weights."""
    keras.utils.set_random_seed(3)
    return perturbed(row.build(), row.scale)


def lacks(row):
    """The package that a backbone lacks here, or `None`."""
    needed = row.needs.get(keras.config.backend())
    if needed is None or importlib.util.find_spec(needed):
        return None
    return needed


def inputs_of(model, row):
    """Inputs for a model, in the structure of its own inputs."""

    def array_of(tensor):
        name = tensor.name
        if name in row.inputs:
            return row.inputs[name]
        shape = [BATCH]
        for axis, size in enumerate(tensor.shape[1:]):
            is_text = len(tensor.shape) == 2
            open_size = LENGTH if is_text else row.size
            shape.append(open_size if size is None else size)
        generator = np.random.default_rng([len(name), *shape])
        if "mask" in name and len(tensor.shape) == 2:
            return np.ones(shape, tensor.dtype)
        if "int" in tensor.dtype:
            high = 2 if "segment" in name else VOCABULARY
            low = 0 if "segment" in name else 1
            return generator.integers(low, high, shape).astype(tensor.dtype)
        return generator.normal(size=shape).astype(tensor.dtype)

    structure = model._inputs_struct
    return keras.tree.map_structure(array_of, structure)
