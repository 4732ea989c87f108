"""`Orthogonality`: keeps low-rank factors close to orthonormal."""

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor


@keras.saving.register_keras_serializable(package="keras_randadapt")
class Orthogonality(keras.regularizers.Regularizer):
    """The penalty `strength * ||G - I||_F^2` of a matrix.

    `G` is the Gram matrix of the rows or of the columns, whichever are fewer;
    in a low-rank factor there are `rank` of them. The penalty is zero if and
    only if they are orthonormal. For both factors of a low-rank adapter, it
    keeps the directions of the update distinct, so that the update's rank does
    not collapse.

    As a Keras regularizer it adds a term for each matrix to the model's
    losses. `fit` and custom loops that add `model.losses` apply it. At zero
    its gradient is zero, so the task moves a factor that starts at zero first.

    Args:
        strength: float, at least 0.

    Raises:
        ValueError: If `strength` is negative or not finite. When called, if
            the value is no matrix.

    Example:

    ```python
    adapter = kra.LoRA(8, regularizer=kra.regularizers.Orthogonality(0.1))
    kra.inject(model, adapter, ["query", "value"], keep_trainable="logits")
    ```

    References:
        - RM-LoRA ([arXiv 2407.12074](https://arxiv.org/abs/2407.12074)), the
          regularizer of algorithm 1, whose coefficient the paper leaves open.
    """

    def __init__(self, strength: float = 0.1):
        self.strength = arguments.check_non_negative(strength, "strength")

    def __call__(self, x: Tensor) -> Tensor:
        if len(x.shape) != 2:
            raise ValueError(
                "`Orthogonality` is a penalty on matrices, such as the "
                "factors of LoRA. Received a value of shape "
                f"{tuple(x.shape)}"
            )
        x = ops.cast(x, "float32")
        t = ops.transpose(x)
        rows, columns = x.shape
        gram = ops.matmul(x, t) if rows <= columns else ops.matmul(t, x)
        error = gram - ops.eye(min(rows, columns), dtype="float32")
        return self.strength * ops.sum(ops.square(error))

    def get_config(self) -> Config:
        return {"strength": self.strength}
