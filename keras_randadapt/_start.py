"""Chooses Keras's backend for the command line; the package imports it first.

`python -m keras_randadapt` reads files and computes nothing that takes a
backend. Keras's NumPy backend is there in two seconds, while TensorFlow may
take ten.
"""

import os
import sys

__all__ = ["is_command"]


def is_command(arguments: list[str]) -> bool:
    """Whether a process was started as `python -m keras_randadapt`.

    Args:
        arguments: `sys.orig_argv`.
    """
    if "-m" not in arguments:
        return False
    i = arguments.index("-m")
    return arguments[i + 1 : i + 2] == ["keras_randadapt"]


if is_command(sys.orig_argv) and "keras" not in sys.modules:
    os.environ["KERAS_BACKEND"] = "numpy"
