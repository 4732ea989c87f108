"""Which weights of an adapted model are trained, and by which optimizer."""

import functools

from keras_randadapt import _compat
from keras_randadapt.model.state import is_adapted
from keras_randadapt.optimizers import wrapper


def apply_trainable(model):
    """Freezes all of a model but its active adapters and their kept layers."""
    # What callbacks attached was for the weights that were trained so far.
    release(model)
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


def wrap_optimizer(model):
    """Wraps a compiled model's optimizer as its active adapters ask for it."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    wraps = []
    if is_adapted(model):
        state = model._randadapt
        if state.block == "disabled":
            # The end of the block needs the optimizer as it was.
            return
        for name in state.active:
            template = state.records[name].template
            wraps.append(functools.partial(template.wrap_optimizer, name=name))
    wrapped = wrapper.attach(optimizer, wraps)
    if wrapped is not optimizer:
        model.optimizer = wrapped
