"""Speed of `fwht` against the dense product and against copying the tensor.

    KERAS_BACKEND=jax python benchmarks/fwht.py       # one backend
    python benchmarks/fwht.py --all                   # each in a subprocess

For every size `d`, a float32 tensor of 4M elements and shape `(4M / d, d)` is
transformed by `fwht`, multiplied by the dense Hadamard matrix, and copied,
one after the other in one loop. The table has the median times of that loop
and their ratios. The backward pass is only the vector-Jacobian product.

JAX runs under `jax.jit`, TensorFlow under `tf.function` (with `--jit-compile`
under XLA), PyTorch eagerly. The copy is out of place, in the same framework:
`x + 0`, whose result is a new buffer under `jit` and `tf.function`, and
`clone`.
"""

import math
import statistics
import time

import numpy as np
import side_by_side

ELEMENTS = 1 << 22
SIZES = (256, 768, 1024, 3072, 4096, 11008, 16384)
# A larger dense matrix takes a gigabyte, and a product with it takes seconds.
DENSE_LIMIT = 11008
COLUMNS = (
    ("pass", "{}"),
    ("d", "{}"),
    ("fwht ms", "{:.1f}"),
    ("copy ms", "{:.1f}"),
    ("dense ms", "{:.1f}"),
    ("fwht / copy", "{:.1f}"),
    ("dense / fwht", "{:.1f}"),
)


def jax_functions():
    import jax

    def forward(function):
        return jax.jit(function)

    def backward(function):
        # The functions are linear, so their transpose needs no forward pass.
        def pullback(g):
            transpose = jax.linear_transpose(
                function, jax.ShapeDtypeStruct(g.shape, g.dtype)
            )
            return transpose(g)[0]

        return jax.jit(pullback)

    zero = jax.numpy.zeros(())
    copy = jax.jit(lambda x: x + zero)
    return jax.numpy.asarray, forward, backward, copy, jax.block_until_ready


def tensorflow_functions(jit_compile):
    import tensorflow as tf

    def forward(function):
        return tf.function(function, jit_compile=jit_compile)

    def backward(function):
        # The forward pass is not needed and is pruned from the graph.
        def pullback(g):
            x = tf.zeros_like(g)
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x)
            return tape.gradient(y, x, output_gradients=g)

        return tf.function(pullback, jit_compile=jit_compile)

    zero = tf.Variable(0.0)
    copy = tf.function(lambda x: x + zero, jit_compile=jit_compile)
    return tf.constant, forward, backward, copy, lambda y: y


def torch_functions():
    import torch

    def backward(function):
        graphs = {}

        def pullback(g):
            if "y" not in graphs:
                graphs["x"] = torch.zeros_like(g, requires_grad=True)
                graphs["y"] = function(graphs["x"])
            return torch.autograd.grad(
                graphs["y"], graphs["x"], g, retain_graph=True
            )

        return pullback

    return torch.tensor, lambda f: f, backward, torch.clone, lambda y: y


def medians(functions, x, repeats, wait):
    times = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            if name == "dense" and repeat > max(4, repeats // 4):
                continue
            start = time.perf_counter()
            wait(function(x))
            elapsed = time.perf_counter() - start
            # The first two repetitions compile and fill caches.
            if repeat >= 2:
                times[name].append(1e3 * elapsed)
    return {name: statistics.median(t) for name, t in times.items()}


def rows(arguments):
    import keras

    from keras_randadapt.hadamard import hadamard
    from keras_randadapt.ops import fwht

    make = {
        "jax": jax_functions,
        "tensorflow": lambda: tensorflow_functions(arguments.jit_compile),
        "torch": torch_functions,
    }[keras.config.backend()]
    tensor, forward, backward, copy, wait = make()
    rng = np.random.default_rng(0)
    for d in arguments.sizes:
        shape = (ELEMENTS // d, d)
        x = tensor(rng.standard_normal(shape, dtype="float32"))
        linear = {"fwht": fwht}
        if d <= DENSE_LIMIT:
            matrix = tensor(hadamard(d).T.astype("float32"))
            linear["dense"] = lambda x, matrix=matrix: x @ matrix
        for name, transform in (("forward", forward), ("backward", backward)):
            functions = {k: transform(f) for k, f in linear.items()}
            functions["copy"] = copy
            t = medians(functions, x, arguments.repeats, wait)
            dense = t.get("dense", math.nan)
            yield (
                name,
                d,
                t["fwht"],
                t["copy"],
                dense,
                t["fwht"] / t["copy"],
                dense / t["fwht"],
            )


if __name__ == "__main__":
    side_by_side.main(
        __doc__,
        COLUMNS,
        rows,
        jit_compile=dict(action="store_true", help="XLA on TensorFlow"),
        repeats=dict(type=int, default=21),
        sizes=dict(type=int, nargs="+", default=SIZES),
    )
