"""State of the base model that training moves, such as a running mean.

A frozen model may still change in training: a layer of a user's may keep a
running mean, and Keras's `SpectralNormalization` divides the kernel that it
wraps by its norm in every step. What training moved belongs to the adapter that
was trained, as the values of kept layers do: the adapter's file has it, and
`eject` and `disabled` give the base model its own values back.
"""

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.sites import linear
from keras_randadapt.sites.kernel_site import KernelSite


def find(layers):
    """The variables that a training step may move although they are frozen.

    They are the weights that are not trainable by nature. Quantized kernels
    are left out, and so is the state of recurrent layers, which belongs to a
    batch and not to the model.

    Args:
        layers: dict from structural address to layer of a model.

    Returns:
        dict from `"<address>#<number among the layer's variables>"` to
        variable.
    """
    wrapped = {
        id(variable)
        for layer in layers.values()
        if isinstance(layer, keras.layers.SpectralNormalization)
        for variable in layer.weights
    }
    found, seen = {}, set()
    for address, layer in layers.items():
        if isinstance(layer, (keras.layers.RNN, KernelSite)):
            continue
        if getattr(layer, "quantization_mode", None) is not None:
            continue
        trainable = {id(v) for v in _compat.trainable_by_nature(layer)}
        for i, variable in enumerate(_compat.owned_variables(layer)):
            moves = id(variable) not in trainable or id(variable) in wrapped
            if moves and id(variable) not in seen:
                seen.add(id(variable))
                found[f"{address}#{i}"] = variable
    return found


def movable(state):
    """`state.moving` without the variables of kept layers.

    The values of kept layers are switched as a whole.
    """
    kept = {a for record in state.records.values() for a in record.kept}
    if not kept:
        return state.moving
    return {
        key: variable
        for key, variable in state.moving.items()
        if not linear.is_below(key.rpartition("#")[0], kept)
    }


def values_now(state):
    """Copies of the present values, by key."""
    return {
        key: np.array(keras.ops.convert_to_numpy(variable))
        for key, variable in movable(state).items()
    }


def base_values(state):
    """The base model's values, by key."""
    if state.base_moving is None:
        # A whole-model file of an earlier version has no other values.
        state.base_moving = values_now(state)
    return state.base_moving


def values_with(state, names):
    """The values that the model has with adapters of these names.

    Several adapters that are active together have one state, which is that of
    the first of them that was trained.

    Args:
        state: An `AdaptedState`.
        names: Names of adapters.

    Returns:
        dict from key to array, or `None` for the present values.
    """
    for name in names:
        if name in state.active:
            return None
        if state.records[name].moving is not None:
            return state.records[name].moving
    return base_values(state) if state.active else None


def switch(change, names):
    """Keeps the values of the active adapters and takes those of others.

    Args:
        change: A `transaction.Change`.
        names: Names of the adapters that are to be active.
    """
    state = change.model._randadapt
    if not state.moving:
        return
    base = base_values(state)
    now = values_now(state)
    if state.active:
        moved = now if differ(now, base) else None
        for name in state.active:
            change.set(state.records[name], "moving", moved)
    else:
        change.set(state, "base_moving", {**base, **now})
        base = state.base_moving
    target = base
    for name in reversed(names):
        if state.records[name].moving is not None:
            target = state.records[name].moving
    for key, variable in movable(state).items():
        if key in target and not np.array_equal(target[key], now[key]):
            change.assign(variable, target[key])


def restore(state, names):
    """Gives variables the values that `switch` kept for adapters.

    It may be repeated after an interruption.

    Args:
        state: An `AdaptedState`.
        names: Names of the adapters that were active.
    """
    target = state.base_moving
    for name in reversed(names):
        if state.records[name].moving is not None:
            target = state.records[name].moving
    for key, variable in movable(state).items():
        if key in (target or {}):
            variable.assign(target[key])


def moved_by(state, name):
    """What an adapter's training moved: dict from key to array."""
    if not state.moving:
        return {}
    if name in state.active:
        values = values_now(state)
    else:
        values = state.records[name].moving or {}
    base = base_values(state)
    return {
        key: value
        for key, value in values.items()
        if key in base and not np.array_equal(value, base[key])
    }


def differ(values, base):
    """Whether values are other than those of the base model."""
    return any(
        key not in base or not np.array_equal(value, base[key])
        for key, value in values.items()
    )
