"""Private API of Keras about steps: their state, their functions, tracing."""

import contextlib

import keras
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.backend.common.stateless_scope import in_stateless_scope

from keras_randadapt._compat.layers import flatten_layers
from keras_randadapt._compat.layers import instance_attributes
from keras_randadapt._compat.layers import owned_variables

__all__ = [
    "compiled_functions",
    "forget_jax_state",
    "fresh_step",
    "has_values",
    "is_compiling",
    "is_tracing",
    "reset_compiled_functions",
    "substituted_values",
    "sync_jax_state",
    "values_of_jax_state",
]

_COMPILED_FUNCTIONS = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
    # Gemma 4 has this one for speculative decoding.
    "_cached_spec_generate_fn",
)


def compiled_functions(model):
    """A model's traced step functions, by attribute."""
    # `vars` is used, because not every model has all of these attributes.
    return {
        attribute: vars(model)[attribute]
        for attribute in _COMPILED_FUNCTIONS
        if attribute in vars(model)
    }


def reset_compiled_functions(model):
    """Drops a model's traced step functions, which Keras then builds again."""
    for attribute in compiled_functions(model):
        setattr(model, attribute, None)


@contextlib.contextmanager
def fresh_step(model, name):
    """Makes Keras compile a new step in this block, on JAX.

    Keras gives the bound method to JAX, which compares functions by equality.
    As long as an older function compiled from the method lives, JAX would
    reuse its program, although other adapters are active now.
    """
    if keras.config.backend() != "jax":
        yield
        return
    method = getattr(model, name)

    def step(*args, **kwargs):
        return method(*args, **kwargs)

    with instance_attributes(model, **{name: step}):
        yield


def sync_jax_state(model):
    """Gives the variables their current values, on JAX, inside `fit`."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def is_compiling():
    """Whether `torch.compile` is reading the code, which keeps the result."""
    if keras.config.backend() != "torch":
        return False
    import torch

    return torch.compiler.is_compiling()


def is_tracing():
    """Whether a function is being traced, so that nothing can be assigned."""
    if in_stateless_scope():
        return True
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    return False


@contextlib.contextmanager
def substituted_values(model, pairs):
    """For a block, gives some variables of a model other values.

    The variables are not assigned to, so it can be done inside a training
    step. What the block assigns to other variables is assigned at its end.

    Args:
        model: A model.
        pairs: list of pairs of a variable and a tensor or array.
    """
    if not pairs:
        yield
        return
    given = {id(variable) for variable, _ in pairs}
    others = [v for v in model.variables if id(v) not in given]
    before = [variable.value for variable in others]
    outer = get_stateless_scope() if in_stateless_scope() else None
    scope = keras.StatelessScope([*zip(others, before), *pairs], True)
    if outer is not None:
        # Metrics and optimizers have variables that no model lists.
        known = {**outer.state_mapping, **scope.state_mapping}
        scope.state_mapping = known
    with scope:
        yield
    for variable, value in zip(others, before):
        new = scope.get_current_value(variable)
        if new is not None and new is not value:
            variable.assign(new)


@contextlib.contextmanager
def values_of_jax_state(model, state):
    """Gives variables, during a block, the values of a JAX step's input.

    Args:
        model: A model in `fit`, whose variables have no values.
        state: The trainer's state: lists of the values of the trainable and
            the non-trainable variables come first.
    """
    trainable, non_trainable = state[0], state[1]
    pairs = [
        *zip(model.trainable_variables, trainable, strict=True),
        *zip(model.non_trainable_variables, non_trainable, strict=True),
    ]
    try:
        for variable, value in pairs:
            variable._value = value
        yield
    finally:
        for variable, _ in pairs:
            variable._value = None


def has_values(model):
    """Whether a model's variables have values; JAX's `fit` removes them."""
    if keras.config.backend() != "jax" or in_stateless_scope():
        # In a traced step the scope has the values.
        return True
    for layer in flatten_layers(model):
        for variable in owned_variables(layer):
            return variable._value is not None
    return True


def forget_jax_state(model):
    """Drops, on JAX, the state of a step that an error interrupted.

    Otherwise Keras would later write it into the model's variables. After a
    successful step there is no such state.
    """
    if getattr(model, "_jax_state", None) is not None:
        model._jax_state = None
