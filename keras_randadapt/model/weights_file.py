"""What Keras's weights files hold of adapters, and whether it fits a model.

Keras loads what it finds at a path and ignores the rest. The weights of an
adapter with another seed or at another site would therefore load without a
word. Each adapter writes a description beside its weights, and this module
compares all of them before anything is loaded.
"""

import contextlib
import json
import os
import re
import warnings
import zipfile

import h5py
import numpy as np

from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.model import weighting
from keras_randadapt.model.state import check_no_block
from keras_randadapt.model.state import check_not_fitting

# Between the two a layer with several kernels has the kernel's name.
_STACK = r"/adapter/(?:kernel_[^/]+/)?"
_ADAPTER = re.compile(rf"{_STACK}named_")
_WEIGHT = re.compile(rf"{_STACK}weight_([^/]+)/vars/0$")
_FROZEN = re.compile(rf"{_STACK}vars/frozen$")
_DESCRIPTION = re.compile(rf"{_STACK}named_[^/]+/vars/description$")


def has_adapters(filepath):
    """Whether a weights file of Keras is that of an adapted model.

    It is `None` if there is no local file at this path.
    """
    filepath = str(filepath)
    if not os.path.exists(filepath):
        return None
    if filepath.endswith(".json"):
        with open(filepath) as file:
            return _ADAPTER.search(file.read()) is not None
    with contextlib.ExitStack() as stack:
        (file,) = _opened(filepath, stack)
        return bool(file.visit(lambda path: _ADAPTER.search(path) or None))


def check(filepath, state):
    """Raises `ValueError` if a file's adapters are not those of a model.

    A file of an earlier version does not describe them, which is a warning.

    Args:
        filepath: A weights file of an adapted model.
        state: An `AdaptedState`.

    Returns:
        Whether the file describes them.
    """
    theirs = _descriptions(str(filepath))
    if not theirs:
        warnings.warn(
            f"'{filepath}' was written by an earlier version and does not tell "
            "what its adapters are, so it is not known whether they are those "
            "of this model. Save it again with this version.",
            AdapterWarning,
            stacklevel=3,
        )
        return False
    ours = {
        (name, address): adapter.description()
        for name in state.records
        for address, adapter in state.adapters(name).items()
    }
    difference = _difference(theirs, ours)
    if difference:
        raise ValueError(
            f"'{filepath}' holds the weights of other adapters than this "
            f"model has: {difference}. Attach the adapters that the file is "
            "of, and then load it."
        )
    return True


def usage(filepath, model):
    """How a file's adapters were used: what `use` is to do after loading.

    Args:
        filepath: A weights file of an adapted model.
        model: The model, whose adapters are those of the file.

    Returns:
        `(weights, frozen)`: a dict from the name of an active adapter to its
        weight, and a tuple of the names of active adapters that are frozen.

    Raises:
        ValueError: If the model can't be used so, because it is being trained
            or inside a block.
    """
    state = model._randadapt
    weights = dict.fromkeys(state.active, 1.0)
    frozen = set()

    def visit(path, item):
        if not isinstance(item, h5py.Dataset):
            return
        match = _WEIGHT.search(f"/{path}")
        if match and match[1] in weights:
            weights[match[1]] = float(np.array(item))
        if _FROZEN.search(f"/{path}"):
            frozen.update(json.loads(bytes(np.array(item, "uint8"))))

    with contextlib.ExitStack() as stack:
        for file in _opened(str(filepath), stack):
            file.visititems(visit)
    frozen = tuple(name for name in state.active if name in frozen)
    if _changes(state, weights, frozen):
        check_not_fitting(model)
        check_no_block(model)
    return weights, frozen


def use(model, weights, frozen):
    """Uses the adapters as a file says that was loaded; see `usage`."""
    state = model._randadapt
    if _changes(state, weights, frozen):
        trained = [name for name in state.active if name not in frozen]
        if frozen != state.frozen:
            warnings.warn(
                f"The weights file changes what is trained: {trained} of the "
                f"active adapters {list(state.active)}, as when it was saved. "
                "See `train` of `keras_randadapt.set_active`.",
                AdapterWarning,
                stacklevel=3,
            )
        state.use(model, state.active, weights, trained)
    for name, value in weights.items():
        weight = state.records[name].weight
        if weight is not None:
            weight.value = value
            weight.layer.weight.assign(value)


def _changes(state, weights, frozen):
    """Whether more changes than the values of variables."""
    return bool(weighting.missing(state, weights)) or frozen != state.frozen


def _opened(filepath, stack):
    """The HDF5 files that a weights file consists of."""
    if filepath.endswith(".json"):
        with open(filepath) as file:
            places = json.load(file)["weight_map"].values()
        shards = set()
        for place in places:
            shards.update([place] if isinstance(place, str) else place)
        folder = os.path.dirname(filepath)
        return [
            stack.enter_context(h5py.File(os.path.join(folder, shard), "r"))
            for shard in sorted(shards)
        ]
    if filepath.endswith(".keras"):
        archive = stack.enter_context(zipfile.ZipFile(filepath))
        filepath = stack.enter_context(archive.open("model.weights.h5"))
    return [stack.enter_context(h5py.File(filepath, "r"))]


def _descriptions(filepath):
    """dict from `(name, address)` to the description of an adapter."""
    found = {}

    def visit(path, item):
        if isinstance(item, h5py.Dataset) and _DESCRIPTION.search(f"/{path}"):
            try:
                one = json.loads(bytes(np.array(item, "uint8")))
                found[one["name"], one["address"]] = one
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"'{filepath}' is damaged: '{path}' describes no adapter."
                ) from error

    with contextlib.ExitStack() as stack:
        for file in _opened(filepath, stack):
            file.visititems(visit)
    return found


def _difference(theirs, ours):
    """How two sets of adapters differ, in words; `""` if they do not."""
    names = sorted({name for name, _ in theirs})
    if names != sorted({name for name, _ in ours}):
        own = sorted({name for name, _ in ours})
        return f"the file has {names}, and the model has {own}"
    theirs = _relocated(theirs, ours)
    for name in names:
        sites = {address for one, address in theirs if one == name}
        own = {address for one, address in ours if one == name}
        if sites != own:
            return (
                f"'{name}' is on other sites. Only the file has "
                f"{sorted(sites - own)[:5]}, and only the model has "
                f"{sorted(own - sites)[:5]}"
            )
    for key, one in ours.items():
        other = theirs[key]
        if all(one[k] == other.get(k) for k in ("class", "config", "bases")):
            continue
        name, address = key
        if one["class"] != other.get("class"):
            words = f"a {other.get('class')} in the file, a {one['class']} here"
        elif one["config"] != other.get("config"):
            words = _differing(other.get("config"), one["config"])
        else:
            words = "trained with other bases than its seed gives here"
        return f"'{name}' at '{address}' is {words}"
    return ""


def _differing(theirs, ours):
    """The entries in which two configs differ, in words."""
    if not isinstance(theirs, dict):
        return f"one of config {theirs!r} in the file"
    keys = sorted(
        key
        for key in theirs.keys() | ours.keys()
        if theirs.get(key) != ours.get(key)
    )
    pairs = [
        f"{key}={theirs.get(key)!r} in the file and {ours.get(key)!r} here"
        for key in keys
    ]
    return "one of " + ", ".join(pairs)


def _relocated(theirs, ours):
    """The file's descriptions by the model's addresses.

    A file of a model may be loaded into a part of it, and the other way round.
    Addresses then differ by a prefix.
    """
    files, models = ({a for _, a in one} for one in (theirs, ours))
    if files == models:
        return theirs
    first = min(models)
    for address in sorted(files):
        if address.endswith(f"/{first}"):
            prefix = address[: -len(first)]
            if files == {prefix + a for a in models}:
                return {
                    (name, a.removeprefix(prefix)): one
                    for (name, a), one in theirs.items()
                }
        if first.endswith(f"/{address}"):
            prefix = first[: -len(address)]
            if {prefix + a for a in files} == models:
                return {
                    (name, prefix + a): one for (name, a), one in theirs.items()
                }
    return theirs
