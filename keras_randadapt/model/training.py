"""The trainable flags and the optimizer of an adapted model."""

import functools

from keras_randadapt import _compat
from keras_randadapt.model.state import is_adapted
from keras_randadapt.optimizers import automatic


def apply_trainable(model):
    """Freezes a model except the trained adapters and their kept layers."""
    state = model._randadapt
    for layer in _compat.flatten_layers(model):
        if layer is model:
            for variable in _compat.owned_variables(layer):
                variable.trainable = False
        elif _compat.owned_variables(layer):
            # The layer is frozen, and not only its variables, because a frozen
            # BatchNormalization must not update its statistics.
            layer.trainable = False
    for name in state.trained:
        record = state.records[name]
        for adapter in state.adapters(name).values():
            adapter.trainable = True
        for address in record.kept:
            state.layers[address].trainable = True


def release(model):
    """Removes what callbacks attached to the model."""
    if is_adapted(model):
        for detach in list(model._randadapt.attachments):
            detach()


def wrapped_optimizer(model, optimizer, names):
    """An optimizer inside the wrappers of the active adapters.

    Args:
        model: A model that is or was adapted.
        optimizer: The optimizer that it is compiled with, or `None`.
        names: Names of the active adapters.

    Returns:
        An optimizer. It is the same one if it has these wrappers already.
        `None` for `None`.
    """
    if optimizer is None:
        return None
    wraps = [
        functools.partial(
            model._randadapt.records[name].template.wrap_optimizer, name=name
        )
        for name in names
    ]
    return automatic.attach(optimizer, wraps)


def wrap_optimizer(model):
    """Puts a model's optimizer inside the wrappers of the active adapters."""
    state = model._randadapt
    if state.block in ("disabled", "active"):
        # The end of the block restores the former optimizer.
        return
    optimizer = getattr(model, "optimizer", None)
    wrapped = wrapped_optimizer(model, optimizer, state.trained)
    if wrapped is not optimizer:
        model.optimizer = wrapped
