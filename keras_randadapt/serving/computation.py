"""A model's outputs for a batch with rows of weights, compiled.

Threads may call it at once: it reads the model's variables and changes nothing.
"""

import keras
import numpy as np
from keras import ops

from keras_randadapt.sites import per_example


def outputs(model, layout, inputs, rows):
    """The model's outputs for examples with weights of their own.

    Args:
        model: The model that the bank has attached its adapters to.
        layout: A `Layout`.
        inputs: Whatever the model takes; examples are the first axis.
        rows: Tensor `(examples, layout.size)`, float32.
    """

    def reshape(values, shape):
        return ops.reshape(values, (-1, *shape))

    with per_example.weights_of_batch(layout.weights(rows, reshape)):
        return model(inputs, training=False)


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

    @tf.function
    def step(inputs, rows):
        return outputs(model, layout, inputs, rows)

    def run(inputs, rows):
        inputs = keras.tree.map_structure(tf.convert_to_tensor, inputs)
        return step(inputs, tf.convert_to_tensor(rows))

    return run


def _on_torch(model, layout):
    import torch

    def run(inputs, rows):
        inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        with torch.no_grad():
            return outputs(model, layout, inputs, ops.convert_to_tensor(rows))

    return run


def as_numpy(tensors):
    return keras.tree.map_structure(
        lambda t: np.asarray(ops.convert_to_numpy(t)), tensors
    )
