"""Finds the shapes of a checkpoint's tensors, and where each number goes.

A recorded converter says how the numbers of a checkpoint move, and not which
shapes its tensors have. Few shapes are possible for a variable of a given
shape. Each is tried with tensors whose values are their own coordinate along
one axis, which then show where every number goes.
"""

import dataclasses
import itertools
import math

import numpy as np

#: No vector of a checkpoint is longer, and its coordinates would take memory.
_LONGEST = 2**22


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where the numbers of one variable come from.

    Attributes:
        keys: The names of the tensors of the checkpoint.
        shapes: Their shapes, which have one number of axes.
        coordinates: For each axis, an integer array of the variable's shape.
            They are mostly views of vectors, so they take no memory.
            `None` where the variable is the one tensor itself.
        owner: Integer array of the variable's shape, the number of the tensor
            that each number comes from. `None` where there is one tensor.
    """

    keys: tuple
    shapes: tuple
    coordinates: tuple | None
    owner: np.ndarray | None

    def place(self, key):
        """Where a tensor's numbers are in the variable.

        Args:
            key: The tensor's name.

        Returns:
            `(inside, index)`: a boolean array of the variable's shape, or
            `None` for all of it, and the index of each of these numbers in the
            flattened tensor.
        """
        shape = self.shapes[self.keys.index(key)]
        if self.coordinates is None:
            return None, np.arange(math.prod(shape)).reshape(shape)
        if self.owner is None:
            return None, np.ravel_multi_index(self.coordinates, shape)
        inside = self.owner == self.keys.index(key)
        return inside, np.ravel_multi_index(
            tuple(one[inside] for one in self.coordinates), shape
        )


def origins_of(assignments, axes, accept):
    """The origins of all variables whose values are moved and not computed.

    Args:
        assignments: list of `recording.Assignment`.
        axes: Function of an assignment. It gives the number of axes that its
            tensors have, or `None` where it is not known.
        accept: Function of an assignment and an `Origin`. It tells whether the
            variable can have this origin, as `None` or as what compares equal
            for the same maps.

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
            known[signature] = _solve(members, axes, accept)
        found = known[signature]
        if isinstance(found, str):
            refused.update(dict.fromkeys(group, found))
            continue
        # The names differ between groups of one signature, and nothing else.
        for i, origin in zip(group, found):
            keys = tuple(assignments[i].value.keys())
            origins[i] = dataclasses.replace(origin, keys=keys)
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


def _solve(members, axes, accept):
    """The origins of a group's variables, or a string that says why not."""
    keys = _keys(members)
    if len(keys) == len(members) == 1 and members[0].value.key is not None:
        return [Origin(tuple(keys), (members[0].shape,), None, None)]
    found = []
    wanted = {axes(one) for one in members} - {None}
    for shapes in _candidates(members, keys):
        if wanted and {len(shape) for shape in shapes} != wanted:
            continue
        origins = _origins(members, dict(zip(keys, shapes)))
        if origins is None:
            continue
        answers = [accept(*pair) for pair in zip(members, origins)]
        if all(answer is not None for answer in answers):
            found.append((answers, origins))
    if not found:
        return "the shapes of the checkpoint's tensors are not known"
    answers, origins = found[0]
    for other_answers, others in found[1:]:
        if other_answers != answers:
            return (
                "the checkpoint's tensors may have the shape "
                f"{origins[0].shapes[0]} or {others[0].shapes[0]}"
            )
    return origins


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
            if sum(sizes) <= _LONGEST:
                several.append((sum(sizes),))
            several += list(_longer(members))
        yield from ((one,) for one in dict.fromkeys([*single, *several]))
    elif len(members) == 1:
        # One variable holds several tensors of one shape.
        n = len(keys)
        for parts in single:
            for axis, size in enumerate(parts):
                if size % n == 0:
                    part = (*parts[:axis], size // n, *parts[axis + 1 :])
                    yield (part,) * n


def _longer(members):
    """Shapes of one tensor of which variables of one shape are slices."""
    shapes = {one.shape for one in members}
    if len(shapes) > 1 or len(members[0].shape) < 3:
        return
    for parts in _likely(members[0].shape):
        if len(parts) == len(members[0].shape):
            for axis, size in enumerate(parts):
                whole = size * len(members)
                yield (*parts[:axis], whole, *parts[axis + 1 :])


def _likely(shape):
    likely = [shape, *itertools.permutations(shape)]
    for rows, columns in _two_parts(shape):
        likely += [(rows, columns), (columns, rows)]
    likely.append((1, *shape))
    if math.prod(shape) <= _LONGEST:
        likely.append((math.prod(shape),))
    return list(dict.fromkeys(likely))


def _two_parts(shape):
    """Both sizes of every matrix that a shape can be made of, in order."""
    for n in range(1, len(shape)):
        # Contracted axes need not be next to each other.
        for first in itertools.combinations(range(len(shape)), n):
            rows = math.prod(shape[axis] for axis in first)
            yield rows, math.prod(shape) // rows


def _origins(members, shapes):
    """The origin of each variable for these shapes, or `None`."""
    origins = []
    for one in members:
        keys = one.value.keys()
        here = [shapes[key] for key in keys]
        coordinates = []
        for axis in range(len(here[0])):
            arrays = {k: _coordinate(s, axis) for k, s in zip(keys, here)}
            coordinates.append(_replayed(one, arrays))
        owner = None
        if len(keys) > 1:
            numbers = map(np.int32, range(len(keys)))
            arrays = {
                key: np.broadcast_to(number, shape)
                for key, shape, number in zip(keys, here, numbers)
            }
            owner = _replayed(one, arrays)
        if any(array is None for array in coordinates):
            return None
        origins.append(
            Origin(tuple(keys), tuple(here), tuple(coordinates), owner)
        )
    return origins


def _coordinate(shape, axis):
    """Each number's coordinate along an axis, without memory."""
    ones = [1] * len(shape)
    ones[axis] = shape[axis]
    line = np.arange(shape[axis], dtype=np.int32).reshape(ones)
    return np.broadcast_to(line, shape)


def _replayed(one, arrays):
    try:
        made = one.value.replay(arrays)
    except (ValueError, IndexError, TypeError):
        # NumPy refuses what does not fit.
        return None
    return made if made.shape == one.shape else None
