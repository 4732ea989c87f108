"""Which weights of an adapted model are trained, and by which optimizer."""

import functools

from keras_randadapt import _compat
from keras_randadapt.model.state import is_adapted
from keras_randadapt.optimizers import wrapper


def apply_trainable(model):
    """Freezes all of a model but its active adapters and their kept layers."""
    state = model._randadapt
    for layer in _compat.flatten_layers(model):
        if layer is model:
            for variable in _compat.owned_variables(layer):
                variable.trainable = False
        elif _compat.owned_variables(layer):
            # The layer and not only its variables: a frozen
            # BatchNormalization must also stop moving its statistics.
            layer.trainable = False
    for name in state.active:
        record = state.records[name]
        for adapter in state.adapters(name).values():
            adapter.trainable = True
        for address in record.kept:
            state.layers[address].trainable = True


def release(model):
    """Takes off what callbacks attached to the model."""
    if is_adapted(model):
        for detach in list(model._randadapt.attachments):
            detach()


def wrapped_optimizer(model, optimizer, names):
    """An optimizer, wrapped as active adapters ask for it.

    Args:
        model: A model that is or was adapted.
        optimizer: The optimizer that it is compiled with, or `None`.
        names: Names of the active adapters.

    Returns:
        An optimizer: the same one if it is wrapped as asked already. `None`
        for `None`.
    """
    if optimizer is None:
        return None
    wraps = [
        functools.partial(
            model._randadapt.records[name].template.wrap_optimizer, name=name
        )
        for name in names
    ]
    return wrapper.attach(optimizer, wraps)


def wrap_optimizer(model):
    """Wraps a compiled model's optimizer as its active adapters ask for it."""
    state = model._randadapt
    if state.block == "disabled":
        # The end of the block needs the optimizer as it was.
        return
    optimizer = getattr(model, "optimizer", None)
    wrapped = wrapped_optimizer(model, optimizer, state.active)
    if wrapped is not optimizer:
        model.optimizer = wrapped
