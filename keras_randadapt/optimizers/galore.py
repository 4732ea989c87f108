"""GaLore: full training with an optimizer state of low rank."""

import math
import re

import keras
import numpy as np
from keras import ops

from keras_randadapt import _compat
from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.optimizers import wrapper


@keras.saving.register_keras_serializable(package="keras_randadapt")
class GaLore(wrapper.OptimizerWrapper):
    """Gradient low-rank projection: whole kernels, small optimizer state.

    It is not an adapter, because it trains the kernels themselves. The
    gradient `G`, `(rows, columns)`, of each kernel is projected onto its
    `rank` leading singular vectors on the shorter side, `R = P' G` (or `G P`).
    The inner optimizer turns `R` into an update `N`, with moments of the same
    size, and the kernel changes by `scale * P N`. Every `update_interval`
    updates, a singular value decomposition of the gradient in float32 gives a
    new `P`; the moments are kept. (The largest entry of each vector is made
    positive, because random changes of sign would void the moments.)

    With `two_sided=True` both sides are projected: `R = P' G Q`, `(rank,
    rank)`, and the kernel changes by `scale * P N Q'`. This is the paper's
    definition 3.4, while its algorithm 2 projects one side. The state is
    smaller. At the first step `R` is diagonal but for rounding, which Adam
    would scale up to whole steps: give it an `epsilon` of 1e-4 or so times the
    size of the gradients.

    Adam's state for a kernel of 768 by 768 at rank 128 takes 393,216 numbers
    (`P`, two moments and as much room for `N`) instead of 1,179,648; see
    `state_bytes`.

    A kernel with more than two axes is projected as a matrix; its axes are
    split such that the matrix is as square as possible. Variables with fewer
    axes, and those that `paths` leaves out, are trained by the inner optimizer
    without a projection. Weight decay is decoupled and applied to the kernel.
    Clipping sees the projected gradients.

    Args:
        optimizer: The optimizer to wrap, not built, or a name. It may be any
            Keras optimizer without `use_ema`, except `Ftrl` and
            `ScheduleFreeAdamW`. Usual rates are 3e-5 to 1e-2. `Lamb` and
            `Adafactor` scale steps by the size of the trained values, but see
            zeros here.
        rank: int. If a kernel's shorter side is not longer than `rank`, the
            projection loses nothing.
        update_interval: int. The number of updates from one `P` to the next.
        scale: float. The factor `alpha` of the paper.
        two_sided: bool. Whether both sides are projected.
        paths: Optional string, a regular expression. Only variables whose
            paths match are projected.
        name: Optional string.

    Raises:
        TypeError: If `optimizer` is no Keras optimizer, or a rank or interval
            no integer.
        ValueError: If an argument is out of range, or if `optimizer` is built
            or a `LossScaleOptimizer`. At the first step, if there is nothing
            to project, or if the inner optimizer keeps moving averages.

    Example:

    ```python
    model.compile(
        kra.optimizers.GaLore("adamw", rank=4, update_interval=50),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, verbose=0)
    ```

    References:
        - Zhao et al., "GaLore", ICML 2024, algorithms 1 and 2 and definition
          3.4. Here moments
          have the size of `R`, and bias correction does not overwrite them.
    """

    changes_values = True

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        rank: int = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        paths: str | None = None,
        name: str | None = None,
        two_sided: bool = False,
    ):
        super().__init__(optimizer, name=name)
        if self.inner_optimizer.built:
            raise ValueError(
                "`optimizer` is built already, with state of full size: give "
                "a fresh one, or its name."
            )
        for one in wrapper.walk(self.inner_optimizer):
            if isinstance(one, GaLore):
                raise ValueError(
                    "`optimizer` must not hold another `GaLore`: a gradient "
                    "that is projected already can't be projected again."
                )
            if type(one).__name__ in _ABSOLUTE:
                raise ValueError(
                    f"`{type(one).__name__}` sets variables to new values "
                    "instead of changing them by a step, but `GaLore` can "
                    "project back only a step. Use another optimizer."
                )
        self.rank = arguments.check_rank(rank)
        self.update_interval = arguments.check_rank(
            update_interval, "update_interval"
        )
        self.scale = arguments.check_scaling(scale, "scale")
        self.two_sided = bool(two_sided)
        self.paths = None if paths is None else wrapper.check_paths(paths)
        self._projections = None

    def inner_variables(
        self, variables: list[keras.Variable]
    ) -> list[keras.Variable]:
        if self._projections is None:
            self._build_projections(variables)
        found = [self._projection_of(v) for v in variables]
        return [
            v if projection is None else projection.update
            for v, projection in zip(variables, found)
        ]

    def _build_projections(self, variables):
        self._projections = {}
        for variable in variables:
            if len(variable.shape) < 2:
                continue
            if re.search(self.paths or "", variable.path):
                projection = _Projection(variable, self.rank, self.two_sided)
                for one in projection.variables:
                    _compat.track_optimizer_variable(self, one)
                self._projections[id(variable)] = projection
        if not self._projections:
            raise ValueError(
                "`GaLore` found no matrix to project among the "
                f"{len(variables)} trained variables. Unfreeze the kernels "
                "that it is to train, or widen `paths`."
            )

    def _projection_of(self, variable):
        return self._projections.get(id(variable))

    def transform_gradients(
        self,
        gradients: list[Tensor | None],
        variables: list[keras.Variable],
        step: Tensor,
    ) -> list[Tensor | None]:
        # The interval counts micro-steps, since all micro-steps of an update
        # share a projection.
        micro_steps = self.gradient_accumulation_steps or 1
        interval = self.update_interval * micro_steps
        is_refreshed = ops.equal(
            ops.mod(ops.convert_to_tensor(_compat.iterations(self)), interval),
            0,
        )
        projected = []
        for gradient, variable in zip(gradients, variables, strict=True):
            projection = self._projection_of(variable)
            if projection is not None and gradient is not None:
                gradient = ops.convert_to_tensor(gradient)
                projection.refresh(gradient, is_refreshed)
                gradient = projection.project(gradient)
            projected.append(gradient)
        # The rates are read before the update, which advances schedules.
        self._decays = [self._decay(variable) for variable in variables]
        return projected

    def _decay(self, variable):
        """The weight decay of a kernel, times the rate, or `None`."""
        projection = self._projection_of(variable)
        if projection is None:
            return None
        leaf = wrapper.leaf_of(self.inner_optimizer, projection.update)
        decay = _compat.weight_decay(leaf, variable)
        if not decay:
            return None
        return decay * ops.cast(leaf.learning_rate, "float32")

    def after_update(
        self,
        variables: list[keras.Variable],
        before: list[Tensor | None],
        step: Tensor,
    ) -> None:
        is_update = self.is_update_step()
        decays = self._decays
        self._decays = None
        for variable, decay in zip(variables, decays, strict=True):
            projection = self._projection_of(variable)
            if projection is None:
                continue
            change = self.scale * projection.expand()
            if decay is not None:
                decayed = decay * ops.cast(variable, "float32")
                if is_update is not True:
                    decayed = ops.where(is_update, decayed, 0.0)
                change = change - decayed
            variable.assign_add(ops.cast(change, variable.dtype))
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
            update = projection.update
            update.assign(ops.zeros(update.shape, update.dtype))

    def state_bytes(self) -> int:
        """The size of the optimizer's state, in bytes, once it is built."""
        return sum(
            math.prod(v.shape) * np.dtype(_storage(v)).itemsize
            for v in self.variables
        )

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "rank": self.rank,
            "update_interval": self.update_interval,
            "scale": self.scale,
            "two_sided": self.two_sided,
            "paths": self.paths,
        }


#: Keras's optimizers that keep a position apart from the variable's value.
_ABSOLUTE = ("Ftrl", "ScheduleFreeAdamW")


class _Projection:
    """The low-rank space of one kernel.

    Attributes:
        left: Variable `(rows, rank)`, float32, or `None`: `P`.
        right: Variable `(columns, rank)`, float32, or `None`: `Q`.
        update: Variable of the size of a projected gradient, which the inner
            optimizer changes from zero to its update. It has the kernel's
            path, by which optimizers choose what to do with it.
    """

    def __init__(self, variable, rank, two_sided):
        self._shape = tuple(int(n) for n in variable.shape)
        self._rows, self._columns = _matrix_shape(self._shape)
        is_wide = self._rows <= self._columns
        rank = min(rank, self._rows, self._columns)
        self.left = self.right = None
        if two_sided or is_wide:
            self.left = _frozen((self._rows, rank))
        if two_sided or not is_wide:
            self.right = _frozen((self._columns, rank))
        small = (
            self._rows if self.left is None else rank,
            self._columns if self.right is None else rank,
        )
        folder, _, name = variable.path.rpartition("/")
        parent, _, scope = folder.rpartition("/")
        with keras.name_scope(scope or "model", override_parent=parent):
            self.update = keras.Variable(
                np.zeros(small, "float32"), autocast=False, name=name
            )

    @property
    def matrices(self):
        return [one for one in (self.left, self.right) if one is not None]

    @property
    def variables(self):
        return [*self.matrices, self.update]

    def refresh(self, gradient, is_refreshed):
        """Updates the projection from the gradient, if `is_refreshed`."""
        gradient = self._as_matrix(gradient)
        rank = int(self.matrices[0].shape[1])

        def leading():
            u, _, v = ops.svd(gradient, full_matrices=False)
            found = []
            if self.left is not None:
                found.append(u[:, :rank])
            if self.right is not None:
                found.append(ops.transpose(v)[:, :rank])
            return tuple(map(_with_signs, found))

        now = tuple(ops.convert_to_tensor(one) for one in self.matrices)
        # Gradients that are not finite have no singular vectors, and PyTorch
        # would raise an error.
        is_finite = ops.all(ops.isfinite(gradient))
        is_refreshed = ops.logical_and(is_refreshed, is_finite)
        found = ops.cond(is_refreshed, leading, lambda: now)
        for variable, value in zip(self.matrices, found):
            variable.assign(value)

    def project(self, gradient):
        gradient = self._as_matrix(gradient)
        if self.left is not None:
            left = ops.convert_to_tensor(self.left)
            gradient = ops.matmul(ops.transpose(left), gradient)
        if self.right is not None:
            gradient = ops.matmul(gradient, ops.convert_to_tensor(self.right))
        return gradient

    def expand(self):
        """The update of the kernel, in its own shape, float32."""
        full = ops.convert_to_tensor(self.update)
        if self.left is not None:
            full = ops.matmul(ops.convert_to_tensor(self.left), full)
        if self.right is not None:
            right = ops.convert_to_tensor(self.right)
            full = ops.matmul(full, ops.transpose(right))
        return ops.reshape(full, self._shape)

    def _as_matrix(self, gradient):
        gradient = ops.cast(gradient, "float32")
        return ops.reshape(gradient, (self._rows, self._columns))


def _frozen(shape):
    return keras.Variable(
        np.zeros(shape, "float32"),
        trainable=False,
        autocast=False,
        name="projection",
    )


def _with_signs(vectors):
    """Singular vectors of which the largest entry is positive.

    Their signs are arbitrary, but moments depend on them.
    """
    largest = ops.take_along_axis(
        vectors,
        ops.expand_dims(ops.argmax(ops.abs(vectors), axis=0), 0),
        axis=0,
    )
    return vectors * ops.sign(largest)


def _matrix_shape(shape):
    """The most nearly square matrix shape that splits the axes in two."""
    splits = [
        (math.prod(shape[:i]), math.prod(shape[i:]))
        for i in range(1, len(shape))
    ]
    return min(splits, key=lambda split: abs(math.log(split[0] / split[1])))


def _storage(variable):
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return "float16" if dtype == "bfloat16" else dtype
