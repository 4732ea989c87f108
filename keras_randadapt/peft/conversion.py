"""Converts a directory of PEFT to a plain LoRA, without a model."""

import dataclasses
import os

import numpy as np

from keras_randadapt.matrices import low_rank as matrices
from keras_randadapt.model import convert
from keras_randadapt.model import low_rank_report
from keras_randadapt.peft import canonical
from keras_randadapt.peft import card
from keras_randadapt.peft import checkpoint as checkpoint_lib
from keras_randadapt.peft import directory as directory_lib
from keras_randadapt.peft import methods
from keras_randadapt.peft import sources

IN_THE_MODEL = (
    "Load it into its model with `keras_randadapt.peft.load`, and save it with "
    "`keras_randadapt.peft.save`."
)
#: Options that mean the same for a LoRA.
_CARRIED = (
    "base_model_name_or_path",
    "fan_in_fan_out",
    "modules_to_save",
    "revision",
    "task_type",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert_directory` did.

    Attributes:
        method: What the directory held, such as `"rsLoRA"`.
        bytes: The size of the written tensors.
        rank: The rank of all modules in the written file.
        ranks: dict from module to the rank that its update has.
        module_bytes: dict from module to the bytes of its factors.
        energy_lost: dict from module to the share of the update's energy that
            the LoRA lacks.
        notes: list of sentences that the user should know.
    """

    method: str
    bytes: int
    rank: int
    ranks: dict[str, int]
    module_bytes: dict[str, int]
    energy_lost: dict[str, float]
    notes: list[str]

    def __str__(self):
        table = low_rank_report.lines(
            self.ranks, self.module_bytes, self.energy_lost
        )
        first = (
            f"{self.method} as PEFT's LoRA of rank {self.rank:,}: "
            f"{self.bytes:,} bytes"
        )
        return "\n".join([first, *table])


def convert_directory(source, target, rank=None, energy=None, checkpoint=None):
    """Writes a directory whose adapter is the LoRA of that of another one.

    All readers of PEFT's format scale it alike; see `canonical`. DoRA keeps
    its magnitudes. Tensors of `modules_to_save` and `heads.safetensors` are
    carried over.

    Args:
        source: The path of a directory of PEFT.
        target: The path of the directory to write.
        rank: Optional int, the rank in each module.
        energy: Optional float, the share of each update's energy to keep.
        checkpoint: Optional path of the base model's checkpoint. Only shapes
            are read. VeRA and RandLoRA need it.

    Returns:
        A `Conversion`.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a file is damaged, or if the method or an option is not
            known or is no low-rank update. Nothing is written then.
    """
    path = directory_lib.check_path(source)
    destination = directory_lib.check_writable(target)
    rank, energy = convert.check_size(rank, energy)
    if os.path.realpath(path) == destination:
        raise ValueError(
            f"'{path}' is to be read and written, and an interruption between "
            "two of its files would spoil it. Give another directory."
        )
    read = sources.read(path)
    if read.method in methods.NOT_ADDITIVE:
        raise ValueError(
            f"'{path}' holds an adapter of "
            f"{methods.label(read.method, read.config)}, which is no low-rank "
            "update that is added to a kernel. Merge it into the base model "
            "instead, with PEFT's `merge_and_unload` or "
            "`keras_randadapt.peft.save_merged`."
        )
    base = None
    if checkpoint is not None:
        base = checkpoint_lib.Checkpoint(checkpoint)
    parts, others = sources.parts(read, base)
    _check_shapes(read, parts)
    modules, lost = {}, {}
    for module, part in parts.items():
        factors = _factors(read.method, part.update, rank, energy)
        lost[module] = factors.lost
        modules[module] = canonical.Factors(
            kind=part.kind,
            weight_shape=part.weight_shape,
            a=factors.left.T,
            b=factors.right.T,
            magnitude=part.update.magnitude,
        )
    module_rank = canonical.rank_of(modules)
    tensors = canonical.tensors_of(modules, module_rank)
    _check_finite(path, tensors)
    tensors.update(
        {canonical.START + name: one for name, one in others.items()}
    )
    dropout = [v for k, v in read.options.items() if k.endswith("dropout")]
    config = canonical.config_of(
        modules,
        module_rank,
        lora_dropout=dropout[0],
        use_dora=read.options.get("use_dora", False),
        **{key: read.config[key] for key in _CARRIED if key in read.config},
    )
    method = methods.label(read.method, read.config)
    size = sum(one.nbytes for one in tensors.values())
    files = canonical.files_of(config, tensors)
    base_model = config["base_model_name_or_path"]
    about = {
        "base model": base_model or "not told",
        "converted from": method,
        "modules in transformers": len(modules),
        "rank in each module": module_rank,
        "size": f"{size / 1e6:.3g} MB",
        "energy lost in a module, at most": f"{100 * max(lost.values()):.3g} %",
    }
    files[directory_lib.CARD] = card.text_of_conversion(
        os.path.basename(destination), about, list(modules), base_model
    ).encode()
    if read.heads:
        heads = os.path.join(path, directory_lib.HEADS)
        with open(heads, "rb") as file:
            files[directory_lib.HEADS] = file.read()
    directory_lib.write(destination, files)
    return Conversion(
        method=method,
        bytes=size,
        rank=module_rank,
        ranks={module: len(one.a) for module, one in modules.items()},
        module_bytes={
            module: 4 * module_rank * (one.a.shape[1] + one.b.shape[0])
            for module, one in modules.items()
        },
        energy_lost=lost,
        notes=list(_notes(read, modules, module_rank, others)),
    )


def _check_shapes(read, parts):
    experts = [m for m, part in parts.items() if part.kind == "experts"]
    if experts:
        raise ValueError(
            f"'{read.path}' adapts the experts of a mixture, such as "
            f"'{experts[0]}', which are converted with their model alone. "
            f"{IN_THE_MODEL}"
        )
    untold = [module for module, part in parts.items() if part.update is None]
    if untold:
        raise ValueError(
            f"'{read.path}' does not tell the shapes of the modules that it "
            f"adapts, such as '{untold[0]}': modules share the frozen matrices "
            f"of {methods.label(read.method, read.config)}, which are as large "
            "as the largest one needs. Pass `--base-checkpoint` with the base "
            f"model's safetensors file or its directory. Or else: "
            f"{IN_THE_MODEL}"
        )


def _factors(method, update, rank, energy):
    """The factors `(inputs, rank)` and `(rank, outputs)` of an update."""
    left, right = update.a.T, update.scaling * update.b.T
    if rank is not None:
        return matrices.closest((left, right), rank)
    if energy is not None:
        return matrices.shortest((left, right), energy)
    if method != "LORA" or left.shape[1] > min(len(left), right.shape[1]):
        # Masked and scaled ranks of other methods may be zero.
        return matrices.shortest((left, right))
    # A rank whose B alone is zero is untrained, and PEFT may train it.
    on = np.any(left != 0, axis=0)
    return matrices.LowRank(left[:, on], right[on], 0.0)


def _check_finite(path, tensors):
    wrong = [k for k, one in tensors.items() if not np.all(np.isfinite(one))]
    if wrong:
        raise ValueError(
            f"The LoRA of '{path}' has numbers that are too large for float32, "
            f"in {sorted(wrong)[:5]}: training diverged, most likely."
        )


def _notes(read, modules, rank, others):
    message = canonical.size_warning(modules, rank)
    if message is not None:
        yield message
    if others:
        yield (
            f"{len(others)} tensors of `modules_to_save` are carried over, "
            f"such as '{next(iter(others))}'. PEFT reads them, and vLLM and "
            "llama.cpp refuse them."
        )
    if read.options.get("use_dora"):
        yield (
            "DoRA keeps its magnitudes, which vLLM and llama.cpp refuse: merge "
            "it for them, with `keras_randadapt.peft.save_merged`."
        )
