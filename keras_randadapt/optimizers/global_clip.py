"""Clipping by the norm of all gradients, whatever optimizers they go to."""

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.optimizers.wrapper import OptimizerWrapper


@keras.saving.register_keras_serializable(package="keras_randadapt")
class ClipByGlobalNorm(OptimizerWrapper):
    """Scales all gradients down where their common norm is too large.

    Keras's own `global_clipnorm` clips within one optimizer. In a
    `MultiOptimizer` each group would be clipped by itself, which changes the
    direction of the step. `learning_rate_groups` therefore puts this around the
    groups if the optimizer that it is given has a `global_clipnorm`.

    Args:
        optimizer: The optimizer to wrap; see `OptimizerWrapper`.
        global_clipnorm: float above 0. The largest norm that all gradients
            together keep.
        name: Optional string.

    Raises:
        ValueError: If `global_clipnorm` is no number above 0.

    Example:

    ```python
    groups = kra.optimizers.learning_rate_groups(model, "adamw", adapter=5e-2)
    model.compile(kra.optimizers.ClipByGlobalNorm(groups, 1.0), "mse")
    ```
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        global_clipnorm: float,
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        self.norm = arguments.check_scaling(global_clipnorm, "global_clipnorm")
        if self.norm <= 0:
            raise ValueError(
                "`global_clipnorm` must be above 0. "
                f"Received: global_clipnorm={global_clipnorm}"
            )

    def transform_gradients(
        self,
        gradients: list[Tensor | None],
        variables: list[keras.Variable],
        step: Tensor,
    ) -> list[Tensor | None]:
        tensors = [
            None if gradient is None else ops.convert_to_tensor(gradient)
            for gradient in gradients
        ]
        square = sum(
            ops.sum(ops.square(ops.cast(tensor, "float32")))
            for tensor in tensors
            if tensor is not None
        )
        scale = self.norm / ops.maximum(ops.sqrt(square), self.norm)
        return [
            None if tensor is None else tensor * ops.cast(scale, tensor.dtype)
            for tensor in tensors
        ]

    def get_config(self) -> Config:
        return {**super().get_config(), "global_clipnorm": self.norm}
