"""Adapter files: a safetensors file of one adapter's trained weights.

Each site has one float32 tensor with its weights one after the other, whose key
is the site's structural address. Each weight of a kept layer, and each variable
of the base model that training moved, has a tensor of its own, `address#i`.
The tensor `#base` has the fingerprints of the sites' base kernels. Everything
else is rebuilt from the metadata, a JSON text under the key `keras_randadapt`:
it has the adapter's class and config, a description of the base model, a hash
of each basis, and a digest of the tensors and of the other metadata. Keys are
sorted and the JSON is canonical, so every backend writes the same bytes.

Files of version 1 have neither fingerprints nor a digest.
"""

import hashlib
import itertools
import json
import math

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.adapters import configs
from keras_randadapt.model import fingerprint
from keras_randadapt.model import moving_state
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import weighting
from keras_randadapt.sites import supported
from keras_randadapt.sites.kernel_site import layer_of

VERSION = 2
METADATA_KEY = "keras_randadapt"

#: The key of the metadata of a training file; see `training_file`.
TRAINING_KEY = "keras_randadapt_training"

#: The key of the metadata of a bank's file; see `serving.bank_file`.
BANK_KEY = "keras_randadapt_bank"

# A stand-in for digests of layers, which all have this length. The size of a
# file depends only on the length.
_SOME_DIGEST = "0" * 16

#: The key of the tensor of fingerprints. No address is empty.
BASE_KEY = "#base"

_ALL_KINDS = (*supported.KERNEL_KINDS, "norm")

#: The layers that a digest covers even if they are no sites. Files of earlier
#: versions have digests of these alone, so no class may be added.
_IN_EVERY_DIGEST = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Embedding,
    keras.layers.LayerNormalization,
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
)


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
            dtype = _safetensors_dtype(array)
            shapes[f"{address}#{i}"] = (dtype, tuple(weight.shape))
    for key, value in moving_state.moved_by(state, name).items():
        shapes[key] = _safetensors_dtype(_stored(value)), value.shape
    rows = len(record.addresses)
    shapes[BASE_KEY] = ("F32", (rows, fingerprint.SIZE))
    metadata = describe(model, name, None, lambda prefix="": _SOME_DIGEST)
    metadata["digest"] = "0" * 64
    header = {"__metadata__": {METADATA_KEY: configs.canonical(metadata)}}
    offset = 0
    # safetensors orders tensors by decreasing alignment and then by name.
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


def _safetensors_dtype(array):
    if array.dtype.kind == "b":
        return "BOOL"
    return f"{array.dtype.kind.upper()}{8 * array.dtype.itemsize}"


def count(adapter):
    return sum(math.prod(w.shape) for w in adapter.stored_weights())


def site_tensors(state, name):
    return values_of(state.adapters(name))


def values_of(adapters):
    """The tensors of sites, by address of the adapter."""
    return {
        address: np.concatenate(
            [_array(w).astype("float32").ravel() for w in a.stored_weights()]
        )
        for address, a in adapters.items()
    }


def site_keys(tensors):
    return sorted(key for key in tensors if "#" not in key)


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


def moved_tensors(state, name):
    """The state of the base model that the adapter's training moved."""
    moved = moving_state.moved_by(state, name)
    return {key: _stored(value) for key, value in moved.items()}


def base_tensor(state, name):
    """The fingerprints of the base kernels, in the order of sorted addresses.

    Args:
        state: An `AdaptedState`.
        name: The adapter's name.
    """
    addresses = sorted(state.records[name].addresses)
    return fingerprint.of_sites(state.layers, addresses)


def digest(tensors, metadata):
    """The SHA-256 digest of a file's tensors and metadata.

    Args:
        tensors: dict from key to NumPy array.
        metadata: dict. Its entry `"digest"` is left out.
    """
    told = {key: v for key, v in metadata.items() if key != "digest"}
    total = hashlib.sha256(configs.canonical(told).encode())
    for key in sorted(tensors):
        array = tensors[key]
        header = json.dumps([key, array.dtype.str, list(array.shape)])
        total.update(header.encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _stored(value):
    """A value in the dtype that a file has it in."""
    if value.dtype.name in ("float16", "bfloat16"):
        return value.astype("float32")
    return value


def stored_dtype(weight):
    """The dtype that a weight of a kept layer has in a file."""
    # NumPy has no bfloat16. bfloat16 and float16 convert to float32 and back
    # without loss.
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
        digest_of: Function from an optional prefix of addresses to the
            `layers_digest` of the layers below it.

    Returns:
        dict.
    """
    state = model._randadapt
    record = state.records[name]
    adapters = state.adapters(name)
    described = {**describe_model(model), "layers": digest_of()}
    moved = sorted(moving_state.moved_by(state, name))
    parts = {p: digest_of(f"{p}/") for p in _parts(model, record, moved)}
    if parts:
        described["parts"] = parts
    shapes = [adapters[a].site.shape for a in sorted(record.addresses)]
    metadata = {
        "version": VERSION,
        "name": name,
        "adapter": configs.serialize(record.template),
        "model": described,
        "kernel_views": _runs(shapes),
        "bases": basis_hashes(adapters),
        "kept": sorted(record.kept),
        "precisions": _runs(
            fingerprint.precision(state.layers[a])
            for a in sorted(record.addresses)
        ),
    }
    chosen = derived_hashes(adapters)
    if chosen:
        metadata["chosen"] = chosen
    if record.sources:
        metadata["sources"] = record.sources
    if moved:
        metadata["moved"] = moved
    if name in state.active:
        weight = weighting.of(state, [name])[name]
        if weight != 1:
            metadata["weight"] = weight
        if name in state.frozen:
            metadata["frozen"] = True
    if preset is not None:
        metadata["preset"] = preset
    return metadata


def _runs(values):
    """Values of the sites in the order of addresses, run-length encoded."""
    return [
        [value, len(list(group))] for value, group in itertools.groupby(values)
    ]


def describe_model(model):
    cls = type(model)
    if state_lib.is_adapted(model):
        cls = model._own_class
    description = {"class": cls.__name__}
    backbone = _backbone(model)
    if backbone is not None:
        description["backbone"] = type(backbone).__name__
    return description


def _parts(model, record, moved):
    """Addresses of inner models that contain all layers of an adapter's file.

    The file can be loaded into each of these. The list is empty for models
    with a backbone, whose file has the digest of the backbone.
    """
    if _backbone(model) is not None:
        return []
    told = [*record.addresses, *record.kept, *record.sources.values()]
    told += [key.rpartition("#")[0] for key in moved]
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

    The hash covers the sites and every layer of a class that some method could
    adapt in the first version of the format, with or without adapters. If a
    task has all sites in its backbone, only the backbone is hashed, so that
    files of the task and of the backbone fit both. The hash is the same for
    float, int8 and int4 kernels.

    Args:
        model: A built model, with or without adapters.
        sites: Addresses of the adapter's sites.
        kept: Addresses of layers that are left out with all below them,
            because the adapter trains them.
        prefix: A string. Only layers whose addresses begin with it count.

    Returns:
        A string of 16 characters.
    """
    layers = state_lib.layers_of(model)
    # Layers are compared by `id`, since their addresses in a backbone differ.
    adapted = {getattr(layers[a], "key", id(layers[a])) for a in sites}
    left_out = {
        id(layer)
        for address in kept
        for layer in _compat.flatten_layers(layers[address])
    }
    backbone = _backbone(model)
    if backbone is not None:
        parts = {id(layer) for layer in _compat.flatten_layers(backbone)}
        if all(id(layer_of(layers[a])) in parts for a in sites):
            layers, prefix = state_lib.layers_of(backbone), ""
    lines = []
    for address, layer in sorted(layers.items()):
        if not address.startswith(prefix):
            continue
        address = address.removeprefix(prefix)
        if id(layer_of(layer)) in left_out or not _has_view(layer):
            continue
        if isinstance(layer, _IN_EVERY_DIGEST) or (
            getattr(layer, "key", id(layer)) in adapted
        ):
            lines.append(f"{address} {supported.shape_of(layer)}")
    text = "\n".join(lines)
    return hashlib.sha256(text.encode()).hexdigest()[: len(_SOME_DIGEST)]


def _has_view(layer):
    """Whether a layer can be a site with a kernel view."""
    if not layer.built:
        return False
    if supported.supported_class(layer, _ALL_KINDS) is None:
        return False
    try:
        supported.view_of(layer)
    except (AttributeError, ValueError):
        # There is no kernel view of a normalization without an offset, an
        # einsum that repeats a label, or a kernel that quantization removed.
        return False
    return True


def basis_hashes(adapters):
    """A hash of every distinct basis, by its role and shape."""
    hashes = {}
    for adapter in adapters.values():
        digest = adapter.basis_digest()
        if digest:
            hashes[_basis_key(adapter)] = _short_hash(digest)
    return hashes


def derived_hashes(adapters):
    """A hash of what each adapter chose by its kernel, by address."""
    found = {a: one.derived_digest() for a, one in adapters.items()}
    return {a: _short_hash(digest) for a, digest in found.items() if digest}


def _basis_key(adapter):
    return f"{adapter.site.role} {adapter.site.shape}"


def _short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _array(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable))
