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

from keras_randadapt import root
from keras_randadapt.adapters import base as adapter_base

VERSION = 1
METADATA_KEY = "keras_randadapt"


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
            array = np.zeros(0, _stored_dtype(weight))
            kind = "F" if array.dtype.kind == "f" else "I"
            dtype = f"{kind}{8 * array.dtype.itemsize}"
            shapes[f"{address}#{i}"] = (dtype, tuple(weight.shape))
    header = {
        "__metadata__": {METADATA_KEY: canonical(describe(model, name, None))}
    }
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
            values = root.kept_layer_values(layer)
        else:
            values = record.kept_values[address]
        for i, (weight, value) in enumerate(zip(layer.weights, values)):
            tensors[f"{address}#{i}"] = np.ascontiguousarray(
                value.astype(_stored_dtype(weight))
            )
    return tensors


def _stored_dtype(weight):
    # bfloat16 and float16 widen to float32 and back without loss; bfloat16
    # is no NumPy dtype.
    dtype = keras.backend.standardize_dtype(weight.dtype)
    if dtype in ("float16", "bfloat16"):
        return "float32"
    return dtype


def describe(model, name, preset):
    state = model._randadapt
    record = state.records[name]
    adapters = state.adapters(name)
    shapes = [
        f"{adapters[a].input_dim}x{adapters[a].output_dim}"
        for a in sorted(record.addresses)
    ]
    metadata = {
        "version": VERSION,
        "name": name,
        "adapter": adapter_base.serialize(record.template),
        "model": describe_model(model),
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
    if root.is_adapted(model):
        cls = model._root_base
    description = {"class": cls.__name__}
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, keras.Model):
        description["backbone"] = type(backbone).__name__
    return description


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
    return f"{adapter.site_role} {shape}"


def _short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def canonical(metadata):
    return json.dumps(
        metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )


def _array(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable))
