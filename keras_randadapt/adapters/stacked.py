"""First values and penalties of weights that experts have each for themselves.

Such a weight is one variable with an axis of experts in front.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Initializer
from keras_randadapt._types import Tensor


def first_values(
    initializer: Initializer,
    seed: int,
    role: str,
    shape: tuple[int, ...],
    stack: int | None,
) -> Initializer | Callable[..., Any]:
    """A Keras initializer of a weight.

    Args:
        initializer: See `Adapter.add_trainable`.
        seed: int. The seed of the values that this library draws.
        role: string that tells the weight from all others.
        shape: The shape of the weight, without the axis of experts.
        stack: Optional int, the number of experts.
    """
    own = arguments.own_initializer(initializer)
    if own is not None:
        kind, options = own
        roles = [role] if stack is None else _roles(role, stack)
        values = [
            arguments.initial_values(kind, seed, one, shape, **options)
            for one in roles
        ]
        array = values[0] if stack is None else np.stack(values)
        return lambda shape, dtype=None: ops.convert_to_tensor(
            array, dtype=dtype
        )
    if stack is None:
        return initializer
    of_one = keras.initializers.get(initializer)

    def of_experts(_: tuple[int, ...], dtype: str | None = None) -> Tensor:
        # A clone of an initializer without a seed draws other numbers.
        values = [of_one.clone()(shape, dtype=dtype) for _ in range(stack)]
        return ops.stack(values)

    return of_experts


def _roles(role, stack):
    return [f"{role}/{e}" for e in range(stack)]


class Penalty:
    """The sum of the penalties of the experts' weights.

    Args:
        regularizer: A Keras regularizer of one expert's weight.
    """

    def __init__(self, regularizer: keras.regularizers.Regularizer):
        self.regularizer = regularizer

    def __call__(self, weight: Tensor) -> Tensor:
        experts = range(weight.shape[0])
        return sum(self.regularizer(weight[e]) for e in experts)
