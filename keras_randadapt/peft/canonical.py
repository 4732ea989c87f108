"""The form of a LoRA in PEFT's format that all of its readers scale alike.

There is one rank for all modules, `lora_alpha` is equal to it, and the scaling
is a part of B. Modules with a lower rank are padded with zeros.
"""

import dataclasses
import json
import math

import numpy as np

from keras_randadapt.model import tensor_data
from keras_randadapt.peft import directory as directory_lib
from keras_randadapt.peft import experts

#: Readers of PEFT's format have limits near this rank.
_LARGE_RANK = 64

#: The start of the names of tensors.
START = "base_model.model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    """The update of one module of transformers: `B A`, `(outputs, inputs)`.

    Arrays of experts have an axis of experts in front.

    Attributes:
        kind: `"linear"`, `"conv1d"`, `"embedding"`, `"conv"` or `"experts"`.
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

    @property
    def rank(self):
        return self.a.shape[-2]

    @property
    def stack(self):
        """The number of experts, or 1."""
        return len(self.a) if self.kind == "experts" else 1

    @property
    def dims(self):
        """The numbers of inputs and of outputs."""
        return self.a.shape[-1], self.b.shape[-2]


def rank_of(modules):
    """The one rank for all modules: the largest.

    Args:
        modules: dict from the name of a module to its `Factors`, as the
            functions below take it.
    """
    return max(1, *(one.rank for one in modules.values()))


def tensors_of(modules, rank):
    """dict from the names of the file's tensors to float32 arrays."""
    tensors = {}
    starts = experts.starts_of(parameters_of(modules))
    for module, factors in modules.items():
        key = f"{START}{starts.get(module, module)}"
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
    short = rank - factors.rank
    stack = [(0, 0)] * (factors.a.ndim - 2)
    a = np.pad(factors.a, (*stack, (0, short), (0, 0)))
    b = np.pad(factors.b, (*stack, (0, 0), (0, short)))
    if factors.kind == "experts":
        # PEFT has the ranks of an expert next to each other in A, and the
        # experts of a rank in B.
        a = a.reshape(-1, a.shape[-1])
        b = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
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
    parameters = parameters_of(modules)
    if parameters:
        others = {"target_parameters": sorted(parameters), **others}
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
    targets = set(modules) - set(parameters)
    return common_config(targets, **{**lora, **others})


def parameters_of(modules):
    """The names of the modules that are parameters of experts."""
    return [name for name, one in modules.items() if one.kind == "experts"]


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
    numbers = [one.stack * rank * sum(one.dims) for one in modules.values()]
    larger = [
        module
        for (module, one), size in zip(modules.items(), numbers)
        if 2 * size > one.stack * math.prod(one.dims)
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
