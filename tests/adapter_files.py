"""Reads and rewrites adapter files, for tests of what is wrong with one."""

import json

import numpy as np
import safetensors
import safetensors.numpy

from keras_randadapt.model import file_format


def read(path):
    """The tensors and the metadata of a file."""
    with safetensors.safe_open(path, framework="np") as file:
        metadata = json.loads(file.metadata()["keras_randadapt"])
        return {key: file.get_tensor(key) for key in file.keys()}, metadata


def write(path, tensors, metadata):
    safetensors.numpy.save_file(
        tensors, path, {"keras_randadapt": json.dumps(metadata)}
    )


def edit(path, metadata=None, tensors=None, digest=True):
    """Rewrites a file with some of its content changed.

    Args:
        path: The file.
        metadata: What is to be changed, or, if it is no dict, what takes the
            place of all that was there. `None` as a value removes the key.
        tensors: Likewise.
        digest: Whether the digest is made right again.
    """
    content, old = read(path)
    for key, value in (tensors or {}).items():
        content[key] = value
    content = {k: v for k, v in content.items() if v is not None}
    if metadata is None or isinstance(metadata, dict):
        metadata = {**old, **(metadata or {})}
        metadata = {k: v for k, v in metadata.items() if v is not None}
        if digest and "digest" in metadata:
            metadata["digest"] = file_format.digest(content, metadata)
    write(path, content, metadata)


def as_version_1(path):
    """Rewrites a file as the first version would have written it."""
    tensors, metadata = read(path)
    del tensors[file_format.BASE_KEY]
    for key in ("digest", "precisions"):
        del metadata[key]
    write(path, tensors, {**metadata, "version": 1})


def fingerprints(path, sites):
    """Zeros in the place of a file's fingerprints, for so many sites."""
    return {file_format.BASE_KEY: np.zeros((sites, 16), "float32")}
