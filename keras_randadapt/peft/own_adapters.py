"""Adapters of the methods that have the same form here and in PEFT.

Each function makes the adapters of one method. It gives `(template, built)`,
or `None` if only a LoRA computes what the file does at these sites.
"""

import keras
import numpy as np

from keras_randadapt.adapters import OFT
from keras_randadapt.adapters import HiRA
from keras_randadapt.adapters import LoHa
from keras_randadapt.adapters import LoKr
from keras_randadapt.adapters import MiSS
from keras_randadapt.adapters import SHiRA
from keras_randadapt.adapters import shira
from keras_randadapt.model import build
from keras_randadapt.peft import own_forms
from keras_randadapt.sites import quantized
from keras_randadapt.sites import supported


class Place:
    """What adapters are made of.

    Args:
        name: The adapter's name in the model.
        layers: dict from structural address to layer.
        options: What `options.checked` gave.
        updates: dict from module to `Update`.
        parts: dict from each site's address to its `ModulePart`s.
        found: dict from address to `SiteUpdate`.
    """

    def __init__(self, name, layers, options, updates, parts, found):
        self.name, self.layers, self.options = name, layers, options
        self.updates, self.found = updates, found
        self.parts = {address: parts[address] for address in found}

    def build(self, template):
        """Adapters of a template at all sites, not attached."""
        return build.build_adapters(
            template, self.name, self.layers, list(self.found), {}
        )

    def view_shape(self, address):
        return tuple(supported.view_of(self.layers[address]))

    def kernel_view(self, address):
        """The base kernel view, a float32 array."""
        layer = self.layers[address]
        kernel = supported.kernel_variable(layer)
        if layer.quantization_mode is not None:
            kernel = quantized.dequantized_kernel(layer)
        view = keras.ops.cast(supported.as_view(layer, kernel), "float32")
        return keras.ops.convert_to_numpy(view)

    def is_whole(self, address):
        """Whether the site is one module, with all numbers in one order."""
        parts = self.parts[address]
        n_in, n_out = self.view_shape(address)
        return (
            len(parts) == 1
            and parts[0].dims == (n_in, n_out)
            and np.array_equal(parts[0].inputs, np.arange(n_in))
            and np.array_equal(parts[0].columns, np.arange(n_out))
            and np.array_equal(parts[0].outputs, np.arange(n_out))
        )


def make(method, place):
    """The adapters of a directory, or `None` for a LoRA.

    Args:
        method: A key of `options.READ`.
        place: A `Place`.
    """
    maker = _MAKERS.get(method)
    return None if maker is None else maker(place)


def _miss(place):
    options = place.options
    short = options["init_weights"] == "mini" and all(
        map(place.is_whole, place.found)
    )
    shards = {}
    for address, parts in place.parts.items():
        in_order = all(
            part.module in place.updates
            and np.array_equal(part.inputs, np.arange(len(part.inputs)))
            for part in parts
        )
        if not in_order:
            return None
        shard = np.zeros((options["r"], place.view_shape(address)[1]))
        for part in parts:
            whole = place.updates[part.module].b.T
            shard[:, part.columns] = whole[:, part.outputs]
        if short:
            shard = shard[:, : options["mini_r"]]
        shards[address] = shard
    template = MiSS(
        options["r"],
        output_rank=options["mini_r"] if short else None,
        dropout=options["miss_dropout"],
    )
    built = place.build(template)
    for address, shard in shards.items():
        built[address].shard.assign(shard.astype("float32"))
    return template, built


def _shira(place):
    rank, seed = place.options["r"], place.options["random_seed"] or 0
    views = {address: place.view_shape(address) for address in place.found}
    if any(rank * sum(dims) > dims[0] * dims[1] for dims in views.values()):
        return None
    deltas = {}
    for address, parts in place.parts.items():
        delta = np.zeros(views[address])
        for part in parts:
            if part.module in place.updates:
                whole = place.updates[part.module].own["delta"]
                here = whole[np.ix_(part.outputs, part.inputs)]
                delta[:, part.columns] = here.T
        deltas[address] = delta.ravel()
    for mask in shira.MASKS:
        # Seeds of PyTorch may be negative.
        template = SHiRA(rank, mask=mask, seed=seed % 2**64)
        built = place.build(template)
        if all(
            _takes(adapter, deltas[address], place, address)
            for address, adapter in built.items()
        ):
            for address, adapter in built.items():
                values = deltas[address][adapter.trained_places()]
                adapter.shira_values.assign(values.astype("float32"))
            return template, built
    return None


def _takes(adapter, delta, place, address):
    """Whether a delta has zeros alone where the adapter trains nothing."""
    if adapter.mask == "magnitude":
        adapter.start_from(place.kernel_view(address))
    rest = delta.copy()
    rest[adapter.trained_places()] = 0.0
    return not rest.any()


def _hira(place):
    rank = max(1, *(one.left.shape[1] for one in place.found.values()))
    template = HiRA(rank, dropout=place.options["hira_dropout"])
    built = place.build(template)
    for address, one in place.found.items():
        adapter = built[address]
        # Ranks that the file lacks start as untrained ones.
        a = keras.ops.convert_to_numpy(adapter.hira_a).astype("float64")
        b = np.zeros(adapter.hira_b.shape)
        a[:, : one.left.shape[1]] = one.left
        b[: one.left.shape[1]] = one.scaling * one.right
        adapter.hira_a.assign(a.astype("float32"))
        adapter.hira_b.assign(b.astype("float32"))
    return template, built


def _loha(place):
    """Modules of one rank alone; a part of a module has a part of `B1`."""
    updates = place.updates
    ranks = {len(one.own["a1"]) for one in updates.values()}
    smallest = min(
        (min(place.view_shape(address)) for address in place.found), default=0
    )
    if len(ranks) > 1 or min(ranks) > smallest:
        return None
    shares = {address: {} for address in place.found}
    for address, parts in place.parts.items():
        if len(parts) > 1 or parts[0].module not in updates:
            return None
        part, update = parts[0], updates[parts[0].module]
        for number in "12":
            a = update.own[f"a{number}"].T[part.inputs]
            b = np.zeros((a.shape[1], place.view_shape(address)[1]))
            of_part = update.own[f"b{number}"][part.outputs]
            b[:, part.columns] = of_part.T
            if number == "2":
                b = b * update.scaling
            shares[address][f"loha_a{number}"] = a
            shares[address][f"loha_b{number}"] = b
    template = LoHa(min(ranks))
    built = place.build(template)
    for address, values in shares.items():
        _assign(built[address], values)
    return template, built


def _lokr(place):
    options, updates = place.options, place.updates
    if options["rank_pattern"] or not all(map(place.is_whole, place.found)):
        return None
    factor = options["decompose_factor"]
    template = LoKr(
        options["r"],
        factor=None if factor == -1 else factor,
        decompose_both=options["decompose_both"],
    )
    built = place.build(template)
    for address, adapter in built.items():
        update = updates[place.parts[address][0].module]
        values = {
            own_forms.OF_LOKR[variable.name]: variable.name
            for variable in adapter.trainable_variables
        }
        if not set(values) <= set(update.own):
            return None
        _assign(
            adapter,
            {
                ours: update.own[theirs].T
                * (update.scaling if ours in own_forms.SCALED_OF_LOKR else 1)
                for theirs, ours in values.items()
            },
        )
    return template, built


def _oft(place):
    updates = place.updates
    sizes = {one.own["size"] for one in updates.values()}
    found = {}
    for address, parts in place.parts.items():
        used = [updates.get(part.module) for part in parts]
        in_order = all(
            np.array_equal(part.inputs, np.arange(len(part.inputs)))
            for part in parts
        )
        if None in used or not in_order or len(sizes) > 1:
            break
        matrices = [one.own["q"] for one in used]
        if any(not np.array_equal(q, matrices[0]) for q in matrices):
            break
        found[address] = matrices[0]
    else:
        template = OFT(sizes.pop(), share_blocks=place.options["block_share"])
        built = place.build(template)
        for address, q in found.items():
            _assign(built[address], {"oft_q": q})
        return template, built
    raise ValueError(
        f"At '{address}', the adapter rotates inputs in blocks of several "
        "sizes, in another order, or parts of one layer in different ways, and "
        "no `OFT` computes the same. Merge it with PEFT (`merge_and_unload`) "
        "instead."
    )


def _assign(adapter, values):
    for variable in adapter.trainable_variables:
        with np.errstate(over="ignore"):
            variable.assign(values[variable.name].astype("float32"))


_MAKERS = {
    "MISS": _miss,
    "SHIRA": _shira,
    "HIRA": _hira,
    "LOHA": _loha,
    "LOKR": _lokr,
    "OFT": _oft,
}
