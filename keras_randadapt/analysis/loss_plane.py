"""The loss on the plane through three trained models."""

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_randadapt import arguments
from keras_randadapt._types import Axis
from keras_randadapt._types import Data
from keras_randadapt.analysis import keyed_weights
from keras_randadapt.analysis import plane as plane_lib
from keras_randadapt.analysis import plotting
from keras_randadapt.analysis import point_values
from keras_randadapt.analysis.table import Table
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import switch

COORDINATES = ("distance", "triangle")


class LossPlane:
    """The loss on a grid over a plane, and at the three points that span it.

    The first point is the origin, and the second lies on the x axis.
    Coordinates are Euclidean distances in weight space, or those of a figure:
    see `mode_connectivity`.

    Attributes:
        x: float64 array, `(columns,)`: x coordinates of the grid.
        y: float64 array, `(rows,)`: y coordinates of the grid.
        loss: float64 array, `(rows, columns)`.
        metrics: dict from name to an array like `loss`, for every result of
            `evaluate`.
        points: float64 array, `(3, 2)`: the coordinates of the three points.
        point_losses: float64 array, `(3,)`: the losses at them.
        labels: The names of the points.
        coordinates: `"distance"` or `"triangle"`.
    """

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        metrics: dict[str, np.ndarray],
        points: np.ndarray,
        point_losses: np.ndarray,
        labels: Sequence[str],
        coordinates: str = "distance",
    ):
        self.x = x
        self.y = y
        self.metrics = metrics
        self.points = points
        self.point_losses = point_losses
        self.labels = list(labels)
        self.coordinates = coordinates

    @property
    def loss(self) -> np.ndarray:
        return self.metrics["loss"]

    def table(self) -> Table:
        """A `Table` with a row for each grid point: `x`, `y` and metrics."""
        x, y = np.meshgrid(self.x, self.y)
        return Table(
            {
                "x": x.ravel(),
                "y": y.ravel(),
                **{name: v.ravel() for name, v in self.metrics.items()},
            }
        )

    def plot(
        self,
        axis: Axis | None = None,
        metric: str = "loss",
        levels: int | Sequence[float] = 20,
    ) -> Axis:
        """Draws filled contours and the three points.

        Args:
            axis: Optional matplotlib axis. A new one by default.
            metric: The name of the metric to draw.
            levels: int, or the levels of the contours.

        Returns:
            The axis.
        """
        values = self.metrics[metric]
        axis = plotting.axis_or_new(axis)
        contours = axis.contourf(self.x, self.y, values, levels)
        axis.figure.colorbar(contours, ax=axis, label=metric)
        axis.plot(*self.points.T, "kx")
        for label, point in zip(self.labels, self.points):
            axis.annotate(
                label, point, xytext=(4, 4), textcoords="offset points"
            )
        axis.set_aspect("equal")
        if self.coordinates == "distance":
            axis.set_xlabel("distance in weight space")
        return axis

    def plot_surface(
        self, axis: Axis | None = None, metric: str = "loss"
    ) -> Axis:
        """Draws the loss as a surface in 3-D, with the three points on it.

        Args:
            axis: Optional matplotlib axis with `projection="3d"`. A new one by
                default.
            metric: The name of the metric to draw. The points are drawn at
                their losses, so with another metric they are left out.

        Returns:
            The axis.

        Raises:
            ImportError: If Matplotlib is not installed.
            ValueError: If `axis` is a flat one.
        """
        values = self.metrics[metric]
        axis = plotting.axis_or_new(axis, projection="3d")
        if not hasattr(axis, "plot_surface"):
            raise ValueError(
                "`axis` must be an axis in 3-D: make it by "
                '`figure.add_subplot(projection="3d")`. '
                f"Received: axis={axis!r}"
            )
        x, y = np.meshgrid(self.x, self.y)
        axis.plot_surface(x, y, values, cmap="viridis", alpha=0.8)
        if metric == "loss":
            for label, point, loss in zip(
                self.labels, self.points, self.point_losses
            ):
                axis.scatter(*point, loss, color="black")
                axis.text(*point, loss, label)
        axis.set_zlabel(metric)
        return axis

    def __repr__(self):
        return repr(
            Table(
                {
                    "point": self.labels,
                    "x": self.points[:, 0],
                    "y": self.points[:, 1],
                    "loss": self.point_losses,
                }
            )
        )


def mode_connectivity(
    model: keras.Model,
    points: Sequence[Any],
    x: Data,
    y: Data = None,
    *,
    resolution: int | tuple[int, int] = 11,
    margin: float = 0.25,
    labels: Sequence[str] = ("1", "2", "3"),
    coordinates: str = "distance",
    batch_size: int | None = None,
) -> LossPlane:
    """The compiled loss on the plane through three points in weight space.

    Two models are connected if a path of low loss leads from one to the other.
    By default the plane is spanned by `u = w2 - w1` and the part of `w3 - w1`
    orthogonal to it. The loss is that of `model.evaluate`. Afterwards the model
    has its former weights, bit for bit, also after an error. Each grid point
    costs an evaluation of all of `x`.

    Args:
        model: A compiled Keras model.
        points: Three points of one kind. They may be copies of kernels, see
            `kernels`, which may come from different methods; adapters of
            `model` are disabled while these are evaluated. They may also be
            values of `model.trainable_variables`, given as lists of arrays or
            as paths of adapter files that fit the one active adapter.
        x: Inputs, as `model.evaluate` takes them, but no generator, because
            they are read many times.
        y: Targets, if they are not in `x`.
        resolution: int, or `(columns, rows)`. The number of grid points along
            each axis.
        margin: float. The distance from the points to the edge of the grid, as
            a fraction of the points' extent.
        labels: Three names for the points.
        coordinates: `"distance"`, Euclidean distances in weight space, or
            `"triangle"`, those of the RandLoRA paper's figure 4: the points
            are at (0, 0), (1, 0) and (0.5, 1), and the weights at `(x, y)` are
            `(1 - x - y / 2) w1 + (x - y / 2) w2 + y w3`. In the figure these
            are LoRA, RandLoRA and full fine-tuning.
        batch_size: Optional int, for `model.evaluate`.

    Returns:
        A `LossPlane`. `plot` draws contours, and `plot_surface` draws in 3-D.

    Raises:
        TypeError: If `points` are of another or of different kinds, or `x` is
            a generator.
        ValueError: If the model is not compiled, if there are not three
            points, if they lie on one line, or if a shape or a key does not
            fit the model.

    Example:

    ```python
    points = []
    for seed in range(3):
        adapter = kra.LoRA(2, seed=seed)
        kra.inject(model, adapter, keep_trainable="logits")
        model.fit(x, y, verbose=0)
        points.append(kra.analysis.kernels(model))
        kra.eject(model)
    plane = kra.analysis.mode_connectivity(model, points, x, y, resolution=3)
    plane.plot()
    ```

    References:
        - [Garipov et al., 2018](https://arxiv.org/abs/1802.10026), appendix A:
          the plane.
        - [RandLoRA](https://arxiv.org/abs/2502.00987), figure 4.
    """
    shape = _check_arguments(model, points, x, resolution, margin, labels)
    arguments.check_choice(coordinates, COORDINATES, "coordinates")
    with contextlib.ExitStack() as stack:
        if all(isinstance(point, dict) for point in points):
            if state_lib.is_adapted(model):
                state_lib.check_no_block(model)
            points = _check_kernel_points(model, points)
            plane = plane_lib.Plane(points, coordinates)
            if state_lib.is_adapted(model):
                stack.enter_context(switch.disabled(model))
            layers = state_lib.layers_of(model)
            variables = [
                keyed_weights.variable(layers, key) for key in points[0]
            ]
            stack.enter_context(point_values.restored(model, variables))

            def write(values):
                for key, value in values.items():
                    keyed_weights.write(layers, key, value)
        else:
            points = _check_trainable_points(model, points)
            plane = plane_lib.Plane(points, coordinates)
            variables = list(model.trainable_variables)
            stack.enter_context(point_values.restored(model, variables))

            def write(values):
                for variable, value in zip(variables, values.values()):
                    variable.assign(value)

        def evaluate(values):
            write(values)
            logs = model.evaluate(
                x, y, batch_size=batch_size, verbose=0, return_dict=True
            )
            return {name: float(value) for name, value in logs.items()}

        # The points themselves are evaluated, and not their coordinates in the
        # plane, so that their losses are exactly those of `evaluate`.
        point_losses = np.array([evaluate(p)["loss"] for p in points])
        grid_x, grid_y = plane.grid(shape, margin)
        logs = [evaluate(plane.at(a, b)) for b in grid_y for a in grid_x]
    metrics = {
        name: np.array([log[name] for log in logs]).reshape(shape[::-1])
        for name in logs[0]
    }
    return LossPlane(
        grid_x, grid_y, metrics, plane.points, point_losses, labels, coordinates
    )


# Checks.


def _check_arguments(model, points, x, resolution, margin, labels):
    """Validates the other arguments and returns `(columns, rows)`."""
    state_lib.check_is_model(model)
    if not getattr(model, "compiled", False):
        raise ValueError(
            f"Model '{model.name}' is not compiled, so it has no loss: call "
            "`model.compile(loss=...)` first."
        )
    if not isinstance(points, (list, tuple)) or len(points) != 3:
        raise ValueError(
            "`points` must be a list of three points. Received: "
            + (
                f"{len(points)} points"
                if isinstance(points, (list, tuple))
                else f"points of type {type(points).__name__}"
            )
        )
    if inspect.isgenerator(x):
        raise TypeError(
            "`x` is read once for each grid point, and a generator can be "
            "read only once: give arrays or a data set."
        )
    shape = resolution
    if not isinstance(shape, (tuple, list)):
        shape = (resolution, resolution)
    if len(shape) != 2 or not all(
        isinstance(n, (int, np.integer)) and n >= 2 for n in shape
    ):
        raise ValueError(
            "`resolution` must be an integer of at least 2, or two of them. "
            f"Received: resolution={resolution!r}"
        )
    if arguments.check_scaling(margin, "margin") < 0:
        raise ValueError(
            f"`margin` must not be negative. Received: margin={margin!r}"
        )
    if not isinstance(labels, (list, tuple)) or len(labels) != 3:
        raise ValueError(
            f"`labels` must name three points. Received: labels={labels!r}"
        )
    return tuple(int(n) for n in shape)


def _check_kernel_points(model, points):
    layers = state_lib.layers_of(model)
    keys = list(points[0])
    keyed_weights.check_keys(layers, keys)
    for i, point in enumerate(points):
        if set(point) != set(keys):
            different = sorted(set(point) ^ set(keys))
            raise ValueError(
                f"`points[{i}]` and `points[0]` must have the same keys; they "
                f"differ in {different[:5]}. Copy one model's kernels with "
                "the keys of the other: `kernels(model, keys)`."
            )
        for key in keys:
            if "#" not in key and layers[key].quantization_mode is not None:
                raise ValueError(
                    f"The kernel of '{key}' is quantized to "
                    f"'{layers[key].quantization_mode}', which can't hold "
                    "the points between two models. Use a float model."
                )
            expected = keyed_weights.shape(layers, key)
            if np.shape(point[key]) != expected:
                raise ValueError(
                    f"`points[{i}]['{key}']` must have shape {expected}. "
                    f"Received: shape {np.shape(point[key])}"
                )
    return [
        {key: np.asarray(p[key], "float64") for key in keys} for p in points
    ]


def _check_trainable_points(model, points):
    values = []
    for i, point in enumerate(points):
        found = point_values.read(
            model,
            point,
            f"points[{i}]",
            "`points` must all be dicts of kernels (see `kernels`), or all",
        )
        values.append(dict(enumerate(found)))
    return values
