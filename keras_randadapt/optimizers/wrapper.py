"""What every optimizer that wraps another has in common."""

import re
import warnings

import keras

from keras_randadapt import _compat
from keras_randadapt.adapter_warning import AdapterWarning


class OptimizerWrapper(keras.optimizers.Optimizer):
    """An optimizer that sees gradients before another one, and values after.

    A method that acts once a step on gradients or on trained values is one of
    these, around whatever optimizer the user chose: `fit` on every backend,
    compiled or not, and `optimizer.apply` in custom loops then do it, and it
    can't be forgotten. A subclass says what it does in four hooks:

    - `build_state(variables)` finds its variables and creates its state.
    - `transform_gradients(gradients, variables, step)` gives the gradients
      that the inner optimizer gets; by default, those that it was given.
    - `keeps_value(variable)` says of which variables `after_update` wants the
      values from before the update; by default none.
    - `after_update(variables, before, step)` corrects what the inner
      optimizer did, by `variable.assign`, and updates the subclass's state.

    State is created by `add_variable` in `build_state` and saved with the
    model. `step` counts updates from 0. All hooks run inside the compiled
    step: `step` and all values may be traced, so there is no branching on
    them in Python, and no `ops.cond` that assigns, which JAX does not take.

    Learning rate, schedules, clipping, weight decay, moving averages,
    gradient accumulation and loss scaling are the inner optimizer's and are
    set there; `learning_rate` is passed on in both directions. Gradients are
    seen before clipping and, where the inner optimizer accumulates them, in
    every micro-step; all micro-steps of an update have the same `step`.

    Wrappers nest. In mixed float16 a wrapper belongs inside the
    `LossScaleOptimizer`, which is what `compile` makes of it.

    Args:
        optimizer: The optimizer to wrap: any Keras optimizer but a
            `LossScaleOptimizer`, or the name of one.
        name: Optional string.

    Raises:
        TypeError: If `optimizer` is no Keras optimizer.
        ValueError: If `optimizer` is a `LossScaleOptimizer`.
    """

    #: Whether `after_update` assigns to trained variables.
    changes_values = False

    def __init__(self, optimizer, name=None):
        inner = _check_optimizer(optimizer)
        super().__init__(learning_rate=_rate_of_the_inner_one, name=name)
        self.inner_optimizer = inner
        #: Whether an adapter asked for it, rather than the user: it then goes
        #: when the adapter does. See `attach`.
        self.automatic = False

    # What a method says.

    def build_state(self, variables):
        """Finds the method's variables and creates its state.

        Args:
            variables: list of all trained variables.
        """

    def inner_variables(self, variables):
        """The variables that the inner optimizer gets to change.

        Args:
            variables: list of variables. At the first call, all of them, and
                before `build_state`.

        Returns:
            list as long as `variables`; by default themselves.
        """
        return variables

    def transform_gradients(self, gradients, variables, step):
        """Changes gradients.

        Args:
            gradients: list of tensors, as long as `variables`; `None` for a
                variable that the loss does not depend on. On TensorFlow
                those of looked-up rows may be `tf.IndexedSlices`, which
                `ops.convert_to_tensor` makes dense.
            variables: list of variables.
            step: Integer tensor.

        Returns:
            list like `gradients`.
        """
        return gradients

    def keeps_value(self, variable):
        """Whether `after_update` gets this variable's value from before."""
        return False

    def after_update(self, variables, before, step):
        """Corrects an update.

        Args:
            variables: list of variables.
            before: list of tensors, as long as `variables`: values from
                before the update, `None` where `keeps_value` said no.
            step: Integer tensor.
        """

    # What is the same for all.

    def is_update_step(self):
        """Whether this step changes variables, rather than accumulates.

        Returns:
            `True`, or a boolean tensor if the inner optimizer accumulates.
        """
        steps = self.gradient_accumulation_steps
        return not steps or (self._iterations + 1) % steps == 0

    @_compat.no_automatic_dependency_tracking
    def build(self, variables):
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
        # Only now: `super().build` would make accumulators of its own.
        steps = accumulations.pop()
        self.gradient_accumulation_steps = steps if steps > 1 else None

    def apply(self, grads, trainable_variables=None):
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
            variables = self._trainable_variables
        else:
            variables = list(trainable_variables)
            if not self.built:
                self.build(variables)
            self._check_variables_are_known(variables)
        step = keras.ops.convert_to_tensor(self.iterations)
        grads = self.transform_gradients(grads, variables, step)
        # Copies: torch updates in place.
        before = [
            keras.ops.stop_gradient(keras.ops.copy(v))
            if self.keeps_value(v)
            else None
            for v in variables
        ]
        self.inner_optimizer.apply(grads, self.inner_variables(variables))
        self.after_update(variables, before, step)
        self._iterations.assign_add(1)

    @property
    def variables(self):
        return super().variables + self.inner_optimizer.variables

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def optimizers(self):
        # Keras's callbacks look for it to set several learning rates.
        return self.inner_optimizer.optimizers

    @property
    def loss_scale_factor(self):
        inner = vars(self).get("inner_optimizer")
        return inner.loss_scale_factor if inner is not None else None

    @loss_scale_factor.setter
    def loss_scale_factor(self, value):
        # `LossScaleOptimizer` and `MultiOptimizer` set it on what they hold;
        # Keras's own `__init__` does before there is an inner optimizer.
        inner = vars(self).get("inner_optimizer")
        if inner is not None:
            inner.loss_scale_factor = value

    @property
    def _model_variables_moving_average(self):
        # For `SwapEMAWeights`, which looks through one optimizer only.
        return self.inner_optimizer._model_variables_moving_average

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        if self.built:
            var_list = self.inner_variables(list(var_list))
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        # Of a `MultiOptimizer`, only the leaves decay weights.
        for leaf in _leaves(self.inner_optimizer):
            leaf.exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights):
        own = len(super().variables)
        super().set_weights(weights[:own])
        self.inner_optimizer.set_weights(weights[own:])

    def save_own_variables(self, store):
        # Only what is the wrapper's: Keras's saving goes on to the inner
        # optimizer by itself.
        for i, variable in enumerate(super().variables):
            store[str(i)] = keras.ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        own = super().variables
        if len(store.keys()) != len(own):
            # A warning, as Keras's own: a file of weights alone must load.
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

    def get_config(self):
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
    def from_config(cls, config, custom_objects=None):
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
    """Excludes from weight decay what another optimizer does.

    Args:
        source: An optimizer.
        target: Another one, made from its config.
        variables: The model's variables.
    """
    for old, new in zip(walk(source), walk(target), strict=True):
        _compat.copy_weight_decay_exclusions(old, new, variables)


def chosen_by_user(optimizer, cls):
    """Whether a wrapper of this class is there that no adapter asked for."""
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
    """The plain optimizer, of those inside a built one, of a variable."""
    for one in walk(optimizer):
        if not _inner_optimizers(one):
            if any(v is variable for v in one._trainable_variables):
                return one
    raise ValueError(f"'{variable.path}' is trained by none of {optimizer}.")


def attach(optimizer, wraps):
    """Puts the wrappers around an optimizer that adapters ask for.

    Wrappers that were put there before and are no longer asked for are taken
    off; those of the user stay. A `LossScaleOptimizer` stays outermost. What
    the optimizer has learned is kept.

    Args:
        optimizer: The optimizer that a model was compiled with.
        wraps: list of functions, each of an optimizer, that return it
            wrapped, or as it is.

    Returns:
        An optimizer; the same one if it is wrapped as asked already.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = attach(optimizer.inner_optimizer, wraps)
        if inner is optimizer.inner_optimizer:
            return optimizer
        # A new one, because the user's own object is not ours to change.
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
    """What tells automatic wrappers apart, the inner optimizer left out."""
    config = wrapper.get_config()
    del config["optimizer"], config["name"]
    return type(wrapper), config


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
    # A number would become a variable that means nothing.
    raise RuntimeError("A wrapper has no learning rate of its own.")
