"""Values of the trainable variables: from files, and restored after use."""

import contextlib
import os

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.analysis import keyed_weights
from keras_randadapt.model import load
from keras_randadapt.model import state as state_lib


def read(model, point, argument, must_be):
    """float64 values of the trainable variables at a point in weight space.

    Args:
        model: A Keras model.
        point: A list of values, or the path of an adapter file.
        argument: The name of the point, for errors.
        must_be: The beginning of the error for a point of another type.

    Returns:
        list of arrays, one for each of `model.trainable_variables`.
    """
    if state_lib.is_adapted(model):
        state_lib.check_no_block(model)
    if isinstance(point, (str, os.PathLike)):
        point = of_file(model, point)
    if not isinstance(point, (list, tuple)):
        raise TypeError(
            f"{must_be} lists of values of `model.trainable_variables` or "
            f"paths of adapter files. Received: {argument} of type "
            f"{type(point).__name__}"
        )
    shapes = [tuple(np.shape(value)) for value in point]
    expected = [tuple(v.shape) for v in model.trainable_variables]
    if shapes != expected:
        raise ValueError(
            f"`{argument}` must hold a value for each of the model's "
            f"{len(expected)} trainable variables, of their shapes "
            f"{expected[:5]}. Received: {len(shapes)} values of shapes "
            f"{shapes[:5]}"
        )
    return [np.asarray(keyed_weights.as_numpy(v), "float64") for v in point]


def of_file(model, path):
    """Values of the trainable variables after loading an adapter file."""
    state = state_lib.state_of(model)
    if len(state.active) != 1:
        raise ValueError(
            "Adapter files are points of a model with one active adapter. "
            f"Active: {list(state.active)}. Call "
            "`keras_randadapt.set_active(model, name)`."
        )
    with restored(model, list(model.trainable_variables)):
        load.load_adapter(model, path, name=state.active[0])
        return [keyed_weights.as_numpy(v) for v in model.trainable_variables]


@contextlib.contextmanager
def restored(model, variables):
    """Restores the variables' values at the end of a block.

    On JAX, `evaluate` removes the values of all variables while it runs and
    does not put them back after an error, so all are restored there.
    """
    if keras.config.backend() == "jax":
        variables = {id(v): v for v in [*variables, *model.variables]}.values()
    values = [
        (variable, keyed_weights.as_numpy(variable)) for variable in variables
    ]
    try:
        yield
    finally:
        _compat.forget_jax_state(model)
        for variable, value in values:
            variable.assign(value)
