"""Finds the shapes of a checkpoint's tensors, and where each number goes.

A recorded converter says how the numbers of a checkpoint move, and not which
shapes its tensors have. Few shapes are possible for a variable of a given
shape. Each is tried with tensors whose values are their own index, which then
show where every number goes.
"""

import dataclasses
import itertools
import math

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where the numbers of one variable come from.

    Attributes:
        keys: The names of the tensors of the checkpoint.
        shapes: Their shapes.
        index: Integer array of the variable's shape. The tensors' numbers are
            counted through, those of the first tensor first. `None` where the
            variable is the tensor itself.
    """

    keys: tuple
    shapes: tuple
    index: np.ndarray | None


def origins_of(assignments, accept):
    """The origins of all variables whose values are moved and not computed.

    Args:
        assignments: list of `recording.Assignment`.
        accept: Function of an assignment and an `Origin`. It tells whether the
            variable can have this origin.

    Returns:
        `(origins, refused)`: a dict from the place of an assignment to its
        `Origin`, and one from place to a string that says why there is none.
    """
    origins, refused = {}, {}
    movable = []
    for i, one in enumerate(assignments):
        if one.value is None:
            refused[i] = "its values do not come from the checkpoint"
        elif one.value.opaque:
            refused[i] = (
                f"KerasHub's converter computes its values: {one.value.opaque}"
            )
        else:
            movable.append(i)
    known = {}
    for group in _groups(assignments, movable):
        members = [assignments[i] for i in group]
        signature = tuple(
            (one.shape, one.value.signature(), _kind(one)) for one in members
        )
        if signature not in known:
            known[signature] = _solve(members, accept)
        shapes, indices = known[signature]
        if shapes is None:
            refused.update(dict.fromkeys(group, indices))
            continue
        # The names differ between groups of one signature, and nothing else.
        of_key = dict(zip(_keys(members), shapes))
        for i, index in zip(group, indices):
            keys = tuple(assignments[i].value.keys())
            origins[i] = Origin(keys, tuple(of_key[k] for k in keys), index)
    return origins, refused


def _kind(one):
    # The kernel view depends on the layer's class and equation.
    return type(one.layer).__name__, getattr(one.layer, "equation", None)


def _keys(members):
    return list(dict.fromkeys(k for one in members for k in one.value.keys()))


def _groups(assignments, movable):
    """The assignments that share tensors of the checkpoint, in lists."""
    group_of = {}
    for i in movable:
        keys = assignments[i].value.keys()
        joined = [group_of[key] for key in keys if key in group_of]
        members = sorted({i}.union(*joined))
        for member in members:
            for key in assignments[member].value.keys():
                group_of[key] = members
    seen = {}
    for members in group_of.values():
        seen[members[0]] = members
    return [seen[first] for first in sorted(seen)]


def _solve(members, accept):
    """The shapes of a group's tensors and the indices of its variables.

    Returns:
        `(shapes, indices)`, or `None` and a string that says why.
    """
    keys = _keys(members)
    if len(keys) == len(members) == 1 and members[0].value.key is not None:
        return [members[0].shape], [None]
    found = []
    for shapes in _candidates(members, keys):
        indices = _indices(members, dict(zip(keys, shapes)))
        if indices is None or not all(
            accept(one, Origin(tuple(one.value.keys()), shapes, index))
            for one, index in zip(members, indices)
        ):
            continue
        found.append((shapes, indices))
    if not found:
        return None, "the shapes of the checkpoint's tensors are not known"
    shapes, indices = found[0]
    for others, other_indices in found[1:]:
        if others != shapes and any(
            not np.array_equal(a, b) for a, b in zip(indices, other_indices)
        ):
            return None, (
                "the checkpoint's tensors may have the shape "
                f"{shapes[0]} or {others[0]}"
            )
    return found[0]


def _candidates(members, keys):
    """Shapes that the tensors may have, the likely ones first."""
    shape = members[0].shape
    single = _likely(shape)
    if members[0].attribute == "bias":
        # PyTorch's biases are vectors.
        single.insert(0, (math.prod(shape),))
    if len(keys) == 1:
        several = []
        if len(members) > 1:
            # One tensor holds several variables, side by side.
            sizes = [math.prod(one.shape) for one in members]
            for rows, columns in _two_parts(shape):
                if all(size % rows == 0 for size in sizes):
                    total = sum(sizes) // rows
                    several += [(rows, total), (total, rows)]
            several.append((sum(sizes),))
        yield from ((one,) for one in dict.fromkeys([*single, *several]))
    elif len(members) == 1:
        # One variable holds several tensors of one shape.
        n = len(keys)
        for parts in single:
            for axis, size in enumerate(parts):
                if size % n == 0:
                    part = (*parts[:axis], size // n, *parts[axis + 1 :])
                    yield (part,) * n


def _likely(shape):
    likely = [shape, *itertools.permutations(shape)]
    for rows, columns in _two_parts(shape):
        likely += [(rows, columns), (columns, rows)]
    likely += [(math.prod(shape),), (1, *shape)]
    return list(dict.fromkeys(likely))


def _two_parts(shape):
    """Both sizes of every matrix that a shape can be made of, in order."""
    for n in range(1, len(shape)):
        # Contracted axes need not be next to each other.
        for first in itertools.combinations(range(len(shape)), n):
            rows = math.prod(shape[axis] for axis in first)
            yield rows, math.prod(shape) // rows


def _indices(members, shapes):
    """The index of each variable for these shapes, or `None`."""
    indices = []
    for one in members:
        arrays, start = {}, 0
        for key in one.value.keys():
            size = math.prod(shapes[key])
            arrays[key] = _count(start, size).reshape(shapes[key])
            start += size
        try:
            index = one.value.replay(arrays)
        except (ValueError, IndexError, TypeError):
            # NumPy refuses what does not fit.
            return None
        if index.shape != one.shape:
            return None
        indices.append(index)
    return indices


def _count(start, size):
    dtype = np.int32 if start + size < 2**31 else np.int64
    return np.arange(start, start + size, dtype=dtype)
