"""What differs between two dicts and between two sets of tensors."""

import numpy as np


def difference(what, first, second):
    """One difference, as a dict of JSON values."""
    return {"what": what, "first": first, "second": second}


def of_values(first, second, label="{}"):
    """The differences of two dicts of JSON values.

    Args:
        first: dict.
        second: dict. A key that one of the two lacks counts as `None`.
        label: string in which a key takes the place of `{}`.
    """
    for key in sorted(first.keys() | second.keys()):
        values = first.get(key), second.get(key)
        if values[0] != values[1]:
            yield difference(label.format(key), *values)


def of_tensors(first, second):
    """The differences of two dicts of NumPy arrays."""
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key), second.get(key)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            yield difference(f"tensor {key}", *map(_shown, (a, b)))
        elif not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            size = max(norm(a), norm(b))
            change = norm(a.astype("float64") - b) / size if size else 0.0
            yield of_norms(f"values of {key}", norm(a), norm(b), change)


def of_norms(what, first, second, change):
    """A difference of two arrays that are apart by a part of their norm."""
    return difference(
        what,
        f"norm {first:.6g}",
        f"norm {second:.6g}, apart by {100 * change:.3g} %",
    )


def norm(array):
    """The norm of all numbers of an array, a float."""
    return float(np.linalg.norm(array.astype("float64")))


def _shown(array):
    if array is None:
        return "nothing"
    return f"{array.dtype} of shape {tuple(array.shape)}"
