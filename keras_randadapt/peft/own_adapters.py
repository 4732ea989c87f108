"""Adapters of the methods that have the same form here and in PEFT.

Each function makes the adapters of one method. It gives `(template, built)`,
or `None` if only a LoRA computes what the file does at these sites.
"""

import keras
import numpy as np

from keras_randadapt.adapters import HiRA
from keras_randadapt.adapters import MiSS
from keras_randadapt.adapters import SHiRA
from keras_randadapt.adapters import shira
from keras_randadapt.model import build
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


_MAKERS = {"MISS": _miss, "SHIRA": _shira, "HIRA": _hira}
