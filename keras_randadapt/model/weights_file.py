"""Looks for adapters in Keras's own weights files."""

import contextlib
import os
import zipfile

import h5py


def has_adapters(filepath):
    """Whether a weights file of Keras is that of an adapted model.

    It is `None` if there is no local file at this path.
    """
    filepath = str(filepath)
    if not os.path.exists(filepath):
        return None
    part = "/adapter/named_"
    if filepath.endswith(".json"):
        with open(filepath) as file:
            return part in file.read()
    with contextlib.ExitStack() as stack:
        file = filepath
        if filepath.endswith(".keras"):
            archive = stack.enter_context(zipfile.ZipFile(filepath))
            file = stack.enter_context(archive.open("model.weights.h5"))
        file = stack.enter_context(h5py.File(file, "r"))
        return bool(file.visit(lambda path: part in path or None))
