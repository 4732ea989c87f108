"""The growth of costs with dimension, rank, tokens, sites and adapters.

    KERAS_BACKEND=jax python benchmarks/scaling.py              # one backend
    KERAS_BACKEND=jax python benchmarks/scaling.py --picture scaling.png

Every line of the table varies one size and holds the others. Its exponent is
the slope of a straight line through the logarithms of the times. A second
exponent is that of the last interval only, where fixed costs matter least.
These are measured:

- The delta's forward and backward pass, for `tokens` inputs of one site.
- Operations on a whole model of `sites` layers: building it without adapters,
  and inject, save, load, merge and eject. One model has Dense layers of 64
  units, which are cheap to build, and one is a Llama of 1,024 features.
- A prediction of a model that holds several adapters, of which one is active,
  and the switch from one to another.

Times are medians, and compared functions take turns in one loop.
"""

import argparse
import itertools
import math
import pathlib
import statistics
import tempfile
import time

import numpy as np
import side_by_side

DIMS = (256, 512, 1024, 2048, 4096, 8192, 16384)
RANKS = (8, 32, 128, 512, 2048)
TOKENS = (64, 256, 1024, 4096)
SITES = (28, 112, 448)
HELD = (2, 4, 8, 16)
COLUMNS = (
    ("what", "{}"),
    ("over", "{}"),
    ("sizes", "{}"),
    ("ms", "{}"),
    ("exponent", "{:.2f}"),
    ("of the last interval", "{:.2f}"),
)


def delta_step(make, dim, tokens):
    """A function that runs one site's delta forward and backward."""
    import keras

    from keras_randadapt.sites.site import Site

    adapter = make()
    adapter.build_at(Site(input_dim=dim, output_dim=dim))
    trained = adapter.trainable_variables
    rng = np.random.default_rng(0)
    for variable in trained:
        variable.assign(0.1 * rng.standard_normal(variable.shape))
    x = keras.ops.convert_to_tensor(
        rng.standard_normal((tokens, dim)), "float32"
    )

    def delta(values, x):
        with keras.StatelessScope(state_mapping=list(zip(trained, values))):
            return adapter.delta(x, True)

    values = [variable.value for variable in trained]
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        @jax.jit
        def step(values, x):
            y, pullback = jax.vjp(delta, values, x)
            return pullback(y)

        return lambda: jax.block_until_ready(step(values, x))
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def step(values, x):
            with tf.GradientTape() as tape:
                tape.watch([*values, x])
                y = delta(values, x)
            return tape.gradient(y, [*values, x], y)

        values = [tf.convert_to_tensor(value) for value in values]
        return lambda: step(values, x)[0].numpy()
    import torch

    def step():
        wanted = [v.detach().requires_grad_() for v in [*values, x]]
        y = delta(wanted[:-1], wanted[-1])
        gradients = torch.autograd.grad(y, wanted, y.detach())
        if y.is_cuda:
            torch.cuda.synchronize()
        return gradients

    return step


def medians(functions, repeats):
    times = {key: [] for key in functions}
    for repeat in range(repeats + 2):
        for key, function in functions.items():
            start = time.perf_counter()
            function()
            # The first two repetitions compile and fill caches.
            if repeat >= 2:
                times[key].append(1e3 * (time.perf_counter() - start))
    return {key: statistics.median(t) for key, t in times.items()}


def delta_lines(arguments):
    """Yields `(what, over, {size: ms})`."""
    import keras_randadapt as kra

    methods = (("LoRA", kra.LoRA, 8), ("RLoRA", kra.RLoRA, 512))
    dims = DIMS[:2] if arguments.quick else DIMS
    ranks = RANKS[:2] if arguments.quick else RANKS
    tokens = TOKENS[:2] if arguments.quick else TOKENS
    for name, make, fixed in (*methods, ("VeRA", kra.VeRA, 256)):
        lines = (
            (
                f"{name}({fixed}), 512 tokens",
                "dimension",
                {d: delta_step(lambda: make(fixed), d, 512) for d in dims},
            ),
            (
                f"{name}, d = 2048, 512 tokens",
                "rank",
                {r: delta_step(lambda: make(r), 2048, 512) for r in ranks},
            ),
            (
                f"{name}({fixed}), d = 1024",
                "tokens",
                {t: delta_step(lambda: make(fixed), 1024, t) for t in tokens},
            ),
        )
        for what, over, steps in lines:
            yield what, over, medians(steps, arguments.repeats)


def deep_model(sites, dim=64):
    import keras

    inputs = x = keras.Input((dim,))
    for i in range(sites):
        x = keras.layers.Dense(dim, name=f"dense_{i}")(x)
    return keras.Model(inputs, x)


def deep_llama(sites):
    """A Llama with seven sites a layer; 64 layers have 0.8 G weights."""
    import keras_hub

    return keras_hub.models.LlamaBackbone(
        vocabulary_size=1000,
        num_layers=sites // 7,
        num_query_heads=16,
        num_key_value_heads=16,
        hidden_dim=1024,
        intermediate_dim=2816,
    )


def model_lines(arguments, make=deep_model, kind="Dense"):
    """The lines of building a model and of operations on all its sites."""
    import keras_randadapt as kra

    times = {}
    sites = SITES[:2] if arguments.quick else SITES

    def timed(what, size, function):
        start = time.perf_counter()
        result = function()
        elapsed = 1e3 * (time.perf_counter() - start)
        times.setdefault(what, {}).setdefault(size, []).append(elapsed)
        return result

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "adapter.safetensors")
        for _ in range(arguments.repeats):
            for n in sites:
                model = timed("build the model", n, lambda: make(n))
                adapter = kra.RLoRA(64)
                targets = "all-linear"
                timed("inject", n, lambda: kra.inject(model, adapter, targets))
                timed("save", n, lambda: kra.save_adapter(model, file))
                timed("eject", n, lambda: kra.eject(model))
                timed("load", n, lambda: kra.load_adapter(model, file))
                timed("merge", n, lambda: kra.merge(model))
    for what, by_sites in times.items():
        yield (
            f"{kind}: {what}",
            "sites",
            {n: statistics.median(t) for n, t in by_sites.items()},
        )


def llama_lines(arguments):
    """The lines of a model whose weights take time to make."""
    once = argparse.Namespace(**{**vars(arguments), "repeats": 1})
    yield from model_lines(once, deep_llama, "Llama")


def held_lines(arguments):
    """The lines of one active adapter among several that a model holds."""
    import keras_randadapt as kra

    x = np.random.default_rng(0).standard_normal((64, 64), "float32")
    predict, switch = {}, {}
    for held in HELD[:2] if arguments.quick else HELD:
        model = deep_model(SITES[0] if arguments.quick else 112)
        for i in range(held):
            kra.inject(model, kra.LoRA(8, seed=i), "all-linear", name=f"a{i}")
        kra.set_active(model, "a0")
        turns = itertools.cycle([f"a{held - 1}", "a0"])
        predict[held] = lambda model=model: model.predict_on_batch(x)
        switch[held] = lambda model=model, turns=turns: kra.set_active(
            model, next(turns)
        )
    yield "predict, 112 sites", "adapters held", medians(predict, 9)
    yield "set_active, 112 sites", "adapters held", medians(switch, 9)


def exponents(times):
    """The exponent over all sizes, and that over the last two."""
    sizes = np.log(list(times))
    logs = np.log(list(times.values()))
    last = (logs[-1] - logs[-2]) / (sizes[-1] - sizes[-2])
    return np.polyfit(sizes, logs, 1)[0], last


def rows(arguments):
    lines = []
    for part in (delta_lines, model_lines, llama_lines, held_lines):
        for what, over, times in part(arguments):
            lines.append((what, over, times))
            yield (
                what,
                over,
                ", ".join(f"{size:,}" for size in times),
                ", ".join(f"{t:.{digits(t)}f}" for t in times.values()),
                *exponents(times),
            )
    if arguments.picture:
        draw(lines, arguments.picture)


def digits(number):
    """The digits after the point that show two or three significant ones."""
    return max(0, 1 - math.floor(math.log10(number)))


def draw(lines, path):
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(over for _, over, _ in lines))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4 * len(kinds), 5), layout="constrained"
    )
    for axis, kind in zip(axes, kinds):
        sizes = set()
        for what, over, times in lines:
            if over == kind:
                style = "--" if what.startswith("Llama") else "-"
                axis.loglog(*zip(*times.items()), style, marker="o", label=what)
                sizes |= set(times)
        axis.set_xticks(sorted(sizes), sorted(sizes), fontsize=7)
        axis.set_xticks([], minor=True)
        axis.set_xlabel(kind)
        # The legend goes below, since twelve lines leave no room.
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.15))
    axes[0].set_ylabel("ms")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    side_by_side.main(
        __doc__,
        COLUMNS,
        rows,
        repeats=dict(type=int, default=5),
        quick=dict(action="store_true", help="the two smallest sizes"),
        picture=dict(type=pathlib.Path, help="draw the table into this file"),
    )
