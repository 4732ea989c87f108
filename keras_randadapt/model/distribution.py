"""Checks that new variables live where a model's variables do."""

import keras

from keras_randadapt import _compat


def check_scope(model):
    """Raises `ValueError` outside of the `tf.distribute` scope of a model.

    Every function that creates variables for a model calls it before it
    changes anything. It raises also inside of a scope that is not the model's.

    Args:
        model: A built Keras model.
    """
    if keras.config.backend() != "tensorflow":
        return
    import tensorflow as tf

    current = (
        tf.distribute.get_strategy() if tf.distribute.has_strategy() else None
    )
    own = _strategy_of(model)
    if own is not None and own is not current:
        raise ValueError(
            f"Model '{model.name}' was built under a tf.distribute strategy "
            f"({type(own).__name__}), and variables created outside of its "
            "scope can't be trained with it. Make this call, of `inject` for "
            "example, in `with strategy.scope():`, with the strategy that the "
            "model was built under."
        )
    if own is None and current is not None and current.num_replicas_in_sync > 1:
        raise ValueError(
            f"Model '{model.name}' was built outside of the scope of the "
            f"tf.distribute strategy ({type(current).__name__}) that is "
            "active, and variables created inside of it can't be trained "
            "with the model's. Build the model in this scope too, or make "
            "this call outside of it."
        )


def check_kernel(address, kernel):
    """Raises `ValueError` if a kernel is laid out and new weights are not.

    Args:
        address: A site's address.
        kernel: The variable of its kernel.
    """
    if keras.config.backend() != "jax":
        return
    if keras.distribution.distribution() is not None:
        return
    sharding = getattr(kernel.value, "sharding", None)
    if sharding is not None and len(sharding.device_set) > 1:
        raise ValueError(
            f"The kernel of '{address}' is laid out over "
            f"{len(sharding.device_set)} devices, but no distribution is "
            "active, so adapters would live on one device. Call `inject` "
            "under the same `keras.distribution` that built the model."
        )


def _strategy_of(model):
    """The strategy that a model's variables were created under, or `None`."""
    for layer in _compat.flatten_layers(model):
        for variable in _compat.owned_variables(layer):
            strategy = getattr(variable.value, "distribute_strategy", None)
            if strategy is not None:
                return strategy
    return None
