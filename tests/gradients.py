"""Gradients on the running backend, and the tensors kept for them."""

import keras
import numpy as np

import keras_randadapt as kra


def gradients(function, x, variables, upstream):
    """The gradients of `x` and variables, given that of `function(x)`."""
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
    """The shapes and dtypes of tensors that are kept for the backward pass.

    Each tensor counts once. In TensorFlow the function is traced, as in
    `fit`.
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

        before = []

        @tf.function(autograph=False)
        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x)
            before.extend(x.graph.get_operations())
            values = [x, *[v.value for v in variables]]
            return tape.gradient(y, values)

        graph = step.get_concrete_function(tf.constant(x)).graph
        # The search goes from the gradients back to operations that existed
        # when the tape ended: their results are kept. Other operations of the
        # backward pass never run.
        names = {op.name for op in before}
        kept, seen, waiting = {}, set(), list(graph.outputs)
        while waiting:
            tensor = waiting.pop()
            # TensorFlow marks functions with a custom gradient by IdentityN.
            while tensor.op.type in ("Identity", "IdentityN"):
                tensor = tensor.op.inputs[tensor.value_index]
            if tensor.op.name in names:
                if tensor.op.type != "Const":
                    kept[tensor.name] = tensor
            elif tensor.op.name not in seen:
                seen.add(tensor.op.name)
                waiting.extend(tensor.op.inputs)
        kept = kept.values()
    return [
        (tuple(t.shape), keras.backend.standardize_dtype(t.dtype)) for t in kept
    ]


def compiled_bytes_a_layer(adapter, dim, rows):
    """The memory that XLA allocates for one more layer of a deep model.

    The layers are `Dense(dim, "tanh")` with an injected adapter template. The
    program is the gradient of a loss on `rows` inputs, on JAX only.
    """
    import jax

    def memory(depth):
        inputs = x = keras.Input((dim,))
        for _ in range(depth):
            x = keras.layers.Dense(dim, "tanh", use_bias=False)(x)
        model = keras.Model(inputs, x)
        kra.inject(model, adapter, "all-linear")

        def loss(trained, frozen, x):
            y, _ = model.stateless_call(trained, frozen, x, training=True)
            return keras.ops.sum(y**2)

        gradient = jax.jit(jax.grad(loss)).lower(
            [v.value for v in model.trainable_variables],
            [v.value for v in model.non_trainable_variables],
            np.zeros((rows, dim), "float32"),
        )
        return gradient.compile().memory_analysis().temp_size_in_bytes

    return (memory(6) - memory(2)) / 4


def _stateless(function, variables):
    def stateless(x, *values):
        mapping = list(zip(variables, values))
        with keras.StatelessScope(state_mapping=mapping):
            return function(x)

    return stateless


def numeric_gradient(function, x, eps=1e-6):
    """The gradient of a scalar function at an array, by differences."""
    gradient = np.zeros(x.size)
    for i in range(x.size):
        step = np.zeros(x.size)
        step[i] = eps
        step = step.reshape(x.shape)
        gradient[i] = (function(x + step) - function(x - step)) / (2 * eps)
    return gradient.reshape(x.shape)
