"""`learning_rate_groups`: different learning rates for adapters and heads."""

import re
from typing import TypeAlias

import keras

from keras_randadapt import _compat
from keras_randadapt import arguments
from keras_randadapt.model import state as state_lib
from keras_randadapt.optimizers.global_clip import ClipByGlobalNorm
from keras_randadapt.optimizers.wrapper import OptimizerWrapper

Rate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule

_ADAPTER = r"(.*/)?adapter/.*"
_LORA_B = r"(.*/)?adapter/.*/lora_b"


def learning_rate_groups(
    model: keras.Model,
    optimizer: str | keras.optimizers.Optimizer = "adamw",
    *,
    adapter: Rate | None = None,
    head: Rate = 1e-3,
    lora_b: Rate | None = None,
) -> keras.optimizers.Optimizer:
    """Builds an optimizer with one rate for adapters and one for the rest.

    Randomized adapters learn at rates ten to a hundred times those of a
    classification head. This function gives each group an optimizer of the
    same class and settings, inside Keras's `MultiOptimizer`. Pass the result
    to `model.compile`.

    `MultiOptimizer` has no `learning_rate` attribute. Schedules are therefore
    given here. Keras's callbacks for learning rates change every group, and
    `optimizer.optimizers` lists the inner optimizers.

    Args:
        model: An adapted model. Its other trainable weights, those of
            `keep_trainable`, get the head rate.
        optimizer: A Keras optimizer, or the name of one. Its own learning
            rate is not used.
        adapter: float or `LearningRateSchedule`. The adapters' rate. The
            default is the active adapters' `recommended_learning_rate`, which
            is meant for AdamW.
        head: float or `LearningRateSchedule`. The rate of all other weights.
        lora_b: Optional float or `LearningRateSchedule`. The rate of the
            matrices `B` of LoRA and its relatives. The default is that of
            `adapter`. LoRA+ (Hayou et al., ICML 2024, section 4) makes it 16
            times as large, because `B` starts at zero and `A` does not.

    Returns:
        A `keras.optimizers.MultiOptimizer` of optimizers called "head",
        "adapter" and, with `lora_b`, "lora_b", or a `ClipByGlobalNorm` around
        it if `optimizer` has a `global_clipnorm`.

    Raises:
        TypeError: If `optimizer` is no Keras optimizer.
        ValueError: If a rate is negative or no number, if the model has no
            adapter, if `optimizer` is built or contains other optimizers, if
            the model has a trained layer that is called "adapter", if
            `adapter` is left out and the active adapters do not recommend one
            rate, or if `lora_b` is given and no active adapter has such
            matrices.
        NotImplementedError: If this Keras has no `MultiOptimizer`.

    Example:

    ```python
    model.compile(
        optimizer=kra.optimizers.learning_rate_groups(
            model, "adamw", adapter=5e-2, head=1e-3
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    ```
    """
    state = state_lib.state_of(model)
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        raise NotImplementedError(
            "`learning_rate_groups` uses `keras.optimizers.MultiOptimizer`, "
            f"which Keras {keras.version()} does not have. Upgrade Keras."
        )
    if isinstance(optimizer, str):
        optimizer = keras.optimizers.get(optimizer)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "`optimizer` must be a Keras optimizer or the name of one. "
            f"Received: optimizer={optimizer!r}"
        )
    if isinstance(
        optimizer,
        (keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer),
    ):
        raise ValueError(
            "`optimizer` must be a plain optimizer: `compile` adds loss "
            "scaling by itself where the model's dtype policy asks for it. "
            f"Received a {type(optimizer).__name__}"
        )
    if isinstance(optimizer, OptimizerWrapper):
        raise ValueError(
            "`optimizer` must be a plain optimizer: put the "
            f"`{type(optimizer).__name__}` around the result instead."
        )
    if optimizer.built:
        raise ValueError(
            "`optimizer` is built already: give a fresh one, or its name."
        )
    head = _checked(head, "head")
    if lora_b is not None:
        lora_b = _checked(lora_b, "lora_b")
    if adapter is None:
        adapter = _recommended_rate(state)
    adapter = _checked(adapter, "adapter")
    # Groups are chosen by path and not by variable, because paths survive
    # saving and loading. No path matches two groups.
    _check_paths(model, state)
    if lora_b is None:
        rates = {_ADAPTER: ("adapter", adapter)}
    else:
        _check_has_lora_b(model)
        rates = {
            r"(.*/)?adapter/.*(?<!/lora_b)$": ("adapter", adapter),
            _LORA_B: ("lora_b", lora_b),
        }
    groups = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            _group(optimizer, "head", head, model),
            {
                path: _group(optimizer, name, rate, model)
                for path, (name, rate) in rates.items()
            },
        )
    )
    if optimizer.global_clipnorm is None:
        return groups
    # Each group would clip by its own norm, and turn the step.
    return ClipByGlobalNorm(groups, optimizer.global_clipnorm)


def _checked(rate, argument):
    if callable(rate):
        return rate
    return arguments.check_non_negative(rate, argument)


def _check_paths(model, state):
    ours = {
        id(variable)
        for name in state.records
        for adapter in state.adapters(name).values()
        for variable in adapter.variables
    }
    for variable in model.trainable_variables:
        if id(variable) not in ours and re.fullmatch(_ADAPTER, variable.path):
            raise ValueError(
                f"The weight '{variable.path}' belongs to no adapter, but a "
                "layer of its path is called 'adapter', by which adapters' "
                "weights are known: it would get their rate. Rename the layer."
            )


def _check_has_lora_b(model):
    paths = [variable.path for variable in model.trainable_variables]
    if not any(re.fullmatch(_LORA_B, path) for path in paths):
        raise ValueError(
            "`lora_b` is a learning rate for the matrices B of LoRA and its "
            "relatives, and no active adapter of this model trains one."
        )


def _recommended_rate(state):
    rates = {
        state.records[name].template.recommended_learning_rate
        for name in state.active
    }
    if len(rates) != 1 or None in rates:
        raise ValueError(
            "`adapter` must be given: the active adapters "
            f"{list(state.active)} do not recommend one rate. "
            f"Recommended: {sorted(map(str, rates))}"
        )
    return rates.pop()


def _group(optimizer, name, learning_rate, model):
    """An optimizer of one group; Keras's logs show its rate by its name."""
    config = {**optimizer.get_config(), "name": name, "global_clipnorm": None}
    if isinstance(
        learning_rate, keras.optimizers.schedules.LearningRateSchedule
    ):
        learning_rate = keras.optimizers.schedules.serialize(learning_rate)
    config["learning_rate"] = learning_rate
    result = type(optimizer).from_config(config)
    _compat.copy_weight_decay_exclusions(optimizer, result, model.variables)
    return result
