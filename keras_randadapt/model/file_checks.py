"""Reads an adapter file and checks it before any of it is used."""

import json
import math
import os
import reprlib

import numpy as np
import safetensors

from keras_randadapt.adapters import configs
from keras_randadapt.model import checks
from keras_randadapt.model import file_format
from keras_randadapt.model import paths
from keras_randadapt.sites import supported


def read(filepath):
    paths.check_readable(filepath)
    try:
        with safetensors.safe_open(filepath, framework="np") as file:
            header = file.metadata() or {}
            if file_format.METADATA_KEY not in header:
                raise ValueError(
                    f"'{filepath}' is a safetensors file, but not one that "
                    "`keras_randadapt.save_adapter` wrote."
                )
            metadata = json.loads(header[file_format.METADATA_KEY])
            if not isinstance(metadata, dict):
                raise ValueError(
                    f"'{filepath}' is damaged: its metadata must be an "
                    f"object. Received: {reprlib.repr(metadata)}"
                )
            if metadata.get("version") != file_format.VERSION:
                raise ValueError(
                    f"'{filepath}' has format version "
                    f"{metadata.get('version')!r}; this release of "
                    f"keras_randadapt reads version {file_format.VERSION}. "
                    "Upgrade keras_randadapt."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (
        safetensors.SafetensorError,
        json.JSONDecodeError,
        # Metadata that is nested a thousand deep.
        RecursionError,
    ) as error:
        raise ValueError(
            f"'{filepath}' is no adapter file, or is damaged or cut short: "
            f"{error}"
        ) from error
    _check_form(filepath, metadata, _FORM)
    _check_form(filepath, metadata["model"], _FORM_OF_MODEL, "model.")
    unknown = sorted(set(metadata.get("sources", {})) - set(site_keys(tensors)))
    if unknown:
        raise ValueError(
            f"'{filepath}' is damaged: it names input layers of sites that it "
            f"does not hold: {unknown[:5]}"
            + (" and more." if len(unknown) > 5 else ".")
        )
    return tensors, metadata


def _is_string(value):
    return isinstance(value, str)


def _is_object(value):
    return isinstance(value, dict)


def _are_strings(value):
    return isinstance(value, dict) and all(map(_is_string, value.values()))


def _are_distinct_strings(value):
    return (
        isinstance(value, list)
        and all(map(_is_string, value))
        and len(set(value)) == len(value)
    )


def _are_runs(value):
    # Types are compared, because `True` is an instance of `int`.
    return isinstance(value, list) and all(
        isinstance(run, list)
        and [type(part) for part in run] == [str, int]
        and run[1] > 0
        for run in value
    )


# The form of the metadata. For each key: whether it is required, the value in
# words, and the function that checks it.
_FORM = {
    "version": (True, "a number", lambda value: type(value) is int),
    "name": (True, "a string that can be an adapter's name", checks.is_name),
    "adapter": (True, "an object", _is_object),
    "model": (True, "an object", _is_object),
    "kernel_views": (True, "a list of shapes with their counts", _are_runs),
    "bases": (True, "an object of strings", _are_strings),
    "kept": (True, "a list of distinct strings", _are_distinct_strings),
    "sources": (False, "an object of strings", _are_strings),
    "preset": (False, "a string", _is_string),
}
_FORM_OF_MODEL = {
    "class": (True, "a string", _is_string),
    "layers": (True, "a string", _is_string),
    "backbone": (False, "a string", _is_string),
    "parts": (False, "an object of strings", _are_strings),
}


def _check_form(filepath, content, form, prefix=""):
    missing = sorted(
        prefix + key
        for key, (required, _, _) in form.items()
        if required and key not in content
    )
    if missing:
        raise ValueError(
            f"'{filepath}' lacks the metadata {missing}; it is damaged."
        )
    unknown = sorted(prefix + key for key in set(content) - set(form))
    if unknown:
        raise ValueError(
            f"'{filepath}' holds metadata that this release does not know: "
            f"{reprlib.repr(unknown)}. It is damaged, or of a newer release."
        )
    for key, (_, words, holds) in form.items():
        if key in content and not holds(content[key]):
            raise ValueError(
                f"'{filepath}' is damaged: its metadata '{prefix}{key}' must "
                f"be {words}. Received: {reprlib.repr(content[key])}"
            )


def site_keys(tensors):
    return sorted(key for key in tensors if "#" not in key)


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
    ]
    if not keys:
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
    # The counts are summed before the list is made, since a damaged count
    # would fill the memory.
    if sum(n for _, n in runs) != len(addresses):
        raise ValueError(f"'{filepath}' is damaged: it misses sites.")
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
        ours = "{}x{}".format(*supported.view_of(layers[address]))
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


def _kind(dtype, shape):
    return f"{dtype} of shape {tuple(shape)}"
