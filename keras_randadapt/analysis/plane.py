"""The plane through three points of weight space."""

import numpy as np

#: Where the RandLoRA paper's figure 4 puts the three points.
TRIANGLE = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]])


class Plane:
    """The plane through three points, each of which is a dict of arrays.

    Args:
        points: list of three dicts.
        coordinates: `"distance"`: the first point is the origin, and `u` and
            `v` are orthonormal. `"triangle"`: the points are at `TRIANGLE`,
            and `u` and `v` are the derivatives of the weights by `x` and `y`.
    """

    def __init__(self, points, coordinates="distance"):
        first, second, third = points
        self.origin = first
        u = {key: second[key] - first[key] for key in first}
        w = {key: third[key] - first[key] for key in first}
        length_u, length_w = _norm(u), _norm(w)
        if not np.isfinite(length_u + length_w):
            i, key = next(
                (i, key)
                for i, point in enumerate(points)
                for key, value in point.items()
                if not np.all(np.isfinite(value))
            )
            raise ValueError(
                f"`points[{i}]` holds NaN or infinity: in {key!r}."
            )
        if length_u == 0 or length_w == 0:
            raise ValueError(
                "`points` must be three different points: two of them are "
                "equal."
            )
        self.u = {key: part / length_u for key, part in u.items()}
        along = _inner(w, self.u)
        v = {key: w[key] - along * self.u[key] for key in w}
        length_v = _norm(v)
        # A smaller remainder is rounding error of the float32 weights.
        if length_v <= 1e-5 * length_w:
            raise ValueError(
                "`points` lie on one line, through which there is no single "
                "plane. Give a third model that is trained from another seed "
                "or by another method."
            )
        self.v = {key: part / length_v for key, part in v.items()}
        self.points = np.array([[0.0, 0.0], [length_u, 0.0], [along, length_v]])
        if coordinates == "triangle":
            # The third point is half way between the others along x.
            self.u = u
            self.v = {key: w[key] - 0.5 * u[key] for key in w}
            self.points = TRIANGLE.copy()

    def at(self, a, b):
        return {
            key: start + a * self.u[key] + b * self.v[key]
            for key, start in self.origin.items()
        }

    def grid(self, shape, margin):
        low, high = self.points.min(axis=0), self.points.max(axis=0)
        low, high = low - margin * (high - low), high + margin * (high - low)
        return [
            np.linspace(start, stop, n)
            for start, stop, n in zip(low, high, shape)
        ]


def _inner(a, b):
    return float(sum(np.sum(a[key] * b[key]) for key in a))


def _norm(a):
    return float(np.sqrt(_inner(a, a)))
