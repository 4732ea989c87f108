"""Kernels that a call has formed, with every active adapter folded in.

A loop over tokens multiplies by the same kernels in every step. `model.forming`
folds the adapters in before the loop, and the sites multiply by the result. The
kernels belong to one call of one thread, and within it to one trace.
"""

import contextlib
import threading

from keras_randadapt import _compat


class _Local(threading.local):
    def __init__(self):
        self.kernels = {}


_local = _Local()


@contextlib.contextmanager
def shown(kernels):
    """Lets sites multiply by these kernels during a block.

    Args:
        kernels: dict from the `id` of a site to a tensor of its kernel's shape
            and its compute dtype.
    """
    before = _local.kernels
    _local.kernels = kernels
    try:
        yield
    finally:
        _local.kernels = before


def kernel_of(site):
    """The kernel that the present call has formed for a site, or `None`."""
    # A compiled step of PyTorch may outlive the call.
    if _compat.is_compiling():
        return None
    return _local.kernels.get(id(site))
