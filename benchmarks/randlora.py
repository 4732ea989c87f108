"""RandLoRA's two ways to compute, compared with a trained kernel.

    KERAS_BACKEND=jax python benchmarks/randlora.py       # one backend
    python benchmarks/randlora.py --all                   # each in a subprocess

A `Dense(d)` without a bias gets `--tokens` inputs of `d` features in float32.
It runs in three ways: its kernel is trained as usual ("kernel"), or frozen with
`RandLoRA(compute="factored")` or with `compute="materialized"`. The ways take
turns in one loop, and the table has the median times of that loop and their
ratios. "step" is forward and backward, with the gradients of the inputs and of
the trained weights. "floor" is the ratio of all multiply-adds of the two ways.

JAX runs under `jax.jit`, TensorFlow under `tf.function` (with `--jit-compile`
under XLA), PyTorch eagerly.
"""

import statistics
import time

import numpy as np
import side_by_side

BASES = ("uniform", "sparse", "hadamard")
COLUMNS = (
    ("basis", "{}"),
    ("pass", "{}"),
    ("kernel ms", "{:.0f}"),
    ("factored ms", "{:.0f}"),
    ("materialized ms", "{:.0f}"),
    ("factored / materialized", "{:.2f}"),
    ("floor", "{:.2f}"),
    ("materialized / kernel", "{:.2f}"),
    ("floor ", "{:.2f}"),
)


def multiply_adds(basis, tokens, d, terms_rank):
    """The multiply-adds of the three ways, forward and in a step."""
    product = tokens * d * d
    b = basis.cost
    mix = tokens * d * terms_rank
    return {
        "forward": (product, product + tokens * b + mix, product + d * b),
        "step": (
            3 * product,
            2 * product + 2 * tokens * b + 3 * mix,
            3 * product + 3 * d * b,
        ),
    }


def build(kind, d, rank, basis, compute):
    import keras

    import keras_randadapt as kra

    inputs = keras.Input((d,))
    layer = keras.layers.Dense(d, use_bias=False, name="site")
    model = keras.Model(inputs, layer(inputs))
    rng = np.random.default_rng(0)
    layer.kernel.assign(rng.standard_normal((d, d), "float32") / d**0.5)
    if kind == "kernel":
        return model, None
    kra.inject(model, kra.RandLoRA(rank, basis=basis, compute=compute), "site")
    (adapter,) = model._randadapt.adapters("default").values()
    lambdas = adapter.randlora_lambda
    lambdas.assign(rng.standard_normal(lambdas.shape, "float32"))
    return model, adapter


def jax_functions(model):
    import jax

    fixed = [v.value for v in model.non_trainable_variables]
    trained = [v.value for v in model.trainable_variables]

    def call(trained, fixed, x):
        return model.stateless_call(trained, fixed, x, training=True)[0]

    def step(trained, fixed, x, g):
        y, pullback = jax.vjp(lambda t, x: call(t, fixed, x), trained, x)
        return y, pullback(g)

    forward, step = jax.jit(call), jax.jit(step)
    return (
        lambda x, g: forward(trained, fixed, x),
        lambda x, g: step(trained, fixed, x, g),
    )


def tensorflow_functions(model, jit_compile):
    import tensorflow as tf

    @tf.function(jit_compile=jit_compile)
    def forward(x, g):
        return model(x, training=True)

    @tf.function(jit_compile=jit_compile)
    def step(x, g):
        trained = [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=True)
        return y, tape.gradient(y, [x, *trained], output_gradients=g)

    return forward, step


def torch_functions(model):
    import torch

    trained = [v.value for v in model.trainable_variables]

    def forward(x, g):
        return model(x, training=True)

    def step(x, g):
        x = x.detach().requires_grad_()
        y = model(x, training=True)
        return y, torch.autograd.grad(y, [x, *trained], g)

    return forward, step


def wait(result):
    import keras

    if keras.config.backend() == "jax":
        import jax

        jax.block_until_ready(result)


def medians(functions, x, g, repeats):
    times = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            wait(function(x, g))
            elapsed = time.perf_counter() - start
            # The first two repetitions compile and fill caches.
            if repeat >= 2:
                times[name].append(1e3 * elapsed)
    return {name: statistics.median(t) for name, t in times.items()}


def rows(arguments):
    import keras

    make = {
        "jax": jax_functions,
        "tensorflow": lambda m: tensorflow_functions(m, arguments.jit_compile),
        "torch": torch_functions,
    }[keras.config.backend()]
    d, tokens = arguments.dim, arguments.tokens
    rng = np.random.default_rng(1)
    x, g = (
        keras.ops.convert_to_tensor(
            rng.standard_normal((tokens, d), dtype="float32")
        )
        for _ in range(2)
    )
    for basis in BASES:
        functions = {}
        for kind in ("kernel", "factored", "materialized"):
            model, adapter = build(kind, d, arguments.rank, basis, kind)
            functions[kind] = make(model)
        counts = multiply_adds(
            adapter.basis_b, tokens, d, adapter.terms * adapter.rank
        )
        for index, name in enumerate(("forward", "step")):
            t = medians(
                {kind: both[index] for kind, both in functions.items()},
                x,
                g,
                arguments.repeats,
            )
            kernel, factored, materialized = counts[name]
            yield (
                basis,
                name,
                t["kernel"],
                t["factored"],
                t["materialized"],
                t["factored"] / t["materialized"],
                factored / materialized,
                t["materialized"] / t["kernel"],
                materialized / kernel,
            )


if __name__ == "__main__":
    side_by_side.main(
        __doc__,
        COLUMNS,
        rows,
        jit_compile=dict(action="store_true", help="XLA on TensorFlow"),
        repeats=dict(type=int, default=9),
        tokens=dict(type=int, default=4096),
        dim=dict(type=int, default=1024),
        rank=dict(type=int, default=32),
    )
