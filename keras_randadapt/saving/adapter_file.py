"""Saving and loading adapter files."""

import functools
import json
import math
import os
import reprlib
import tempfile
import warnings

import keras
import numpy as np
import safetensors
import safetensors.numpy

from keras_randadapt import building
from keras_randadapt import checks
from keras_randadapt import file_format
from keras_randadapt import injection
from keras_randadapt import report
from keras_randadapt import root
from keras_randadapt import site_layers
from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.adapters import base as adapter_base


def save_adapter(
    model: keras.Model,
    filepath: str | os.PathLike,
    name: str | None = None,
    *,
    preset: str | None = None,
) -> None:
    """Saves one adapter: its trained weights, config and seed.

    Nothing that a seed rebuilds is stored, nor any of the base model but the
    layers that were kept trainable. The file says what base model it is for,
    by class and by a hash of its layers' addresses and shapes. The file is
    complete or absent: it is written beside its destination and moved there.

    Args:
        model: An adapted model.
        filepath: Path of the file, by convention `*.safetensors`.
        name: Which adapter; the only one by default.
        preset: Optional string: the name of the KerasHub preset that the
            base model came from. Loading can then check it.

    Raises:
        ValueError: If the model has no adapter, or several and no `name`.
        FileNotFoundError: If there is no folder for the file.

    Example:

    ```python
    kra.save_adapter(model, "sentiment.safetensors")
    ```
    """
    state = root.state_of(model)
    name = checks.one_name(state, name)
    _warn_of_others(model, state)
    tensors = file_format.site_tensors(state, name)
    tensors.update(file_format.kept_tensors(state, name))
    record = state.records[name]
    digest_of = functools.partial(
        file_format.layers_digest, model, record.addresses, record.kept
    )
    metadata = file_format.describe(model, name, preset, digest_of)
    data = safetensors.numpy.save(
        tensors,
        metadata={file_format.METADATA_KEY: file_format.canonical(metadata)},
    )
    _write(filepath, data)


def load_adapter(
    model: keras.Model,
    filepath: str | os.PathLike,
    name: str | None = None,
    *,
    preset: str | None = None,
) -> report.Report:
    """Loads a saved adapter into a model, attaching it if need be.

    Files load on every backend, whichever wrote them, and into the backbone
    of the task that they were trained on. Loading is strict: every check is
    made before anything changes. The base model must have the layers that the
    adapter was trained on, adapted or not, of the same shapes; layers that
    were kept trainable are compared weight by weight, and of a KerasHub task
    only the backbone counts. A float and an int8 or int4 model are alike.

    A model without adapters computes with the loaded one at once. Beside
    other adapters it is attached inactive; see `set_active`. If the model has
    an adapter of this name, of the same config and on the same sites, its
    weights are replaced.

    Args:
        model: A built Keras model of the architecture that the adapter was
            trained on.
        filepath: Path of the file.
        name: The adapter's name in the model; the name that it was saved
            under by default.
        preset: Optional string: the preset that this model came from. If the
            file states one too, the two must be equal.

    Returns:
        A `Report` of the adapter.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, foreign, or of a newer format, or
            holds anything that it does not account for, if the model is of
            another class, has other layers or lacks a site, a shape or dtype
            differs, a basis would not be rebuilt as it was, or the name is
            taken by a different adapter. The model is then as it was.

    Example:

    ```python
    kra.load_adapter(model, "sentiment.safetensors")
    ```
    """
    tensors, metadata = _read(filepath)
    try:
        template = adapter_base.deserialize(metadata["adapter"])
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"'{filepath}' describes an adapter that can't be made here: "
            f"{error}"
        ) from error
    name = metadata["name"] if name is None else name
    checks.check_model(model)
    layers = root.layers_of(model)
    rename, added, removed = _relocation(
        filepath, metadata, tensors, model, layers
    )
    template = template.relocated(rename)
    _check_base(filepath, metadata, model, preset)

    addresses = [rename(key) for key in _site_keys(tensors)]
    kept = [rename(key) for key in metadata["kept"]]
    sources = {
        rename(key): rename(source)
        for key, source in metadata.get("sources", {}).items()
    }
    order = {address: i for i, address in enumerate(layers)}
    by_address = {rename(key): tensors[key] for key in _site_keys(tensors)}
    _check_views(filepath, metadata, addresses, layers, template.site_kinds)
    _check_layers(filepath, metadata, model, addresses, kept, added, removed)
    addresses.sort(key=order.get)
    checks.check_attachable(model, layers, addresses, kept)
    present = root.is_adapted(model) and name in model._randadapt.records
    if present:
        _check_same(filepath, model, name, template, addresses, kept, sources)
        built = model._randadapt.adapters(name)
    else:
        checks.check_new_name(model, name)
        built = building.build_adapters(
            template, name, layers, addresses, sources
        )
    _check_bases(filepath, metadata, built)
    values = _adapter_values(filepath, built, by_address)
    kept_values = _kept_values(filepath, metadata, tensors, rename, layers)

    # Nothing below can fail for anything in the file.
    if not present:
        injection.attach(
            model, template, name, addresses, kept, layers, built, sources
        )
    for address, arrays in values.items():
        for weight, array in zip(built[address].stored_weights(), arrays):
            weight.assign(array)
    record = model._randadapt.records[name]
    if record.kept_values is None:
        for address, arrays in kept_values.items():
            root.assign_kept_layer_values(layers[address], arrays)
    else:
        record.kept_values = kept_values
    return report.Report(model, name)


# Writing.


def _warn_of_others(model, state):
    """A warning for what is trained, but is not of any adapter."""
    ours = set()
    for name, record in state.records.items():
        layers = [*state.adapters(name).values()]
        # In a block those are trained that were active before it.
        if name in state.active or state.block:
            layers += [state.layers[address] for address in record.kept]
        ours.update(id(weight) for layer in layers for weight in layer.weights)
    others = [w.path for w in model.trainable_weights if id(w) not in ours]
    if others:
        warnings.warn(
            f"{len(others)} weights are trainable that are no adapter's, so no "
            f"adapter file holds them: {others[:5]}. Name their layers in "
            "`keep_trainable` at injection instead of unfreezing them.",
            AdapterWarning,
            stacklevel=3,
        )


def _write(filepath, data):
    filepath = os.fspath(filepath)
    folder = os.path.dirname(os.path.abspath(filepath))
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"There is no folder '{folder}' to put the file into. "
            f"Received: filepath={filepath!r}"
        )
    handle, temporary = tempfile.mkstemp(
        dir=folder, prefix=f".{os.path.basename(filepath)}."
    )
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, filepath)
    except BaseException:
        os.unlink(temporary)
        raise


# Reading and checking.


def _read(filepath):
    filepath = os.fspath(filepath)
    if not os.path.exists(filepath):
        raise FileNotFoundError(f"There is no file '{filepath}'.")
    if os.path.isdir(filepath):
        raise ValueError(
            f"'{filepath}' is a folder; give the path of an adapter file."
        )
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
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"'{filepath}' is no adapter file, or is damaged or cut short: "
            f"{error}"
        ) from error
    _check_form(filepath, metadata, _FORM)
    _check_form(filepath, metadata["model"], _FORM_OF_MODEL, "model.")
    unknown = sorted(
        set(metadata.get("sources", {})) - set(_site_keys(tensors))
    )
    if unknown:
        raise ValueError(
            f"'{filepath}' is damaged: it tells the inputs of sites that it "
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
    # By type, for `True` is an integer too.
    return isinstance(value, list) and all(
        isinstance(run, list)
        and [type(part) for part in run] == [str, int]
        and run[1] > 0
        for run in value
    )


# What the metadata must be: by key, whether it can't be absent, what it is in
# words, and the function that tells.
_FORM = {
    "name": (True, "a string", _is_string),
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
    for key, (_, words, holds) in form.items():
        if key in content and not holds(content[key]):
            raise ValueError(
                f"'{filepath}' is damaged: its metadata '{prefix}{key}' must "
                f"be {words}. Received: {reprlib.repr(content[key])}"
            )


def _site_keys(tensors):
    return sorted(key for key in tensors if "#" not in key)


def _relocation(filepath, metadata, tensors, model, layers):
    """The function from a file's addresses to the model's, and two prefixes.

    A task holds its backbone under a prefix; a file trained on either loads
    into the other, by adding the first prefix everywhere or removing the
    second.
    """
    keys = [
        *_site_keys(tensors),
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


def _check_base(filepath, metadata, model, preset):
    theirs = metadata["model"]
    ours = file_format.describe_model(model)
    equal = theirs["class"] == ours["class"]
    # A backbone and a task around the same class of backbone.
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


def _check_views(filepath, metadata, addresses, layers, kinds):
    runs = metadata["kernel_views"]
    # Counted first: a damaged count would fill the memory.
    if sum(n for _, n in runs) != len(addresses):
        raise ValueError(f"'{filepath}' is damaged: it misses sites.")
    # `addresses` are in the file's order, as the views are.
    views = [shape for shape, n in runs for _ in range(n)]
    wrong = []
    for address, theirs in zip(addresses, views):
        layer = layers[address]
        if not layer.built or site_layers.supported_class(layer, kinds) is None:
            raise ValueError(
                f"'{filepath}' adapts '{address}', which in this model is a "
                f"{type(layers[address]).__name__} and can't be adapted."
            )
        ours = "{}x{}".format(*site_layers.view_of(layers[address]))
        if ours != theirs:
            wrong.append(f"'{address}' ({theirs} in the file, {ours} here)")
    if wrong:
        raise ValueError(
            f"'{filepath}' was trained on kernels of other shapes: "
            + ", ".join(wrong[:5])
            + (f" and {len(wrong) - 5} more." if len(wrong) > 5 else ".")
        )


def _check_layers(filepath, metadata, model, addresses, kept, added, removed):
    theirs = metadata["model"]
    ours = file_format.describe_model(model)
    expected = theirs["layers"]
    if removed and "backbone" not in {**theirs, **ours}:
        # The file's model was larger than this one.
        part = removed.removesuffix("/")
        if part not in theirs.get("parts", {}):
            raise ValueError(
                f"'{filepath}' was trained on a larger model, and does not "
                f"tell what '{part}' in it is, which this model may be. Save "
                "it anew, or load it into the larger model."
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


def _check_same(filepath, model, name, template, addresses, kept, sources):
    record = model._randadapt.records[name]
    ours = adapter_base.serialize(record.template)
    theirs = adapter_base.serialize(template)
    if file_format.canonical(ours) != file_format.canonical(theirs):
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


def _check_bases(filepath, metadata, built):
    ours = file_format.basis_hashes(built)
    theirs = metadata["bases"]
    # Roles are last parts of addresses, which no relocation changes.
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


def _adapter_values(filepath, built, tensors):
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


def _kept_values(filepath, metadata, tensors, rename, layers):
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
