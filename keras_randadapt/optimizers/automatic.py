"""Wrappers that adapters ask for, rather than the user."""

import keras

from keras_randadapt.optimizers.wrapper import OptimizerWrapper


def attach(optimizer, wraps):
    """Puts the wrappers of adapters around an optimizer.

    Earlier automatic wrappers are removed if no adapter needs them any more;
    the user's wrappers stay. A `LossScaleOptimizer` stays outermost. The state
    of the user's optimizer is kept.

    Args:
        optimizer: The optimizer with which a model was compiled.
        wraps: list of functions. Each takes an optimizer and returns it,
            wrapped or unchanged.

    Returns:
        An optimizer. It is the same one if it has these wrappers already.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = attach(optimizer.inner_optimizer, wraps)
        if inner is optimizer.inner_optimizer:
            return optimizer
        # A new object is made, because the user's own must not be changed.
        config = optimizer.get_config()
        config.pop("inner_optimizer")
        return type(optimizer)(inner, **config)
    found = []
    bare = optimizer
    while isinstance(bare, OptimizerWrapper) and bare.automatic:
        found.append(_own_config(bare))
        bare = bare.inner_optimizer
    asked = []
    wrapped = bare
    for wrap in wraps:
        outer = wrap(wrapped)
        if outer is not wrapped:
            outer.automatic = True
            asked.insert(0, _own_config(outer))
        wrapped = outer
    return optimizer if asked == found else wrapped


def _own_config(wrapper):
    """The class and config of a wrapper, without its inner optimizer."""
    config = wrapper.get_config()
    del config["optimizer"], config["name"]
    return type(wrapper), config
