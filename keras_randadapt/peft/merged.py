"""`save_merged`: writes the merged model as a checkpoint of transformers."""

import contextlib
import json
import os
import reprlib
import secrets

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.model import merge
from keras_randadapt.model import paths
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import tensor_data
from keras_randadapt.peft import checkpoint as checkpoint_lib
from keras_randadapt.peft import directory as directory_lib
from keras_randadapt.peft import family
from keras_randadapt.peft import names as names_lib

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"


def save_merged(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    config: dict | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> None:
    """Writes a model, its active adapters merged, for transformers.

    The directory gets `config.json` and `model.safetensors`, which
    `from_pretrained` of transformers, vLLM and the converter of llama.cpp
    read, and `from_preset` of KerasHub. Tensors are in float32. The model
    itself stays adapted; a model without adapters is written as it is.

    This is for families that KerasHub can load from transformers, including
    those that its own `export_to_transformers` refuses. The config is the one
    that KerasHub's exporter gives, or else what its converter reads; the rest
    is then transformers' default. Pass the base model's own as `config` where
    it has more than that, such as another activation.

    With the base model's `checkpoint` everything that KerasHub leaves out is
    taken from there: the config, tensors such as poolers and RoBERTa's
    reserved positions, and the tokenizer's files, which are copied.

    Args:
        model: A backbone or task of KerasHub, with or without adapters.
        directory: Path of the directory. It is made if it is not there, and
            files of these names are replaced.
        config: Optional dict, the content of the base model's `config.json`.
        checkpoint: Optional path of a directory with the checkpoint that the
            base model was loaded from, `config.json` and safetensors files.

    Raises:
        TypeError: If `directory` or `checkpoint` is no path, or `config` no
            dict.
        FileNotFoundError: If `checkpoint` lacks a file.
        ValueError: If KerasHub has no converter for the model; if a number of
            the checkpoint is not in the model or can't be told from it; if a
            layer is quantized; if KerasHub can't tell the config and none is
            given; if `checkpoint` is of another model; or if an active adapter
            can't be merged. Nothing is written then.

    Example:

    ```python
    kra.peft.save_merged(classifier, "merged")
    ```
    """
    state_lib.check_is_model(model)
    target = directory_lib.check_writable(directory)
    if not isinstance(config, (dict, type(None))):
        raise TypeError(
            "`config` must be a dict, the content of a `config.json`, or "
            f"`None`. Received: config={reprlib.repr(config)}"
        )
    base = None if checkpoint is None else _base(checkpoint, target)
    names = names_lib.name_map(model)
    _check_not_stopped(names)
    if base is None:
        _check_complete(names)
    _check_not_quantized(model)
    if base is not None and config is None:
        config = base.config()
    config = _config(model, names, config)
    tensors = {} if base is None else _tensors_of_base(names, base)
    with contextlib.ExitStack() as stack:
        if state_lib.is_adapted(model) and model._randadapt.block != "merged":
            stack.enter_context(merge.merged(model))
        for key in names.variables:
            name = key if base is None else base.key(key, names.prefix)
            tensors[name] = _tensor(key, names, tensors.get(name))
    copied = {} if base is None else base.beside()
    os.makedirs(target, exist_ok=True)
    _write(os.path.join(target, _WEIGHTS), tensors)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    for name, data in {**copied, _CONFIG: text.encode()}.items():
        paths.replace(os.path.join(target, name), data)


def _base(path, target):
    """The checkpoint of the base model."""
    base = checkpoint_lib.Checkpoint(path)
    if not os.path.isdir(base.path):
        raise ValueError(
            "`checkpoint` must be the directory of the base model's "
            f"checkpoint. Received: checkpoint={str(path)!r}"
        )
    if os.path.realpath(base.folder) == target:
        raise ValueError(
            "`directory` and `checkpoint` are the same, and the base model's "
            f"files would be lost. Received: directory={target!r}"
        )
    return base


def _tensors_of_base(names, base):
    """The tensors of the base model, whose shapes and names are checked."""
    expected = {k: _shape(k, places) for k, places in names.variables.items()}
    expected.update(dict.fromkeys(names.lost_keys - expected.keys()))
    for key, shape in expected.items():
        name = base.key(key, names.prefix)
        found = base.shapes.get(name)
        if name is None or shape not in (None, found):
            raise ValueError(
                f"The checkpoint '{base.path}' "
                + (
                    f"lacks the tensor '{key}'"
                    if name is None
                    else f"has '{name}' of shape {found}, and this model one "
                    f"of shape {shape}"
                )
                + ", so the model was not loaded from it. Give the checkpoint "
                "of the base model."
            )
    tensors = base.tensors()
    given = {
        key: tensors[base.key(key, names.prefix)] for key in names.lost_keys
    }
    # They do not go back, so that they must be what the base model has.
    noted = {
        one.variable.path: one
        for run in names.record(given)
        for one in run.assignments
    }
    for path, why in names.lost.items():
        one = noted.get(path)
        if one is None or not _is_value(one.variable, one.array):
            raise ValueError(
                f"'{path}' can't go back to a checkpoint ({why}), and it is "
                f"not what '{base.path}' has: it was trained, or the model was "
                "loaded from another checkpoint."
            )
    return tensors


def _is_value(variable, array):
    """Whether a variable has these values, in its own precision."""
    if array is None or array.shape != tuple(variable.shape):
        return False
    tolerances = {"rtol": 1e-2, "atol": 1e-4}
    if keras.backend.standardize_dtype(variable.dtype) == "float32":
        tolerances = {"rtol": 1e-6, "atol": 1e-7}
    return np.allclose(_values(variable), array, **tolerances)


def _check_not_stopped(names):
    if names.stopped:
        raise ValueError(
            "The checkpoint can't be told from the model: KerasHub's converter "
            f"of '{names.model_type}' stopped half-way ({names.stopped})."
        )


def _check_complete(names):
    """Raises `ValueError` unless the whole checkpoint is in the model."""
    reasons = [f"'{path}' ({why})" for path, why in names.lost.items()]
    for key, places in names.variables.items():
        covered = np.zeros(_shape(key, places), bool).reshape(-1)
        for one, origin in places:
            if origin.coordinates is None:
                covered[:] = True
            else:
                covered[origin.place(key)[1]] = True
        if not covered.all():
            reasons.append(
                f"'{key}' (KerasHub leaves out {np.sum(~covered):,} of its "
                f"{covered.size:,} numbers)"
            )
    if reasons:
        raise ValueError(
            f"A checkpoint of '{names.model_type}' has more than this model "
            "holds: "
            + ", ".join(reasons[:5])
            + (f" and {len(reasons) - 5} more" if len(reasons) > 5 else "")
            + ". Pass the directory of the base model's checkpoint as "
            "`checkpoint`, from which the rest is taken."
        )


def _shape(key, places):
    origin = places[0][1]
    return origin.shapes[origin.keys.index(key)]


def _check_not_quantized(model):
    quantized = [
        layer.path or layer.name
        for layer in _compat.flatten_layers(model)
        if getattr(layer, "quantization_mode", None) is not None
    ]
    if quantized:
        raise ValueError(
            f"{len(quantized)} layers are quantized, and a checkpoint of "
            f"transformers has floats: {quantized[:5]}. Load the adapter into "
            "the base model in float, and save that."
        )


def _config(model, names, given):
    if given is not None:
        if given.get("model_type") != names.model_type:
            raise ValueError(
                "`config` must be of the model's own type, "
                f"'{names.model_type}'. Received: config with model_type="
                f"{reprlib.repr(given.get('model_type'))}"
            )
        return given
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, keras.Model):
        backbone = model
    config = _compat.exported_config(backbone)
    # The exporter takes Gemma 2 for Gemma.
    if config is None or config.get("model_type") != names.model_type:
        # Converters read some of the config of each part of a model.
        parts = [k for k, v in names.config.items() if isinstance(v, dict)]
        if names.config_differs or parts:
            raise ValueError(
                f"KerasHub's converter of '{names.model_type}' does not tell "
                "which config a checkpoint of this model has: its "
                f"{names.config_differs or parts} are not known. Pass the base "
                "model's `config.json` as the dict `config`."
            )
        config = {k: _in_its_words(v) for k, v in names.config.items()}
    return {**config, "torch_dtype": "float32"}


def _in_its_words(value):
    """A value of the config as transformers writes it."""
    if isinstance(value, (list, tuple)):
        # Its lists of truth values are of integers.
        return [int(v) if isinstance(v, bool) else v for v in value]
    if isinstance(value, str):
        return family.ACTIVATIONS.get(value, value)
    return value


def _values(variable):
    variable = keras.ops.cast(variable, "float32")
    return np.asarray(keras.ops.convert_to_numpy(variable))


def _tensor(key, names, base):
    """One tensor of the checkpoint, float32.

    Args:
        key: The tensor's name.
        names: A `NameMap`.
        base: The tensor of the base model, or `None` where all is known.
    """
    places = names.variables[key]
    shape = _shape(key, places)
    values = np.zeros(int(np.prod(shape)), "float32")
    if base is not None:
        values[:] = base.reshape(-1)
    for one, origin in places:
        ours = _values(one.variable)
        if origin.coordinates is None:
            values[:] = ours.reshape(-1)
            continue
        inside, index = origin.place(key)
        values[index] = ours if inside is None else ours[inside]
    return values.reshape(shape)


def _write(path, tensors):
    """Writes a file of tensors as a whole, or leaves what was there."""
    folder = os.path.dirname(path)
    name = f".randadapt-{secrets.token_hex(8)}.tmp"
    temporary = os.path.join(folder, name)
    try:
        tensor_data.write(temporary, tensors, {"format": "pt"})
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
