"""NumPy arrays as PyTorch tensors, made once for each device and dtype."""

import weakref

import torch

_known_tensors: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def as_tensors(owner, arrays, dtype, device):
    """Arrays as tensors, kept for the next call as long as `owner` lives.

    `None` stays `None`.
    """
    if torch.compiler.is_compiling():
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
            None if a is None else _copy(a, dtype, device) for a in arrays
        )


def _copy(array, dtype, device):
    if torch.jit.is_tracing():
        # `torch.tensor` would be recorded where it makes the tensor, and the
        # trace that checks the first one finds the tensor made.
        name = str(dtype).removeprefix("torch.")
        if device.type == "cpu" and name != "bfloat16":
            # NumPy has all other dtypes, so no conversion is recorded.
            return torch.from_numpy(array.astype(name))
    return torch.tensor(array, dtype=dtype, device=device)
