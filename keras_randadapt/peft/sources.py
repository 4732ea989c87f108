"""PEFT directories that were read, before any model is looked at."""

import dataclasses
import math
import os

import numpy as np

from keras_randadapt.peft import canonical
from keras_randadapt.peft import directory as directory_lib
from keras_randadapt.peft import experts
from keras_randadapt.peft import methods
from keras_randadapt.peft import options as options_lib
from keras_randadapt.peft.update import Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A directory that was read.

    Attributes:
        path: Its path.
        config: Its config.
        method: A key of `options.READ`.
        options: The options that are read.
        tensors: dict from name to float32 array.
        heads: dict likewise, of layers that `kra.peft.save` kept.
    """

    path: str
    config: dict
    method: str
    options: dict
    tensors: dict
    heads: dict


def read(path, finite=True):
    """Reads a directory of a method that is known.

    Args:
        path: The directory's path.
        finite: Whether NaN and infinity are refused.

    Returns:
        A `Source`.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a file is damaged, or if the method or an option is not
            known.
    """
    config = directory_lib.read_config(path)
    method, options = options_lib.checked(path, config)
    # SHiRA's places are integers.
    integers = method == "SHIRA"
    tensors = directory_lib.read_tensors(path, integers=integers)
    heads = {}
    if os.path.lexists(os.path.join(path, directory_lib.HEADS)):
        heads = directory_lib.read_tensors(path, directory_lib.HEADS)
    if finite:
        _check_finite(path, {**tensors, **heads})
    return Source(
        path=path,
        config=config,
        method=method,
        options=options,
        tensors=tensors,
        heads=heads,
    )


def _check_finite(path, tensors):
    wrong = sorted(k for k, x in tensors.items() if not np.all(np.isfinite(x)))
    if wrong:
        raise ValueError(
            f"'{path}' holds NaN or infinity in {wrong[:5]}: the training that "
            "wrote it diverged, most likely."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One module of a directory, as far as the directory tells it.

    Attributes:
        kind: `"linear"`, `"embedding"`, `"conv"` or `"experts"`.
        dims: The numbers of inputs and of outputs; `None` where unknown.
        weight_shape: The shape of the module's weight, or `None`.
        update: An `Update`, or `None` without a shape.
    """

    kind: str
    dims: tuple
    weight_shape: tuple | None
    update: Update | None


def parts(source, checkpoint=None):
    """The modules of a directory, without a model.

    Args:
        source: A `Source`.
        checkpoint: A `checkpoint.Checkpoint` of the base model, or `None`.
            VeRA and RandLoRA share matrices between modules, so their files
            do not tell the modules' shapes.

    Returns:
        `(parts, others)`: a dict from module to `Part`, and a dict from name
        to array of the tensors that belong to no update.

    Raises:
        ValueError: If a tensor is missing or has another shape.
    """
    path, method = source.path, source.method
    modules, shared, others = methods.grouped(path, method, source.tensors)
    if not modules:
        raise ValueError(f"'{path}' holds no tensors of a {method} adapter.")
    reader = methods.Reader(path, method, source.options, shared)
    targets = source.options.get("target_parameters") or []
    modules, parameters = experts.named(path, targets, modules)
    found = {}
    for module, roles in modules.items():
        if module in parameters:
            found[module] = _of_experts(reader, module, roles)
            continue
        shape = _weight_shape(source, module, roles, checkpoint)
        dims = _dims(source, roles, shape)
        kind = "linear"
        if f"{canonical.START}{module}.lora_embedding_A" in source.tensors:
            kind = "embedding"
        elif shape is not None and len(shape) > 2:
            kind = "conv"
        found[module] = Part(
            kind=kind,
            dims=dims,
            weight_shape=shape,
            update=None
            if shape is None
            else reader.update(module, roles, dims, shape),
        )
    return found, others


def _of_experts(reader, module, roles):
    shape = reader.shape_of_experts(module, roles)
    return Part(
        kind="experts",
        dims=(shape[2], shape[1]),
        weight_shape=shape,
        update=reader.update_of_experts(module, roles, shape),
    )


def _weight_shape(source, module, roles, checkpoint):
    """The shape of a module's weight with its outputs first, or `None`."""
    if source.method in ("LORA", "ADALORA", "HIRA"):
        a, b = roles["a"], roles["b"]
        if a.ndim < 2 or b.ndim < 2:
            raise ValueError(
                f"'{source.path}' holds the module '{module}' with factors of "
                f"shapes {a.shape} and {b.shape}, which are no matrices."
            )
        return (b.shape[0], *a.shape[1:])
    if checkpoint is None or source.method in methods.NOT_ADDITIVE:
        return None
    return checkpoint.weight_shape(
        module,
        transposed=source.config.get("fan_in_fan_out") is True,
        outputs=_outputs(source, roles),
    )


def _outputs(source, roles):
    """The number of outputs of a module if its tensors tell it, or `None`."""
    if source.method == "VERA":
        return roles["b"].size
    if source.method == "LOHA" and roles["b1"].ndim:
        return roles["b1"].shape[0]
    is_whole = source.options.get("init_weights") != "mini"
    if source.method == "MISS" and is_whole and roles["block"].ndim:
        return roles["block"].shape[-1]
    return None


def _dims(source, roles, shape):
    if shape is not None:
        return math.prod(shape[1:]), shape[0]
    if source.method == "IA3":
        of_outputs = roles["l"].shape[-1] == 1
        size = roles["l"].size
        return (None, size) if of_outputs else (size, None)
    return None, _outputs(source, roles)
