"""A model's outputs for a batch with rows of weights, compiled.

Threads may call it at once: it reads the model's variables and changes nothing.
"""

import warnings

import keras
import numpy as np
from keras import ops

from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.sites import per_example


def outputs(model, layout, inputs, rows):
    """The model's outputs for examples with weights of their own.

    Args:
        model: The model that the bank has attached its adapters to.
        layout: A `Layout`.
        inputs: Whatever the model takes; examples are the first axis.
        rows: Tensor `(examples, layout.size)`, float32.
    """
    with _weights(layout, rows):
        return model(inputs, training=False)


def _weights(layout, rows):
    def reshape(values, shape):
        return ops.reshape(values, (-1, *shape))

    return per_example.weights_of_batch(layout.weights(rows, reshape))


# A prime number of examples is a factor of no other dimension, most likely.
_EXAMPLES = 7
_LENGTH = 4


def check_batches(model, layout, base):
    """Raises `ValueError` if a site can't tell the examples of a batch apart.

    Args:
        model: The model that the bank has attached its adapters to.
        layout: A `Layout`.
        base: The row of the base model.
    """
    if not getattr(model, "inputs", None):
        # Each batch is checked then.
        return
    with per_example.noted() as found:
        try:
            _trace(model, layout, np.stack([base] * _EXAMPLES))
        except Exception as error:
            if found:
                raise ValueError(found[0]) from error
            warnings.warn(
                "It could not be checked that all sites tell the examples of "
                f"a batch apart, since the model failed for zeros: {error}",
                AdapterWarning,
                stacklevel=6,
            )


def _trace(model, layout, rows):
    def zeros(one):
        dims = [_LENGTH if size is None else size for size in one.shape[1:]]
        return np.zeros((_EXAMPLES, *dims), one.dtype)

    inputs = keras.tree.map_structure(zeros, model.input)
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        jax.eval_shape(lambda *a: outputs(model, layout, *a), inputs, rows)
    elif backend == "tensorflow":
        import tensorflow as tf

        step = tf.function(lambda *a: outputs(model, layout, *a))
        specs = keras.tree.map_structure(
            lambda a: tf.TensorSpec(a.shape, a.dtype), (inputs, rows)
        )
        step.get_concrete_function(*specs)
    else:
        compiled(model, layout)(inputs, rows)


def compiled(model, layout):
    """`outputs` of a model, as a compiled function of NumPy arrays."""
    make = {"jax": _on_jax, "tensorflow": _on_tensorflow, "torch": _on_torch}
    return make[keras.config.backend()](model, layout)


def _on_jax(model, layout):
    import jax

    variables = model.variables

    @jax.jit
    def step(values, inputs, rows):
        with keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return outputs(model, layout, inputs, rows)

    def run(inputs, rows):
        return step([v.value for v in variables], inputs, rows)

    return run


def _on_tensorflow(model, layout):
    import tensorflow as tf

    # By this name the Hadamard transform knows a function that is never saved
    # (`ops/tensorflow.py`), and runs compiled code in it.
    @tf.function
    def one_batch_of_tenants(inputs, rows):
        return outputs(model, layout, inputs, rows)

    def run(inputs, rows):
        inputs = keras.tree.map_structure(tf.convert_to_tensor, inputs)
        return one_batch_of_tenants(inputs, tf.convert_to_tensor(rows))

    return run


def _on_torch(model, layout):
    import torch

    def run(inputs, rows):
        inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        with torch.no_grad():
            return outputs(model, layout, inputs, ops.convert_to_tensor(rows))

    return run


def compiled_generation(model, layout):
    """`generate_step` of a model of KerasHub for rows, compiled as there.

    Args:
        model: The model that the bank has attached its adapters to.
        layout: A `Layout`.

    Returns:
        Function of a batch, rows and stop tokens.
    """

    def step(inputs, rows, stop_token_ids):
        with _weights(layout, rows):
            return model.generate_step(inputs, stop_token_ids)

    backend = keras.config.backend()
    if backend == "torch":
        return _generation_on_torch(step)
    if model.run_eagerly:
        return lambda inputs, rows, stop_token_ids: step(
            inputs, ops.convert_to_tensor(rows), stop_token_ids
        )
    if backend == "jax":
        return _generation_on_jax(model, step)
    return _generation_on_tensorflow(model, step)


def _generation_on_jax(model, step):
    import jax

    # The state of the sampler is the first of the variables.
    drawn = model.sampler.variables
    variables = [*drawn, *model.variables]

    def stateless(values, inputs, rows, stop_token_ids):
        mapping = list(zip(variables, values))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            found = step(inputs, rows, stop_token_ids)
        return found, [scope.get_current_value(one) for one in drawn]

    jitted = jax.jit(stateless, static_argnums=3)

    def run(inputs, rows, stop_token_ids):
        if stop_token_ids is not None:
            stop_token_ids = tuple(stop_token_ids)
        inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        values = [one.value for one in variables]
        found, states = jitted(values, inputs, rows, stop_token_ids)
        for variable, state in zip(drawn, states):
            variable.assign(state)
        return found

    return run


def _generation_on_tensorflow(model, step):
    import tensorflow as tf

    compiled_step = tf.function(step, jit_compile=model.jit_compile)

    def run(inputs, rows, stop_token_ids):
        inputs = keras.tree.map_structure(tf.convert_to_tensor, inputs)
        return compiled_step(inputs, tf.convert_to_tensor(rows), stop_token_ids)

    return run


def _generation_on_torch(step):
    import torch

    def run(inputs, rows, stop_token_ids):
        inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        with torch.no_grad():
            rows = ops.convert_to_tensor(rows)
            return step(inputs, rows, stop_token_ids)

    return run


def as_numpy(tensors):
    return keras.tree.map_structure(
        lambda t: np.asarray(ops.convert_to_numpy(t)), tensors
    )
