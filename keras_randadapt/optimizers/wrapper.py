"""`OptimizerWrapper`: the base of optimizers that wrap another optimizer."""

import re
import warnings
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import Self

import keras

from keras_randadapt import _compat
from keras_randadapt._types import Config
from keras_randadapt._types import Store
from keras_randadapt._types import Tensor
from keras_randadapt.adapter_warning import AdapterWarning


class OptimizerWrapper(_compat.ShowsMovingAverage, keras.optimizers.Optimizer):
    """An optimizer that changes gradients before another, and values after.

    A method that acts once a step on gradients or on trained values is a
    wrapper around the user's optimizer. It then works in `fit` on every
    backend, compiled or not, and with `optimizer.apply` in custom loops. A
    subclass overrides four hooks:

    - `build_state(variables)` finds its variables and creates its state.
    - `transform_gradients(gradients, variables, step)` returns the gradients
      for the inner optimizer. By default it returns them unchanged.
    - `keeps_value(variable)` tells whether `after_update` needs a variable's
      value from before the update. By default it does not.
    - `after_update(variables, before, step)` corrects the inner optimizer's
      update by `variable.assign`, and updates the subclass's state.

    State is created by `add_variable` in `build_state` and saved with the
    model. `step` counts updates from 0. All hooks run inside the compiled
    step, where `step` and all values may be traced. They must not branch on
    these in Python, and must not assign in `ops.cond`, which JAX does not
    allow.

    Learning rate, schedules, clipping, weight decay, moving averages,
    gradient accumulation and loss scaling are set on the inner optimizer;
    reading and setting `learning_rate` is passed on. The hooks see gradients
    before clipping. If the inner optimizer accumulates gradients, the hooks
    run in every micro-step, and all micro-steps of an update have the same
    `step`.

    Wrappers nest. In mixed float16 a wrapper belongs inside the
    `LossScaleOptimizer`, where `compile` puts it.

    Args:
        optimizer: The optimizer to wrap: any Keras optimizer except a
            `LossScaleOptimizer`, or the name of one.
        name: Optional string.

    Raises:
        TypeError: If `optimizer` is no Keras optimizer.
        ValueError: If `optimizer` is a `LossScaleOptimizer`.
    """

    #: Whether `after_update` assigns to trained variables.
    changes_values = False

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        name: str | None = None,
    ):
        inner = _check_optimizer(optimizer)
        super().__init__(learning_rate=_rate_of_the_inner_one, name=name)
        self.inner_optimizer = inner
        #: Whether an adapter, and not the user, has put this wrapper on. It is
        #: then removed with the adapter. See `attach`.
        self.automatic = False

    # A method overrides the following.

    def build_state(self, variables: list[keras.Variable]) -> None:
        """Finds the method's variables and creates its state.

        Args:
            variables: list of all trained variables.
        """

    def inner_variables(
        self, variables: list[keras.Variable]
    ) -> list[keras.Variable]:
        """The variables that the inner optimizer changes.

        Args:
            variables: list of variables. The first call comes before
                `build_state` and has all of them.

        Returns:
            list as long as `variables`; by default `variables`.
        """
        return variables

    def transform_gradients(
        self,
        gradients: list[Tensor | None],
        variables: list[keras.Variable],
        step: Tensor,
    ) -> list[Tensor | None]:
        """Changes gradients.

        Args:
            gradients: list of tensors, as long as `variables`. A gradient is
                `None` if the loss does not depend on its variable. On
                TensorFlow the gradient of looked-up rows may be
                `tf.IndexedSlices`, which `ops.convert_to_tensor` makes dense.
            variables: list of variables.
            step: Integer tensor.

        Returns:
            list like `gradients`.
        """
        return gradients

    def keeps_value(self, variable: keras.Variable) -> bool:
        """Whether `after_update` gets this variable's value from before."""
        return False

    def after_update(
        self,
        variables: list[keras.Variable],
        before: list[Tensor | None],
        step: Tensor,
    ) -> None:
        """Corrects an update.

        Args:
            variables: list of variables.
            before: list of tensors, as long as `variables`: the values from
                before the update, or `None` where `keeps_value` is false.
            step: Integer tensor.
        """

    # The following is the same for all methods.

    def is_update_step(self) -> bool | Tensor:
        """Whether this step changes variables and does not only accumulate.

        Returns:
            `True`, or a boolean tensor if the inner optimizer accumulates.
        """
        steps = self.gradient_accumulation_steps
        return not steps or (_compat.iterations(self) + 1) % steps == 0

    @_compat.no_automatic_dependency_tracking
    def build(self, variables: list[keras.Variable]) -> None:
        variables = list(variables)
        inner_variables = self.inner_variables(variables)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(inner_variables)
        leaves = _leaves(self.inner_optimizer)
        accumulations = {o.gradient_accumulation_steps or 1 for o in leaves}
        if len(accumulations) > 1:
            raise ValueError(
                "The optimizers inside a wrapper must agree on "
                "`gradient_accumulation_steps`, which says when an update "
                f"ends. Received: {sorted(accumulations)}"
            )
        if self.changes_values and any(o.use_ema for o in leaves):
            raise ValueError(
                f"`{type(self).__name__}` corrects values after the update, "
                "too late for the moving average that the inner optimizer "
                "keeps of them. Received an optimizer with `use_ema=True`: "
                "use one without, or leave the correction out."
            )
        self.build_state(variables)
        super().build(variables)
        # It is set only now, since `super().build` would make accumulators.
        steps = accumulations.pop()
        self.gradient_accumulation_steps = steps if steps > 1 else None

    def apply(
        self,
        grads: Iterable[Tensor | None],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> None:
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "When `apply` gets no `trainable_variables`, the "
                    "optimizer must be built: call "
                    "`optimizer.build(trainable_variables)` first."
                )
            variables = _compat.trained_variables(self)
        else:
            variables = list(trainable_variables)
            if not self.built:
                self.build(variables)
            _compat.check_variables_are_known(self, variables)
        step = keras.ops.convert_to_tensor(self.iterations)
        grads = self.transform_gradients(grads, variables, step)
        # The values are copied, since torch updates variables in place.
        before = [
            keras.ops.stop_gradient(keras.ops.copy(v))
            if self.keeps_value(v)
            else None
            for v in variables
        ]
        self.inner_optimizer.apply(grads, self.inner_variables(variables))
        self.after_update(variables, before, step)
        _compat.iterations(self).assign_add(1)

    @property
    def variables(self) -> list[keras.Variable]:
        return super().variables + self.inner_optimizer.variables

    @property
    def learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        # Keras's callbacks use this attribute to set several learning rates.
        return self.inner_optimizer.optimizers

    @property
    def loss_scale_factor(self) -> float | None:
        inner = vars(self).get("inner_optimizer")
        return inner.loss_scale_factor if inner is not None else None

    @loss_scale_factor.setter
    def loss_scale_factor(self, value):
        # `LossScaleOptimizer` and `MultiOptimizer` set it on their inner
        # optimizers. Keras's `__init__` sets it before there is an inner
        # optimizer.
        inner = vars(self).get("inner_optimizer")
        if inner is not None:
            inner.loss_scale_factor = value

    def scale_loss(self, loss: Tensor) -> Tensor:
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(
        self, var_list: Iterable[keras.Variable]
    ) -> None:
        if self.built:
            var_list = self.inner_variables(list(var_list))
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(
        self,
        var_list: list[keras.Variable] | None = None,
        var_names: list[str] | None = None,
    ) -> None:
        # In a `MultiOptimizer`, only the leaves decay weights.
        for leaf in _leaves(self.inner_optimizer):
            leaf.exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights: Sequence[Tensor]) -> None:
        own = len(super().variables)
        super().set_weights(weights[:own])
        self.inner_optimizer.set_weights(weights[own:])

    def save_own_variables(self, store: Store) -> None:
        # Only the wrapper's own variables are saved here. Keras's saving
        # visits the inner optimizer itself.
        for i, variable in enumerate(super().variables):
            store[str(i)] = keras.ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Store) -> None:
        own = super().variables
        if len(store.keys()) != len(own):
            # It is a warning, like Keras's own, since a file with only the
            # model's weights must load.
            warnings.warn(
                f"The optimizer '{self.name}' starts afresh: it has "
                f"{len(own)} variables and the file {len(store.keys())} of "
                "it. The file was saved with another optimizer, or before "
                "the optimizer was built.",
                AdapterWarning,
                stacklevel=2,
            )
            return
        for i, variable in enumerate(own):
            variable.assign(store[str(i)])

    def get_config(self) -> Config:
        config = {
            "name": self.name,
            "optimizer": keras.saving.serialize_keras_object(
                self.inner_optimizer
            ),
        }
        if self.automatic:
            config["automatic"] = True
        return config

    @classmethod
    def from_config(
        cls, config: Config, custom_objects: dict[str, Any] | None = None
    ) -> Self:
        config = dict(config)
        automatic = config.pop("automatic", False)
        config["optimizer"] = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        wrapper = cls(**config)
        wrapper.automatic = automatic
        return wrapper


def walk(optimizer):
    """An optimizer and all those inside it, outermost first."""
    yield optimizer
    for inner in _inner_optimizers(optimizer):
        yield from walk(inner)


def _leaves(optimizer):
    return [one for one in walk(optimizer) if not _inner_optimizers(one)]


def copy_exclusions(source, target, variables):
    """Copies the exclusions from weight decay of an optimizer and inner ones.

    Args:
        source: An optimizer.
        target: An optimizer that was made from the source's config.
        variables: The model's variables.
    """
    for old, new in zip(walk(source), walk(target), strict=True):
        _compat.copy_weight_decay_exclusions(old, new, variables)


def exclusions(optimizer):
    """The exclusions from weight decay of an optimizer and inner ones.

    Returns:
        list of `(optimizer, exclusions)` pairs, for `restore_exclusions`.
    """
    return [
        (one, _compat.weight_decay_exclusions(one)) for one in walk(optimizer)
    ]


def restore_exclusions(pairs):
    """Restores the result of `exclusions`."""
    for one, excluded in pairs:
        _compat.set_weight_decay_exclusions(one, excluded)


def chosen_by_user(optimizer, cls):
    """Whether the user has put a wrapper of this class on an optimizer."""
    return any(
        isinstance(one, cls) and not one.automatic for one in walk(optimizer)
    )


def check_paths(paths):
    """Validates a regular expression."""
    try:
        re.compile(paths)
    except (TypeError, re.error) as error:
        raise ValueError(
            "`paths` must be a regular expression, as a string. "
            f"Received: paths={paths!r}"
        ) from error
    return paths


def leaf_of(optimizer, variable):
    """The innermost optimizer, inside a built one, that trains a variable."""
    for one in walk(optimizer):
        if not _inner_optimizers(one):
            if any(v is variable for v in _compat.trained_variables(one)):
                return one
    raise ValueError(f"No optimizer in {optimizer} trains '{variable.path}'.")


def _inner_optimizers(optimizer):
    if hasattr(optimizer, "inner_optimizer"):
        return [optimizer.inner_optimizer]
    return list(getattr(optimizer, "optimizers", ()))


def _check_optimizer(optimizer):
    if isinstance(optimizer, str):
        optimizer = keras.optimizers.get(optimizer)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "`optimizer` must be a Keras optimizer or the name of one. "
            f"Received: optimizer={optimizer!r}"
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "`optimizer` must not be a `LossScaleOptimizer`: the wrapper "
            "belongs inside, where gradients have their true scale. Pass "
            "LossScaleOptimizer(wrapper(optimizer)) instead, or leave the "
            "loss scaling to `compile`, which adds it where the model's dtype "
            "policy asks for it."
        )
    return optimizer


def _rate_of_the_inner_one():
    # Keras would make an unused variable of a number.
    raise RuntimeError("A wrapper has no learning rate of its own.")
