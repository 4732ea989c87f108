"""Adapters that PEFT has a method of its own for, as its files have them.

Each function writes one method. It gives the options of the config and the
tensors, or a string that says why PEFT's form can't compute the same.
"""

import dataclasses
import math

import numpy as np

from keras_randadapt.adapters import OFT
from keras_randadapt.adapters import HiRA
from keras_randadapt.adapters import LoHa
from keras_randadapt.adapters import LoKr
from keras_randadapt.adapters import MiSS
from keras_randadapt.adapters import SHiRA
from keras_randadapt.adapters.base import Adapter
from keras_randadapt.model import updates
from keras_randadapt.peft import canonical
from keras_randadapt.peft.parts import ModulePart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A module of transformers and the adapters of the sites that it holds.

    Attributes:
        name: The module's name in the file.
        sites: list of `(adapter, part)`, those that are adapted.
        places: The number of all sites that the module holds.
    """

    name: str
    sites: list[tuple[Adapter, ModulePart]]
    places: int

    @property
    def part(self) -> ModulePart:
        return self.sites[0][1]

    @property
    def keeps_inputs(self) -> bool:
        """Whether its inputs have the order of the kernel views' rows."""
        return all(_is_range(part.inputs) for _, part in self.sites)

    @property
    def is_site(self) -> bool:
        """Whether it is one whole site, with all numbers in one order."""
        part = self.part
        return (
            self.places == len(self.sites) == 1
            and _is_range(part.columns, self.sites[0][0].output_dim)
            and _is_range(part.inputs, part.dims[0])
            and _is_range(part.outputs, part.dims[1])
        )

    def place(self, values, part, along, axis):
        """Puts columns or rows of a site at those of the module.

        Args:
            values: Array whose axis has the site's outputs or inputs.
            part: The site's `ModulePart`.
            along: `"outputs"` or `"inputs"`.
            axis: int, 0 or 1.

        Returns:
            Array whose axis has those of the module, with zeros for the
            outputs of other sites.
        """
        outputs = along == "outputs"
        shape = list(values.shape)
        shape[axis] = part.dims[1 if outputs else 0]
        whole = np.zeros(shape)
        there = part.outputs if outputs else part.inputs
        if outputs:
            values = np.take(values, part.columns, axis=axis)
        whole[(slice(None),) * axis + (there,)] = values
        return whole


def _is_range(indices, size=None):
    size = len(indices) if size is None else size
    return np.array_equal(indices, np.arange(size))


def has(template):
    """Whether PEFT has a form of its own for a method that this writes."""
    return type(template) in _WRITERS


def write(template, modules):
    """The config and tensors of a method in PEFT's own form.

    Args:
        template: An adapter's template.
        modules: list of `Module`.

    Returns:
        A string that says why PEFT's form can't compute the same, or
        `(config, tensors)`: the options that other methods do not have, and a
        dict from name to array.
    """
    kinds = _KINDS[type(template)]
    for module in modules:
        if module.part.kind not in kinds:
            return (
                f"PEFT's {_type(template)} takes the kinds {list(kinds)} of "
                f"modules, and '{module.name}' is of the kind "
                f"'{module.part.kind}'"
            )
    found = _WRITERS[type(template)](template, modules)
    if isinstance(found, str):
        return found
    config, tensors = found
    tensors = {
        f"{canonical.START}{module}.{ending}": array
        for (module, ending), array in tensors.items()
    }
    return {"peft_type": _type(template), **config}, tensors


def _type(template):
    return type(template).__name__.upper()


def _value(variable):
    return updates.as_float64(variable)


def _miss(template, modules):
    """`D`, with a column for each output of a module."""
    rank, repeated = template.rank, template.output_rank
    for module in modules:
        if not module.keeps_inputs:
            return (
                f"the module '{module.name}' has its inputs in another order, "
                "and PEFT's MISS counts them"
            )
    config = {
        "r": rank,
        "miss_dropout": template.dropout,
        "bias": "none",
        "init_weights": True,
    }
    short = repeated is not None and all(
        module.is_site and module.part.dims[1] % repeated == 0
        for module in modules
    )
    if short:
        config.update(init_weights="mini", mini_r=repeated)
    tensors = {}
    for module in modules:
        block = 0.0
        for adapter, part in module.sites:
            shard = adapter.scaling * _value(adapter.shard)
            if not short:
                repeats = -(-adapter.output_dim // shard.shape[1])
                shard = np.tile(shard, repeats)[:, : adapter.output_dim]
                shard = module.place(shard, part, "outputs", 1)
            block = block + shard
        tensors[module.name, "miss_block"] = block
    return config, tensors


def _shira(template, modules):
    """The values and their places, as many as PEFT gives a module."""
    found, rank = {}, template.rank
    for module in modules:
        # NaN marks entries that are not trained.
        whole = np.full(module.part.dims[::-1], np.nan)
        for adapter, part in module.sites:
            view = np.full(adapter.input_dim * adapter.output_dim, np.nan)
            values = adapter.scaling * _value(adapter.shira_values)
            view[adapter.trained_places()] = values
            view = view.reshape(adapter.input_dim, adapter.output_dim)
            whole[np.ix_(part.outputs, part.inputs)] = view[:, part.columns].T
        found[module.name] = whole
        count = int(np.sum(~np.isnan(whole)))
        rank = max(rank, -(-count // sum(module.part.dims)))
    for module in modules:
        if rank * sum(module.part.dims) > math.prod(module.part.dims):
            return (
                f"PEFT's SHIRA has one rank for all modules, and {rank} is "
                f"above what '{module.name}' of the dimensions "
                f"{module.part.dims} takes"
            )
    tensors = {}
    for name, whole in found.items():
        trained = ~np.isnan(whole.ravel())
        count = rank * sum(whole.shape)
        # Zeros fill up the number of values.
        rest = np.flatnonzero(~trained)[: count - int(trained.sum())]
        trained[rest] = True
        tensors[name, "shira_weight"] = np.nan_to_num(whole.ravel()[trained])
        places = np.unravel_index(np.flatnonzero(trained), whole.shape)
        tensors[name, "shira_indices"] = np.stack(places).astype("int32")
    return {
        "r": rank,
        "mask_type": "random",
        # PEFT reads the places from the file, and `kra.peft.load` compares
        # them with those of the seed.
        "random_seed": template.seed,
        "fan_in_fan_out": False,
    }, tensors


def _hira(template, modules):
    """Factors as those of a LoRA. The ranks of a module's sites add up."""
    pairs = {}
    for module in modules:
        blocks = [], []
        for adapter, part in module.sites:
            a, b = _value(adapter.hira_a), _value(adapter.hira_b)
            blocks[0].append(module.place(a.T, part, "inputs", 1))
            b = module.place(adapter.scaling * b, part, "outputs", 1)
            blocks[1].append(b.T)
        a, b = np.concatenate(blocks[0]), np.concatenate(blocks[1], axis=1)
        pairs[module.name] = canonical.Factors(
            kind=module.part.kind,
            weight_shape=module.part.weight_shape,
            a=a,
            b=b,
        )
    rank = canonical.rank_of(pairs)
    tensors = {}
    for name, pair in pairs.items():
        a, b = canonical.shaped(pair, rank)
        tensors[name, "hira_A"], tensors[name, "hira_B"] = a, b
    return {
        "r": rank,
        "hira_dropout": template.dropout,
        "fan_in_fan_out": any(m.part.kind == "conv1d" for m in modules),
    }, tensors


def _loha(template, modules):
    """Two pairs of factors. The ranks of a module's sites add up."""
    if template.tucker and any(
        adapter.is_whole for module in modules for adapter, _ in module.sites
    ):
        return "the windows of convolutions are left whole (`tucker`)"
    found, rank = {}, 1
    for module in modules:
        for number in "12":
            blocks = {"a": [], "b": []}
            for adapter, part in module.sites:
                a = _value(getattr(adapter, f"loha_a{number}"))
                b = _value(getattr(adapter, f"loha_b{number}"))
                if number == "2":
                    b = adapter.scaling * b
                blocks["b"].append(module.place(a.T, part, "inputs", 1))
                blocks["a"].append(module.place(b, part, "outputs", 1).T)
            name = f"hada_w{number}"
            first = np.concatenate(blocks["a"], axis=1)
            found[module.name, f"{name}_a"] = first
            found[module.name, f"{name}_b"] = np.concatenate(blocks["b"])
            rank = max(rank, first.shape[1])
    for (module, ending), array in found.items():
        widths = [(0, 0), (0, 0)]
        axis = 1 if ending.endswith("a") else 0
        widths[axis] = (0, rank - array.shape[axis])
        found[module, ending] = np.pad(array, widths)
    # PEFT divides by the rank.
    return {"r": rank, "alpha": rank, **_LYCORIS}, found


def _lokr(template, modules):
    """Both factors of the Kronecker product, transposed."""
    tensors = {}
    for module in modules:
        if not module.is_site:
            return (
                f"the module '{module.name}' is not one site with its numbers "
                "in one order, and a Kronecker product depends on the order"
            )
        adapter = module.sites[0][0]
        for variable in adapter.trainable_variables:
            value = _value(variable).T
            if variable.name in SCALED_OF_LOKR:
                value = adapter.scaling * value
            tensors[module.name, OF_LOKR[variable.name]] = value
    return {
        "r": template.rank,
        "alpha": template.rank,
        "decompose_both": template.decompose_both,
        "decompose_factor": template.factor or -1,
        **_LYCORIS,
    }, tensors


def _oft(template, modules):
    """The entries above the diagonals."""
    tensors = {}
    for module in modules:
        adapter = module.sites[0][0]
        if module.places > 1 or not module.keeps_inputs:
            return (
                f"the module '{module.name}' holds several sites or has its "
                "inputs in another order, and a module has one rotation"
            )
        if adapter.size != template.block_size:
            return (
                f"the blocks of '{module.name}' have {adapter.size} rows, and "
                f"`block_size` is {template.block_size}"
            )
        tensors[module.name, "oft_R.weight"] = _value(adapter.oft_q)
    return {
        "r": 0,
        "oft_block_size": template.block_size,
        "block_share": template.share_blocks,
        "use_cayley_neumann": False,
        "coft": False,
        "bias": "none",
        "init_weights": True,
    }, tensors


#: The names of LoKr's weights here and in PEFT.
OF_LOKR = {
    "lokr_c": "lokr_w1",
    "lokr_c_a": "lokr_w1_b",
    "lokr_c_b": "lokr_w1_a",
    "lokr_ab": "lokr_w2",
    "lokr_a": "lokr_w2_b",
    "lokr_b": "lokr_w2_a",
}

#: Those that take the scaling in.
SCALED_OF_LOKR = ("lokr_c", "lokr_c_b")

#: PEFT's LoHa and LoKr drop outputs and not inputs, so they have no dropout.
_LYCORIS = {
    "init_weights": True,
    "module_dropout": 0.0,
    "rank_dropout": 0.0,
    "use_effective_conv2d": False,
}

_WRITERS = {
    HiRA: _hira,
    LoHa: _loha,
    LoKr: _lokr,
    MiSS: _miss,
    OFT: _oft,
    SHiRA: _shira,
}
_KINDS = {
    HiRA: ("linear", "conv1d", "conv"),
    LoHa: ("linear", "conv"),
    LoKr: ("linear",),
    MiSS: ("linear",),
    OFT: ("linear",),
    SHiRA: ("linear",),
}
