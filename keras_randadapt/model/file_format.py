"""Adapter files: a safetensors file of one adapter's trained weights.

One float32 tensor a site, keyed by the site's structural address, holds the
site's weights one after the other, and one tensor a weight of each kept layer.
Everything else is rebuilt from the metadata: one JSON text under the key
`keras_randadapt`, with the adapter's class and config, what it was trained on,
and a hash of each basis. Keys are sorted and the JSON is canonical, so every
backend writes the same bytes.
"""

import hashlib
import itertools
import json
import math

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.adapters import configs
from keras_randadapt.model import state as state_lib
from keras_randadapt.sites import supported

VERSION = 1
METADATA_KEY = "keras_randadapt"

# Every digest of layers is as long; the size of a file needs no more of it.
_SOME_DIGEST = "0" * 16

_ALL_KINDS = (*supported.KERNEL_KINDS, "norm")


def size(model, name):
    """The exact size in bytes of an adapter's file, without writing it."""
    state = model._randadapt
    record = state.records[name]
    shapes = {
        address: ("F32", (count(adapter),))
        for address, adapter in state.adapters(name).items()
    }
    for address in record.kept:
        for i, weight in enumerate(state.layers[address].weights):
            array = np.zeros(0, stored_dtype(weight))
            kind = "F" if array.dtype.kind == "f" else "I"
            dtype = f"{kind}{8 * array.dtype.itemsize}"
            shapes[f"{address}#{i}"] = (dtype, tuple(weight.shape))
    metadata = describe(model, name, None, lambda prefix="": _SOME_DIGEST)
    header = {"__metadata__": {METADATA_KEY: configs.canonical(metadata)}}
    offset = 0
    # safetensors lays tensors out by falling alignment, then by name.
    order = sorted(shapes, key=lambda k: (-int(shapes[k][0][1:]), k))
    for key in order:
        dtype, shape = shapes[key]
        end = offset + math.prod(shape) * int(dtype[1:]) // 8
        header[key] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    length = len(text.encode())
    return 8 + (length + 7) // 8 * 8 + offset


def count(adapter):
    return sum(math.prod(w.shape) for w in adapter.stored_weights())


def site_tensors(state, name):
    return {
        address: np.concatenate(
            [_array(w).astype("float32").ravel() for w in a.stored_weights()]
        )
        for address, a in state.adapters(name).items()
    }


def kept_tensors(state, name):
    record = state.records[name]
    tensors = {}
    for address in record.kept:
        layer = state.layers[address]
        if record.kept_values is None:
            values = state_lib.kept_layer_values(layer)
        else:
            values = record.kept_values[address]
        for i, (weight, value) in enumerate(zip(layer.weights, values)):
            tensors[f"{address}#{i}"] = value.astype(
                stored_dtype(weight), order="C"
            )
    return tensors


def stored_dtype(weight):
    """The dtype that a weight of a kept layer has in a file."""
    # bfloat16 and float16 widen to float32 and back without loss; bfloat16
    # is no NumPy dtype.
    dtype = keras.backend.standardize_dtype(weight.dtype)
    if dtype in ("float16", "bfloat16"):
        return "float32"
    return dtype


def describe(model, name, preset, digest_of):
    """The metadata of an adapter's file.

    Args:
        model: An adapted model.
        name: The adapter's name.
        preset: A string or `None`; see `save_adapter`.
        digest_of: Function of a prefix of addresses, none by default: the
            `layers_digest` of what is below.

    Returns:
        dict.
    """
    state = model._randadapt
    record = state.records[name]
    adapters = state.adapters(name)
    described = {**describe_model(model), "layers": digest_of()}
    parts = {p: digest_of(f"{p}/") for p in _parts(model, record)}
    if parts:
        described["parts"] = parts
    shapes = [
        f"{adapters[a].input_dim}x{adapters[a].output_dim}"
        for a in sorted(record.addresses)
    ]
    metadata = {
        "version": VERSION,
        "name": name,
        "adapter": configs.serialize(record.template),
        "model": described,
        # Run-length encoded, in the order of the sorted addresses.
        "kernel_views": [
            [shape, len(list(group))]
            for shape, group in itertools.groupby(shapes)
        ],
        "bases": basis_hashes(adapters),
        "kept": sorted(record.kept),
    }
    if record.sources:
        metadata["sources"] = record.sources
    if preset is not None:
        metadata["preset"] = preset
    return metadata


def describe_model(model):
    cls = type(model)
    if state_lib.is_adapted(model):
        cls = model._own_class
    description = {"class": cls.__name__}
    backbone = _backbone(model)
    if backbone is not None:
        description["backbone"] = type(backbone).__name__
    return description


def _parts(model, record):
    """Addresses of models inside a model that hold all that a file tells of.

    Each could be given the file. Of a backbone `layers_digest` tells.
    """
    if _backbone(model) is not None:
        return []
    told = [*record.addresses, *record.kept, *record.sources.values()]
    return [
        address
        for address, layer in state_lib.layers_of(model).items()
        if isinstance(layer, keras.Model)
        and all(one.startswith(f"{address}/") for one in told)
    ]


def _backbone(model):
    backbone = getattr(model, "backbone", None)
    return backbone if isinstance(backbone, keras.Model) else None


def layers_digest(model, sites, kept, prefix=""):
    """A short hash of the base model's layers: addresses and kernel views.

    Of every layer that some method can adapt, adapted or not. Of a task whose
    sites are all in its backbone it is the backbone's, so that either's files
    fit the other. It is the same for a float model and one of int8 or int4.

    Args:
        model: A built model, adapted or not.
        sites: Addresses of the adapter's sites.
        kept: Addresses of layers to leave out with all below them, because
            the adapter trains them.
        prefix: A string that the addresses of the part that counts begin
            with, where that is not all of the model or the backbone.

    Returns:
        A string of 16 characters.
    """
    layers = state_lib.layers_of(model)
    # By identity, since a backbone's own addresses are others.
    left_out = {
        id(layer)
        for address in kept
        for layer in _compat.flatten_layers(layers[address])
    }
    backbone = _backbone(model)
    if backbone is not None:
        parts = {id(layer) for layer in _compat.flatten_layers(backbone)}
        if all(id(layers[address]) in parts for address in sites):
            layers, prefix = state_lib.layers_of(backbone), ""
    lines = []
    for address, layer in sorted(layers.items()):
        if not address.startswith(prefix):
            continue
        address = address.removeprefix(prefix)
        view = None if id(layer) in left_out else _view_of(layer)
        if view is not None:
            lines.append(f"{address} {view.input_dim}x{view.output_dim}")
    text = "\n".join(lines)
    return hashlib.sha256(text.encode()).hexdigest()[: len(_SOME_DIGEST)]


def _view_of(layer):
    """The kernel view of a layer that can be a site, `None` for others."""
    if not layer.built:
        return None
    if supported.supported_class(layer, _ALL_KINDS) is None:
        return None
    try:
        return supported.view_of(layer)
    except (AttributeError, ValueError):
        # A normalization without an offset, an einsum that repeats a label,
        # or a kernel that was quantized away.
        return None


def basis_hashes(adapters):
    """A hash of every distinct basis, by the role and shape it is made for."""
    hashes = {}
    for adapter in adapters.values():
        digest = adapter.basis_digest()
        if digest:
            hashes[_basis_key(adapter)] = _short_hash(digest)
    return hashes


def _basis_key(adapter):
    shape = f"{adapter.input_dim}x{adapter.output_dim}"
    return f"{adapter.site.role} {shape}"


def _short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _array(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable))
