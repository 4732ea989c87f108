"""Paths of adapter files: what is accepted, and how a file is replaced."""

import contextlib
import os
import secrets
import stat

#: Endings that other formats have; a file of ours would be taken for theirs.
_OTHER_FORMATS = (
    ".h5",
    ".hdf5",
    ".keras",
    ".npz",
    ".npy",
    ".json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".zip",
)


def check_path(filepath):
    """The path of an adapter file as a string.

    Args:
        filepath: string, bytes or path-like.

    Raises:
        TypeError: If it is of another type.
        ValueError: If it is empty or holds a null character.
    """
    try:
        path = os.fsdecode(filepath)
    except TypeError as error:
        raise TypeError(
            "`filepath` must be a string or a path. "
            f"Received: filepath={filepath!r} (of type "
            f"{type(filepath).__name__})"
        ) from error
    if not path or "\0" in path:
        raise ValueError(
            f"`filepath` must name a file. Received: filepath={filepath!r}"
        )
    return path


def check_readable(path):
    """Raises an error unless there is a regular file at a path.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is a folder, a pipe or a device.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no file '{path}'.")
    if os.path.isdir(path):
        raise ValueError(
            f"'{path}' is a folder; give the path of an adapter file."
        )
    if not os.path.isfile(path):
        raise ValueError(
            f"'{path}' is no regular file, so no adapter can be read from it."
        )


def check_writable(path):
    """Validates a path to write to, and resolves symbolic links.

    Returns:
        The path of the file that will be replaced or made.

    Raises:
        FileNotFoundError: If there is no folder for the file.
        ValueError: If the path has the ending of another format, or leads to
            what is no regular file.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending in _OTHER_FORMATS:
        raise ValueError(
            f"'{path}' has the ending of another format, and adapter files are "
            "safetensors files: call it '*.safetensors'. Keras's own files "
            "are written by `model.save` and `model.save_weights`."
        )
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"There is no folder '{folder}' to put the file into. "
            f"Received: filepath={path!r}"
        )
    if os.path.exists(target) and not os.path.isfile(target):
        raise ValueError(
            f"'{path}' is a folder, a pipe or a device, and no file can take "
            "its place."
        )
    return target


def replace(target, data):
    """Writes a file as a whole, or leaves what was there.

    A file that is replaced keeps its mode; a new one gets what the process's
    umask leaves of `rw-rw-rw-`.

    Args:
        target: What `check_writable` gave.
        data: bytes, or an iterable of pieces of the file.
    """
    # The name does not depend on the target's, which may be as long as the
    # file system takes.
    name = f".randadapt-{secrets.token_hex(8)}.tmp"
    temporary = os.path.join(os.path.dirname(target), name)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(temporary, flags, 0o666)
        with os.fdopen(handle, "wb") as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
