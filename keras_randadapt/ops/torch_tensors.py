"""NumPy arrays as PyTorch tensors, made once for each device and dtype."""

import weakref

import torch

_known_tensors: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def as_tensors(owner, arrays, dtype, device):
    """Arrays as tensors, kept for the next call as long as `owner` lives.

    `None` stays `None`.
    """
    # A trace records where a tensor is made. The trace that checks it finds
    # the tensor made, and would differ.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _copies(arrays, dtype, device)
    known = _known_tensors.setdefault(owner, {})
    if (device, dtype) not in known:
        tensors = _copies(arrays, dtype, device)
        if {type(t) for t in tensors} - {torch.Tensor, type(None)}:
            # Fake tensors must not outlive the trace that made them.
            return tensors
        known[device, dtype] = tensors
    return known[device, dtype]


def _copies(arrays, dtype, device):
    # `torch.tensor` copies, because read-only arrays must not be shared. A
    # tensor that is made in inference mode could not be used in a later
    # backward pass.
    with torch.inference_mode(False):
        return tuple(
            None if a is None else torch.tensor(a, dtype=dtype, device=device)
            for a in arrays
        )
