"""Checks of the arguments of `PACBayes` and of the model."""

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.model import state as state_lib
from keras_randadapt.per_example import example_source
from keras_randadapt.regularizers import pac_bayes


def check_one_device(model):
    if keras.config.backend() == "torch":
        from torch.nn.parallel import DistributedDataParallel

        if isinstance(model, DistributedDataParallel):
            _refuse_devices("torch's DistributedDataParallel")
    if keras.config.backend() == "tensorflow":
        state_lib.check_is_model(model)
        replicas = model.distribute_strategy.num_replicas_in_sync
        if replicas > 1:
            _refuse_devices(f"a tf.distribute strategy of {replicas} replicas")
    distribution = keras.distribution.distribution()
    if distribution is not None and keras.config.backend() != "jax":
        _refuse_devices(f"a {type(distribution).__name__}")


def _refuse_devices(what):
    raise ValueError(
        f"`PACBayes` does not work with {what}: every device would estimate "
        "by itself. Train on one device, or on JAX, where "
        "`keras.distribution` is supported."
    )


def check_strength(name, value):
    try:
        if isinstance(value, (str, bool)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"`{name}` must be a number, at least 0; `y` is given before "
            f"`strength`. Received: {name}={example_source._short(value)}"
        ) from None
    if not 0 <= number < float("inf"):
        raise ValueError(
            f"`{name}` must be finite and at least 0. "
            f"Received: {name}={value!r}"
        )
    return number


def check_count(name, value, otherwise=""):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"`{name}` must be an integer {otherwise}".rstrip()
            + f". Received: {name}={value!r} (of type {type(value).__name__})"
        )
    if value < 1:
        raise ValueError(
            f"`{name}` must be at least 1. Received: {name}={value}"
        )
    return int(value)


def regularized_weights(model, state, head_strength):
    """The regularized weights of adapters and those of kept layers."""
    sites = state.trainable_by_site()
    if not sites:
        raise ValueError(
            f"Model '{model.name}' has no active adapter with trainable "
            "weights to regularize. Active: "
            f"{list(state.active)}. See `keras_randadapt.set_active`."
        )
    heads = {}
    if head_strength:
        for name in state.active:
            for address in state.records[name].kept:
                heads[address] = list(state.layers[address].trainable_variables)
        if not heads:
            raise ValueError(
                "`head_strength` is for the layers of `keep_trainable`, "
                f"of which model '{model.name}' has none. Received: "
                f"head_strength={head_strength}"
            )
    return pac_bayes.FlatWeights(sites), pac_bayes.FlatWeights(heads)


def new_penalty(callback, weights, heads):
    """The penalty of a `PACBayes` callback.

    Args:
        callback: The callback.
        weights: `FlatWeights` of the adapters.
        heads: `FlatWeights` of the kept layers.
    """
    owner = weights.variables[0].path.rpartition("/adapter/")[0]
    with _compat.name_scope("pac_bayes", f"{owner}/adapter"):
        return pac_bayes.PACBayesPenalty(
            weights,
            heads,
            samples=callback.samples,
            strength=callback.strength,
            head_strength=callback.head_strength,
            mode=callback.mode,
            blocks=callback.blocks,
            reduction=callback.reduction,
            reference=callback.reference,
        )
