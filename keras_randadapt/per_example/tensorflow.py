"""Per-example gradients in TensorFlow: `vectorized_map` of a tape, in XLA."""

import numpy as np
import tensorflow as tf


def strategies(loss):
    """`(name, function of a chunk and a scale)` pairs, the fastest first."""

    def gradients(values, example, scale):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            # All other variables are read directly.
            total = loss(values, [], example, scale)
        found = tape.gradient(
            total, values, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        # The gradient of an embedding is sparse.
        return [tf.convert_to_tensor(gradient) for gradient in found]

    def one(example, scale):
        return gradients(_values(loss), example, scale)

    # XLA is used not only for speed. Vectorizing makes products of examples
    # `(n, 1, rows, dim)` with one matrix, which crash the oneDNN kernel of
    # TensorFlow 2.21 on CPUs with AVX-512.
    @tf.function(autograph=False, jit_compile=True)
    def vectorized(chunk, scale):
        values = _values(loss)
        return tf.vectorized_map(
            lambda example: gradients(values, example, scale),
            chunk,
            fallback_to_while_loop=False,
        )

    def all_at_once(chunk, scale):
        return [g.numpy() for g in vectorized(_tensors(chunk), scale)]

    def one_by_one(function):
        def loop(chunk, scale):
            chunk = _tensors(chunk)
            rows = [
                function([tensor[i] for tensor in chunk], scale)
                for i in range(chunk[0].shape[0])
            ]
            return [
                np.stack([g.numpy() for g in column]) for column in zip(*rows)
            ]

        return loop

    compiled = tf.function(one, autograph=False)
    return [
        ("all at once", lambda chunk, s: all_at_once(chunk, tf.constant(s))),
        ("one by one", one_by_one(lambda e, s: compiled(e, tf.constant(s)))),
        ("one by one without compilation", one_by_one(one)),
    ]


#: Operations whose results share the memory of their arguments.
_VIEWS = {"ExpandDims", "Identity", "Reshape", "Squeeze", "StopGradient"}


def intermediate_bytes(loss, batch):
    """The bytes of all results in the forward pass of a batch."""
    batch = _tensors(batch)
    # The loss is first computed eagerly, since Keras then creates its state.
    loss.of_batch(_values(loss), [], batch)

    @tf.function(autograph=False)
    def forward(batch):
        return loss.of_batch(_values(loss), [], batch)

    try:
        graph = forward.get_concrete_function(batch).graph
    except Exception:
        # The model ran above, so it is one that runs only eagerly.
        return 0
    return sum(
        int(np.prod(output.shape)) * output.dtype.size
        for operation in graph.get_operations()
        if operation.type not in _VIEWS
        for output in operation.outputs
        if output.shape.is_fully_defined()
    )


def _values(loss):
    return [tf.convert_to_tensor(v.value) for v in loss.variables]


def _tensors(arrays):
    return [tf.convert_to_tensor(array) for array in arrays]
