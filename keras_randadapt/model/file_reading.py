"""Reads an adapter file and checks its form and its digest."""

import json
import math
import reprlib

import numpy as np

from keras_randadapt.model import checks
from keras_randadapt.model import file_format
from keras_randadapt.model import fingerprint
from keras_randadapt.model import paths
from keras_randadapt.model import tensor_data
from keras_randadapt.model.file_format import site_keys


def read(filepath):
    paths.check_readable(filepath)
    with tensor_data.opened(filepath, "adapter file") as file:
        header = file.metadata() or {}
        if file_format.TRAINING_KEY in header:
            raise ValueError(
                f"'{filepath}' is the training file of an "
                "`AdapterCheckpoint`, which its `resume` reads. The "
                "adapter files are beside it."
            )
        if file_format.BANK_KEY in header:
            raise ValueError(
                f"'{filepath}' is the file of a bank of many adapters, "
                "which `serving.AdapterBank.load` reads."
            )
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
        check_version(filepath, metadata)
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    check_described(filepath, tensors, metadata)
    return tensors, metadata


def check_version(filepath, metadata):
    """Raises `ValueError` if this release does not read a file's version."""
    version = metadata.get("version")
    if type(version) is not int or version not in _FORMS:
        raise ValueError(
            f"'{filepath}' has format version {reprlib.repr(version)}; this "
            f"release of keras_randadapt reads the versions {sorted(_FORMS)}. "
            "Upgrade keras_randadapt."
        )


def check_described(filepath, tensors, metadata, with_digest=True):
    """Raises `ValueError` unless metadata are whole and describe the tensors.

    Args:
        filepath: The file.
        tensors: dict from key to array.
        metadata: dict, of a version that this release reads.
        with_digest: bool. Whether the digest is one of these tensors.
    """
    version = metadata["version"]
    check_form(filepath, metadata, _FORMS[version])
    if (
        with_digest
        and version > 1
        and metadata["digest"] != file_format.digest(tensors, metadata)
    ):
        raise ValueError(
            f"'{filepath}' is damaged: its content does not have the digest "
            "that it was saved with."
        )
    check_form(filepath, metadata["model"], _FORM_OF_MODEL, "model.")
    unknown = sorted(set(metadata.get("sources", {})) - set(site_keys(tensors)))
    if unknown:
        raise ValueError(
            f"'{filepath}' is damaged: it names input layers of sites that it "
            f"does not hold: {unknown[:5]}"
            + (" and more." if len(unknown) > 5 else ".")
        )
    # The counts are summed before a list is made of them, since a damaged count
    # would fill the memory.
    sites = sum(n for _, n in metadata["kernel_views"])
    if sites != len(site_keys(tensors)):
        raise ValueError(f"'{filepath}' is damaged: it misses sites.")
    if version > 1:
        _check_version_2(filepath, metadata, tensors)


def _check_version_2(filepath, metadata, tensors):
    sites = len(site_keys(tensors))
    base = tensors.get(file_format.BASE_KEY)
    expected = (sites, fingerprint.SIZE)
    if base is None or base.shape != expected or base.dtype != np.float32:
        raise ValueError(
            f"'{filepath}' is damaged: it lacks the fingerprints of its "
            f"{sites} base kernels."
        )
    if sum(n for _, n in metadata["precisions"]) != sites:
        raise ValueError(
            f"'{filepath}' is damaged: its precisions are not of its "
            f"{sites} sites."
        )


def check_finite(filepath, tensors):
    """Raises `ValueError` if a file holds NaN or infinity."""
    wrong = sorted(
        key for key, array in tensors.items() if not np.all(np.isfinite(array))
    )
    if wrong:
        raise ValueError(
            f"'{filepath}' holds NaN or infinity in {len(wrong)} of its "
            f"{len(tensors)} tensors: {wrong[:5]}. The training that wrote it "
            "diverged, most likely. `load_adapter` loads it all the same "
            "if it is given `allow_non_finite=True`."
        )


def _is_string(value):
    return isinstance(value, str)


def _is_finite(value):
    return type(value) in (int, float) and math.isfinite(value)


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
_FORM_2 = {
    **_FORM,
    "digest": (True, "a string", _is_string),
    "precisions": (True, "a list of names with their counts", _are_runs),
    "chosen": (False, "an object of strings", _are_strings),
    "moved": (False, "a list of distinct strings", _are_distinct_strings),
    "weight": (False, "a finite number", _is_finite),
    "frozen": (False, "true", lambda value: value is True),
}
_FORMS = {1: _FORM, 2: _FORM_2}
_FORM_OF_MODEL = {
    "class": (True, "a string", _is_string),
    "layers": (True, "a string", _is_string),
    "backbone": (False, "a string", _is_string),
    "parts": (False, "an object of strings", _are_strings),
}


def check_form(filepath, content, form, prefix=""):
    """Raises `ValueError` unless an object has the entries of a form.

    Args:
        filepath: The file.
        content: dict.
        form: dict from key to whether it is required, the value in words, and
            a function that tells whether a value is right.
        prefix: The object's own name in messages, with a dot.
    """
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
