"""Checks of an adapter file against the model that it is to be loaded into."""

import math
import os
import warnings

import numpy as np

from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.adapters import configs
from keras_randadapt.model import file_format
from keras_randadapt.model import fingerprint
from keras_randadapt.model.file_format import site_keys
from keras_randadapt.sites import supported


def relocation(filepath, metadata, tensors, model, layers):
    """The function from a file's addresses to the model's, and two prefixes.

    A task holds its backbone under a prefix. A file of either loads into the
    other: the function adds the first prefix to addresses, or removes the
    second.
    """
    keys = [
        *site_keys(tensors),
        *metadata["kept"],
        *metadata.get("sources", {}).values(),
        *(key.rpartition("#")[0] for key in metadata.get("moved", ())),
    ]
    if not site_keys(tensors):
        raise ValueError(f"'{filepath}' holds no site.")
    if all(key in layers for key in keys):
        return lambda key: key, "", ""
    prefixes = set()
    for address in layers:
        if address.endswith(f"/{keys[0]}"):
            prefixes.add(address[: -len(keys[0])])
    fits = [p for p in prefixes if all(p + key in layers for key in keys)]
    if len(fits) > 1:
        raise ValueError(
            f"'{filepath}' fits at several places of this model: "
            f"{sorted(fits)}. Load it into that part itself."
        )
    if fits:
        prefix = fits[0]
        return lambda key: prefix + key, prefix, ""
    parts = os.path.commonprefix(keys).split("/")[:-1]
    for n in range(1, len(parts) + 1):
        prefix = "/".join(parts[:n]) + "/"
        if all(key.removeprefix(prefix) in layers for key in keys):
            return lambda key: key.removeprefix(prefix), "", prefix
    missing = [key for key in keys if key not in layers]
    ours = file_format.describe_model(model)["class"]
    raise ValueError(
        f"'{filepath}' was trained on a {metadata['model']['class']}; this "
        f"{ours} lacks {len(missing)} of its "
        f"{len(keys)} addresses: {missing[:5]}"
        + (" and more." if len(missing) > 5 else ".")
    )


def check_base(filepath, metadata, model, preset):
    theirs = metadata["model"]
    ours = file_format.describe_model(model)
    equal = theirs["class"] == ours["class"]
    # The classes fit if one is a task whose backbone is of the other's class.
    related = {theirs.get("backbone", theirs["class"])} & {
        ours.get("backbone", ours["class"])
    }
    if not equal and not related:
        raise ValueError(
            f"'{filepath}' was trained on a {theirs['class']}; this model is "
            f"a {ours['class']}."
        )
    stated = metadata.get("preset")
    if preset is not None and stated is not None and preset != stated:
        raise ValueError(
            f"'{filepath}' was trained on the preset {stated!r}. "
            f"Received: preset={preset!r}"
        )


def check_views(filepath, metadata, addresses, layers, kinds):
    runs = metadata["kernel_views"]
    # Both `addresses` and the views are in the file's order.
    views = [shape for shape, n in runs for _ in range(n)]
    wrong = []
    for address, theirs in zip(addresses, views):
        layer = layers[address]
        if not layer.built or supported.supported_class(layer, kinds) is None:
            raise ValueError(
                f"'{filepath}' adapts '{address}', which in this model is a "
                f"{type(layers[address]).__name__} and can't be adapted."
            )
        ours = supported.shape_of(layer)
        if ours != theirs:
            wrong.append(f"'{address}' ({theirs} in the file, {ours} here)")
    if wrong:
        raise ValueError(
            f"'{filepath}' was trained on kernels of other shapes: "
            + ", ".join(wrong[:5])
            + (f" and {len(wrong) - 5} more." if len(wrong) > 5 else ".")
        )


def check_layers(filepath, metadata, model, addresses, kept, added, removed):
    theirs = metadata["model"]
    ours = file_format.describe_model(model)
    expected = theirs["layers"]
    if removed and "backbone" not in {**theirs, **ours}:
        # The file's model was larger than this one.
        part = removed.removesuffix("/")
        if part not in theirs.get("parts", {}):
            raise ValueError(
                f"'{filepath}' was trained on a larger model and has no "
                f"fingerprint of its part '{part}', so it cannot be checked "
                "against this model. Save it again with this version, or load "
                "it into the larger model."
            )
        expected = theirs["parts"][part]
    if file_format.layers_digest(model, addresses, kept, added) == expected:
        return
    cls = theirs.get("backbone", theirs["class"])
    raise ValueError(
        f"'{filepath}' was trained on a {cls} with other layers than this "
        "model's: it has every site, but more or fewer layers beside them, or "
        "layers of other shapes."
    )


def check_base_weights(filepath, metadata, tensors, layers, rename, wanted):
    """Raises an error or warns if the base weights are others than the file's.

    Args:
        filepath: The file.
        metadata: Its metadata.
        tensors: Its tensors.
        layers: dict from address to layer; those of the file are sites.
        rename: See `relocation`.
        wanted: `"error"`, `"warn"` or `"ignore"`.
    """
    if wanted == "ignore":
        return
    keys = site_keys(tensors)
    if file_format.BASE_KEY not in tensors:
        _object(
            wanted,
            f"'{filepath}' was written by an earlier version and has no "
            "fingerprint of the base weights, so it is not known whether this "
            "model has the weights that the adapter was trained on. Save it "
            "again with this version.",
        )
        return
    names = [name for name, n in metadata["precisions"] for _ in range(n)]
    sites = [layers[rename(key)] for key in keys]
    precisions = [
        (name, fingerprint.precision(site)) for name, site in zip(names, sites)
    ]
    ours = np.stack([fingerprint.of_site(site) for site in sites])
    theirs = tensors[file_format.BASE_KEY]
    wrong = fingerprint.differing(ours, theirs, precisions)
    if wrong:
        i, distance = wrong[0]
        _object(
            wanted,
            f"'{filepath}' was trained on other base weights: the kernels of "
            f"{len(wrong)} of its {len(keys)} sites differ, that of "
            f"'{rename(keys[i])}' by {100 * distance:.3g} %. Give the model "
            "the weights that the adapter was trained on, or pass "
            '`check_base="ignore"`.',
        )


def _object(wanted, message):
    if wanted == "error":
        raise ValueError(message)
    # The warning is for the caller of `load_adapter`.
    warnings.warn(message, AdapterWarning, stacklevel=5)


def check_same(filepath, model, name, template, addresses, kept, sources):
    record = model._randadapt.records[name]
    ours = configs.serialize(record.template)
    theirs = configs.serialize(template)
    if configs.canonical(ours) != configs.canonical(theirs):
        difference = f"the file's is {theirs}, the model's {ours}"
    elif set(record.addresses) != set(addresses):
        difference = "they are on different sites"
    elif set(record.kept) != set(kept):
        difference = "they keep different layers trainable"
    elif record.sources != sources:
        difference = "they get the inputs of different layers"
    else:
        return
    raise ValueError(
        f"The model has an adapter called '{name}' that differs from the one "
        f"in '{filepath}': {difference}. Give another `name`."
    )


def check_bases(filepath, metadata, built):
    ours = file_format.basis_hashes(built)
    theirs = metadata["bases"]
    # Roles are the last parts of addresses, which relocation does not change.
    wrong = sorted(
        role
        for role in set(ours) | set(theirs)
        if ours.get(role) != theirs.get(role)
    )
    if wrong:
        raise ValueError(
            f"'{filepath}' was trained with other bases than its seed gives "
            f"here, for {wrong[:5]}. The file was edited, or written by an "
            "incompatible version of keras_randadapt."
        )


def check_chosen(filepath, metadata, rename, built):
    """Raises `ValueError` if attached adapters chose by another kernel.

    Args:
        filepath: The file's path.
        metadata: Its metadata.
        rename: See `relocation`.
        built: dict from address to attached adapter.
    """
    theirs = {rename(a): one for a, one in metadata.get("chosen", {}).items()}
    ours = file_format.derived_hashes(built)
    wrong = sorted(
        a for a in set(ours) | set(theirs) if ours.get(a) != theirs.get(a)
    )
    if wrong:
        raise ValueError(
            f"'{filepath}' trained entries that it chose by the base kernels, "
            f"and these kernels give others, at {wrong[:5]}. Load the base "
            "weights that it was trained on, in the same precision."
        )


def adapter_values(filepath, built, tensors):
    values = {}
    for address, adapter in built.items():
        flat = tensors[address]
        expected = file_format.count(adapter)
        if flat.shape != (expected,) or flat.dtype != np.float32:
            raise ValueError(
                f"'{filepath}' holds {flat.dtype} values of shape "
                f"{flat.shape} for '{address}'; the adapter that it describes "
                f"has {expected} float32 weights there."
            )
        arrays = []
        for weight in adapter.stored_weights():
            n = math.prod(weight.shape)
            arrays.append(flat[:n].reshape(weight.shape))
            flat = flat[n:]
        values[address] = arrays
    return values


def kept_values(filepath, metadata, tensors, rename, layers):
    unknown = {key for key in tensors if "#" in key}
    unknown -= {file_format.BASE_KEY, *metadata.get("moved", ())}
    values = {}
    for key in metadata["kept"]:
        weights = layers[rename(key)].weights
        arrays = []
        for i, weight in enumerate(weights):
            unknown.discard(f"{key}#{i}")
            array = tensors.get(f"{key}#{i}")
            ours = _kind(file_format.stored_dtype(weight), weight.shape)
            found = "nothing"
            if array is not None:
                found = _kind(array.dtype, array.shape)
            if found != ours:
                raise ValueError(
                    f"'{filepath}' holds {found} for weight {i} of the kept "
                    f"layer '{key}', which in this model must be {ours}."
                )
            arrays.append(array)
        values[rename(key)] = arrays
    if unknown:
        raise ValueError(
            f"'{filepath}' holds tensors that are no weights of its kept "
            f"layers: {sorted(unknown)[:5]}"
            + (f" and {len(unknown) - 5} more." if len(unknown) > 5 else ".")
        )
    return values


def moved_values(filepath, metadata, tensors, rename, moving):
    """The state that training moved, by key of this model.

    Args:
        filepath: The file, for errors.
        metadata: Its metadata.
        tensors: Its tensors.
        rename: See `relocation`.
        moving: dict from key to variable of this model; see `moving_state`.
    """
    values = {}
    for key in metadata.get("moved", ()):
        address, _, number = key.rpartition("#")
        renamed = f"{rename(address)}#{number}"
        variable = moving.get(renamed)
        ours = "no such state"
        if variable is not None:
            dtype = file_format.stored_dtype(variable)
            ours = _kind(dtype, variable.shape)
        found = "nothing"
        if key in tensors:
            found = _kind(tensors[key].dtype, tensors[key].shape)
        if found != ours:
            raise ValueError(
                f"'{filepath}' holds {found} for the state '{key}' that "
                f"training moved, and this model has {ours} there."
            )
        values[renamed] = tensors[key]
    return values


def _kind(dtype, shape):
    return f"{dtype} of shape {tuple(shape)}"
