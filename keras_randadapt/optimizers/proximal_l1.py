"""Proximal steps of an L1 penalty, which make values exactly zero."""

import re

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.optimizers import wrapper


@keras.saving.register_keras_serializable(package="keras_randadapt")
class ProximalL1(wrapper.OptimizerWrapper):
    """Applies the proximal step of an L1 penalty after each update.

    A value `v` that the inner optimizer computes becomes the soft threshold
    `sign(v) max(|v| - rate * strength, 0)`, where `rate` is the learning rate
    of the step. Unlike with a penalty in the loss, values become exactly zero,
    and adaptive rates do not change how fast. Adam moves a value by about
    `rate` in a step; with strengths from 0 to 1, the threshold cancels that
    part of a steady movement.

    These values get no weight decay, which would be a second penalty.

    `SoRA` puts this wrapper around the optimizer of a compiled model.

    Args:
        optimizer: The optimizer to wrap: any Keras optimizer without
            `use_ema`, including the result of `learning_rate_groups`, or a
            name.
        strength: float, at least 0. The strength of the penalty.
        paths: string, a regular expression. Variables whose paths match are
            thresholded. The default matches the gates of `SoRA`.
        name: Optional string.

    Raises:
        TypeError: If `optimizer` is no Keras optimizer.
        ValueError: If an argument is out of range or `optimizer` is a
            `LossScaleOptimizer`. At the first step, if no variable matches
            `paths`, or if the inner optimizer keeps moving averages.

    Example:

    ```python
    optimizer = kra.optimizers.ProximalL1("adamw", 0.1, paths="embeddings$")
    ```

    References:
        - Parikh and Boyd, "Proximal algorithms", 2014, section 6.5.2.
        - Ding et al., "Sparse low-rank adaptation", EMNLP 2023, equation 8.
          The threshold is soft, as in the paper; the reference code sets all
          values up to twice the threshold to zero.
    """

    changes_values = True

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        strength: float,
        paths: str = "/adapter/.*/gate$",
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        self.strength = arguments.check_non_negative(strength, "strength")
        self.paths = wrapper.check_paths(paths)

    def build_state(self, variables: list[keras.Variable]) -> None:
        found = {
            i: v
            for i, v in enumerate(variables)
            if re.search(self.paths, v.path)
        }
        if not found:
            raise ValueError(
                f"`ProximalL1` found no variable that matches `paths`="
                f"{self.paths!r} among the {len(variables)} trained ones."
            )
        # Rates are stored by place, so that variables can come in any order.
        self._rate_of = {}
        for i, variable in found.items():
            leaf = wrapper.leaf_of(self.inner_optimizer, variable)
            _compat.exclude_from_weight_decay(leaf, [variable])
            self._rate_of[i] = leaf

    # Otherwise TensorFlow would track the rates as state of this optimizer.
    @_compat.no_automatic_dependency_tracking
    def transform_gradients(
        self,
        gradients: list[Tensor | None],
        variables: list[keras.Variable],
        step: Tensor,
    ) -> list[Tensor | None]:
        # The rates are read before the update, which advances schedules.
        self._rates = {
            place: ops.convert_to_tensor(leaf.learning_rate)
            for place, leaf in self._rate_of.items()
        }
        return gradients

    def after_update(
        self,
        variables: list[keras.Variable],
        before: list[Tensor | None],
        step: Tensor,
    ) -> None:
        is_update = self.is_update_step()
        rates = self._rates
        self._rates = None
        for variable in variables:
            rate = rates.get(_compat.variable_index(self, variable))
            if rate is None:
                continue
            value = ops.convert_to_tensor(variable)
            threshold = ops.cast(rate * self.strength, value.dtype)
            shrunk = ops.sign(value) * ops.relu(ops.abs(value) - threshold)
            if is_update is not True:
                shrunk = ops.where(is_update, shrunk, value)
            variable.assign(shrunk)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "strength": self.strength,
            "paths": self.paths,
        }
