"""One learning rate for adapters, another for heads."""

import re

import keras

from keras_randadapt import root

Rate = float | keras.optimizers.schedules.LearningRateSchedule


def learning_rate_groups(
    model: keras.Model,
    optimizer: str | keras.optimizers.Optimizer = "adamw",
    *,
    adapter: Rate | None = None,
    head: Rate = 1e-3,
) -> keras.optimizers.Optimizer:
    """Builds an optimizer with one rate for adapters and one for the rest.

    Randomized adapters learn at rates ten to a hundred times those of a
    classification head. This gives both groups an optimizer of the same kind
    and settings, within Keras's own `MultiOptimizer`. Pass the result to
    `model.compile`.

    `MultiOptimizer` has no `learning_rate` of its own: schedules are given
    here instead, and `optimizer.optimizers` lists the two inner optimizers.

    Args:
        model: An adapted model. Its other trainable weights, those of
            `keep_trainable`, get the head rate.
        optimizer: A Keras optimizer, or the name of one. Its own learning
            rate is not used.
        adapter: float or `LearningRateSchedule`: the adapters' rate. By
            default the active adapters' `recommended_learning_rate`, which
            is meant for AdamW.
        head: float or `LearningRateSchedule`: the rate of all else.

    Returns:
        A `keras.optimizers.MultiOptimizer`.

    Raises:
        TypeError: If `optimizer` is no Keras optimizer.
        ValueError: If the model has no adapter, if `optimizer` is built, or
            if `adapter` is left out and the active adapters recommend
            different rates, or none.
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
    state = root.state_of(model)
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
    if optimizer.built:
        raise ValueError(
            "`optimizer` is built already: give a fresh one, or its name."
        )
    if adapter is None:
        adapter = _recommended_rate(state)
    # By path rather than by variable: paths survive saving and loading.
    adapters = re.compile(r"(.*/)?adapter/.*")
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            _with_rate(optimizer, head),
            {adapters.pattern: _with_rate(optimizer, adapter)},
        )
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


def _with_rate(optimizer, learning_rate):
    config = optimizer.get_config()
    if isinstance(
        learning_rate, keras.optimizers.schedules.LearningRateSchedule
    ):
        learning_rate = keras.optimizers.schedules.serialize(learning_rate)
    config["learning_rate"] = learning_rate
    return type(optimizer).from_config(config)
