"""Gradients, and what is kept for them, on whichever backend runs."""

import keras
import numpy as np


def gradients(function, x, variables, upstream):
    """Of `function(x)` by `x` and variables, given that of its output."""
    backend = keras.config.backend()
    if backend == "torch":
        import torch

        x = torch.tensor(x, requires_grad=True)
        values = [v.value for v in variables]
        y = function(x)
        upstream = torch.tensor(upstream, dtype=y.dtype)
        found = torch.autograd.grad(y, [x, *values], upstream)
    elif backend == "jax":
        import jax

        y, pullback = jax.vjp(
            _stateless(function, variables), x, *[v.value for v in variables]
        )
        found = pullback(jax.numpy.asarray(upstream, y.dtype))
    else:
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        found = tape.gradient(
            y, [x, *[v.value for v in variables]], tf.cast(upstream, y.dtype)
        )
    return [keras.ops.convert_to_numpy(g) for g in found]


def kept_for_backward(function, x, variables):
    """Shapes and dtypes of the tensors that wait for the backward pass.

    Each tensor once. In TensorFlow: in a traced function, as in `fit`.
    """
    backend = keras.config.backend()
    if backend == "torch":
        import torch

        kept = []

        def keep(tensor):
            if all(tensor.data_ptr() != one.data_ptr() for one in kept):
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = function(torch.tensor(x, requires_grad=True))
        assert y.requires_grad
    elif backend == "jax":
        import jax

        _, pullback = jax.vjp(
            _stateless(function, variables), x, *[v.value for v in variables]
        )
        kept = {id(leaf): leaf for leaf in jax.tree.leaves(pullback)}.values()
    else:
        import tensorflow as tf

        traced = tf.function(function, autograph=False)
        traced = traced.get_concrete_function(tf.constant(x))
        rewrite = traced._delayed_rewrite_functions
        forward, _ = rewrite.forward_backward(1)
        # The first output is the function's own. IdentityN is how TensorFlow
        # marks a gradient of one's own.
        kept = {}
        for tensor in forward.graph.outputs[1:]:
            while tensor.op.type in ("Identity", "IdentityN"):
                tensor = tensor.op.inputs[tensor.value_index]
            kept[tensor.name] = tensor
        kept = kept.values()
    return [
        (tuple(t.shape), keras.backend.standardize_dtype(t.dtype)) for t in kept
    ]


def _stateless(function, variables):
    def stateless(x, *values):
        mapping = list(zip(variables, values))
        with keras.StatelessScope(state_mapping=mapping):
            return function(x)

    return stateless


def numeric_gradient(function, x, eps=1e-6):
    """Of a scalar function of one float64 array, by central differences."""
    gradient = np.zeros(x.size)
    for i in range(x.size):
        step = np.zeros(x.size)
        step[i] = eps
        step = step.reshape(x.shape)
        gradient[i] = (function(x + step) - function(x - step)) / (2 * eps)
    return gradient.reshape(x.shape)
