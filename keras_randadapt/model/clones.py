"""Lets configs and clones of layers have the flags of before injection.

`keras.models.clone_model` makes a layer anew from its `get_config()`, which
contains the `trainable` flag. An adapted model has frozen layers, and its clone
has no adapters: it would be a model that trains nothing.
"""

import types

# The attribute of a layer that holds its flag of before injection.
_FLAG = "_randadapt_trainable"


def keep_flags(change, layer_flags):
    """Makes configs of layers tell their `trainable` flags of before.

    Args:
        change: A `transaction.Change`.
        layer_flags: `(layer, flag)` pairs.
    """
    for layer, flag in layer_flags:
        if layer is not change.model and "get_config" not in vars(layer):
            change.set(layer, _FLAG, flag)
            change.set(layer, "get_config", types.MethodType(_config, layer))


def forget_flags(change, layer_flags):
    """Undoes `keep_flags`."""
    for layer, _ in layer_flags:
        if _FLAG in vars(layer):
            change.unset(layer, "get_config")
            change.unset(layer, _FLAG)


def _config(layer):
    config = type(layer).get_config(layer)
    if "trainable" in config:
        config = {**config, "trainable": vars(layer)[_FLAG]}
    return config
