"""The form of a LoRA in PEFT's format that all of its readers scale alike.

There is one rank for all modules, `lora_alpha` is equal to it, and the scaling
is a part of B. Modules with a lower rank are padded with zeros.
"""

import dataclasses
import json

import numpy as np

from keras_randadapt.model import tensor_data
from keras_randadapt.peft import directory as directory_lib

#: Readers of PEFT's format have limits near this rank.
_LARGE_RANK = 64

#: The start of the names of tensors.
START = "base_model.model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    """The update of one module of transformers: `B A`, `(outputs, inputs)`.

    Attributes:
        kind: `"linear"`, `"conv1d"`, `"embedding"` or `"conv"`.
        weight_shape: The shape of the module's weight. Only that of a
            convolution is read.
        a: float64 array `(rank, inputs)`.
        b: float64 array `(outputs, rank)`, with the scaling.
        magnitude: float64 array `(outputs,)`, or `None`.
    """

    kind: str
    weight_shape: tuple
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None


def rank_of(modules):
    """The one rank for all modules: the largest.

    Args:
        modules: dict from the name of a module to its `Factors`, as the
            functions below take it.
    """
    return max(1, *(len(one.a) for one in modules.values()))


def tensors_of(modules, rank):
    """dict from the names of the file's tensors to float32 arrays."""
    tensors = {}
    for module, factors in modules.items():
        key = f"{START}{module}"
        a, b = shaped(factors, rank)
        named = ("lora_A.weight", "lora_B.weight")
        if factors.kind == "embedding":
            named = ("lora_embedding_A", "lora_embedding_B")
        with np.errstate(over="ignore"):
            tensors[f"{key}.{named[0]}"] = a.astype("float32")
            tensors[f"{key}.{named[1]}"] = b.astype("float32")
            if factors.magnitude is not None:
                magnitude = factors.magnitude
                if factors.kind == "conv":
                    ones = [1] * (len(factors.weight_shape) - 2)
                    magnitude = magnitude.reshape(1, -1, *ones)
                tensors[f"{key}.lora_magnitude_vector"] = magnitude.astype(
                    "float32"
                )
    return tensors


def shaped(factors, rank):
    """The two factors of a module, padded to a rank, in the file's shapes."""
    short = rank - len(factors.a)
    a = np.pad(factors.a, ((0, short), (0, 0)))
    b = np.pad(factors.b, ((0, 0), (0, short)))
    if factors.kind == "conv":
        a = a.reshape(rank, *factors.weight_shape[1:])
        b = b.reshape(*b.shape, *[1] * (len(factors.weight_shape) - 2))
    return a, b


def common_config(modules, **others):
    """The options that the configs of all methods have.

    Args:
        modules: The names of the modules.
        **others: More options, which may replace those of this function.
    """
    return {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(modules),
        "task_type": None,
        **others,
    }


def config_of(modules, rank, **others):
    """The content of `adapter_config.json`.

    Args:
        modules: dict from the name of a module to its `Factors`.
        rank: What `rank_of` gave.
        **others: More options, which may replace those of this function.
    """
    lora = {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": any(one.kind == "conv1d" for one in modules.values()),
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "r": rank,
        "use_dora": False,
        "use_rslora": False,
    }
    return common_config(modules, **{**lora, **others})


def files_of(config, tensors):
    """dict from the names of a directory's two main files to their bytes."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {
        directory_lib.CONFIG: text.encode(),
        directory_lib.WEIGHTS: tensor_data.data_of(tensors, {"format": "pt"}),
    }


def size_warning(modules, rank):
    """The warning of a large adapter, or `None` for others.

    Args:
        modules: dict from the name of a module to its `Factors`.
        rank: What `rank_of` gave.
    """
    numbers = [
        rank * (sum(one.a.shape[1:]) + one.b.shape[0])
        for one in modules.values()
    ]
    larger = [
        module
        for (module, one), size in zip(modules.items(), numbers)
        if 2 * size > one.a.shape[1] * one.b.shape[0]
    ]
    if rank <= _LARGE_RANK and not larger:
        return None
    megabytes = 4 * sum(numbers) / 1e6
    return (
        f"The LoRA has rank {rank} in all {len(modules)} modules and takes "
        f"{megabytes:.3g} MB"
        + (
            f"; in {len(larger)} of them it is above half the kernel, such "
            f"as in '{larger[0]}'"
            if larger
            else ""
        )
        + ". vLLM takes rank 16 unless it is told otherwise. Pass `rank` "
        "or `energy` for a smaller one, which is the closest of its rank."
    )
