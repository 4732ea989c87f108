"""GaLore's table on a small language model: full, low-rank, LoRA, ReLoRA.

    KERAS_BACKEND=jax python benchmarks/quality/galore.py
    KERAS_BACKEND=jax python benchmarks/quality/galore.py --quick

A transformer of four layers, 128 wide and with 0.8 million weights, learns the
characters of Shakespeare's plays (`tinyshakespeare.txt`, see DATA.md) from
random weights. As in the table of the GaLore paper, kernels of attention and
feed-forward networks have a rank of half of the width, 64, and everything else
is trained as usual. The rows are

- "full rank": every weight, by Adam;
- "GaLore" and "GaLore, two-sided": the same with `kra.optimizers.GaLore`;
- "low rank": kernels that are products of two trained factors, without a
  frozen part;
- "LoRA": random kernels that are frozen, and an update of rank 64;
- "ReLoRA": the same, but the update is merged and begun anew three times, with
  a fresh optimizer and a short warm-up, so that the sum has a higher rank.

The measure is nats a character on the last tenth of the text, which is not
trained on; its exponential is the perplexity. "state" is the number of values
in the optimizer. The rate of every row is searched on one seed. Every run is a
row of results/galore.csv; those that are there are not made again.
"""

import argparse
import os
import pathlib
import statistics

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import data
import experiment
import keras
import numpy as np
import recipe

import keras_randadapt as kra

LENGTH = 64
BATCH = 16
RESTARTS = 4
PATH = pathlib.Path(__file__).parent / "results" / "galore.csv"
RATES = (1e-3, 3e-3, 1e-2)
METHODS = (
    "full rank",
    "GaLore",
    "GaLore, two-sided",
    "low rank",
    "LoRA",
    "ReLoRA",
)
KERNELS = ["query", "key", "value", "out", "up", "down"]


def corpus():
    """Characters as integers: those to train on and those held out."""
    path = data.directory() / "tinyshakespeare.txt"
    text = path.read_text(encoding="utf-8")
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    ids = np.array([letters[letter] for letter in text], "int32")
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], len(letters)


def batches(ids, count, seed):
    """`count` inputs of `LENGTH` characters, and the characters behind."""
    starts = np.random.default_rng([5, seed]).integers(
        0, len(ids) - LENGTH - 1, count
    )
    rows = ids[starts[:, None] + np.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


class Places(keras.layers.Layer):
    """Adds a trained vector for each place of the sequence."""

    def build(self, shape):
        self.vectors = self.add_weight(
            name="vectors", shape=shape[1:], initializer="normal"
        )

    def call(self, x):
        return x + self.vectors


class Attention(keras.layers.Layer):
    """Causal attention of one sequence with itself, by four Dense layers."""

    def __init__(self, width, heads, **kwargs):
        super().__init__(**kwargs)
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            keras.layers.Dense(width, use_bias=False, name=name)
            for name in KERNELS[:4]
        )

    def build(self, shape):
        for layer in (self.query, self.key, self.value, self.out):
            layer.build(shape)

    def call(self, x):
        _, length, width = x.shape
        size = width // self.heads
        q, k, v = (
            keras.ops.reshape(layer(x), (-1, length, self.heads, size))
            for layer in (self.query, self.key, self.value)
        )
        y = keras.ops.dot_product_attention(q, k, v, is_causal=True)
        return self.out(keras.ops.reshape(y, (-1, length, width)))


def language_model(vocabulary, width, layers, seed):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(vocabulary, width, name="embedding")(inputs)
    x = Places(name="places")(x)
    for i in range(layers):
        y = keras.layers.LayerNormalization(name=f"attention_norm_{i}")(x)
        x = x + Attention(width, 4, name=f"attention_{i}")(y)
        y = keras.layers.LayerNormalization(name=f"network_norm_{i}")(x)
        y = keras.layers.Dense(
            4 * width, activation="gelu", use_bias=False, name=f"block_{i}_up"
        )(y)
        x = x + keras.layers.Dense(
            width, use_bias=False, name=f"block_{i}_down"
        )(y)
    x = keras.layers.LayerNormalization(name="norm")(x)
    outputs = keras.layers.Dense(vocabulary, name="logits")(x)
    return keras.Model(inputs, outputs)


def kernel_layers(model):
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Dense) and layer.name != "logits"
    ]


def others(model):
    """The names of the layers that every method trains in full."""
    return [
        layer.name
        for layer in model.layers
        if layer.name in ("embedding", "places", "logits", "norm")
        or "_norm_" in layer.name
    ]


def inject(model, rank, seed, b_initializer="zeros"):
    adapter = kra.LoRA(
        rank, scaling=1.0, seed=seed, b_initializer=b_initializer
    )
    sites = {id(layer) for layer in kernel_layers(model)}
    kra.inject(
        model,
        adapter,
        lambda layer: id(layer) in sites,
        keep_trainable=others(model),
    )


def train(method, rate, seed, steps, width, layers, rank):
    """One run.

    Returns:
        A dict with the held-out nats a character and the optimizer's state.
    """
    training, held_out, vocabulary = corpus()
    model = language_model(vocabulary, width, layers, seed)
    x, y = batches(training, steps * BATCH, seed)
    parts = RESTARTS if method == "ReLoRA" else 1
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    size = steps // parts
    for part in range(parts):
        warmup = max(1, size // 10)
        optimizer = keras.optimizers.Adam(
            recipe.LinearWarmup(rate, warmup, size)
            if parts == 1
            else Restart(rate, warmup, part * size, steps)
        )
        if method.startswith("GaLore"):
            optimizer = kra.optimizers.GaLore(
                optimizer,
                rank,
                update_interval=max(1, steps // 10),
                scale=1.0,
                paths="(query|key|value|out|up|down)/kernel",
                two_sided=method.endswith("two-sided"),
            )
        elif method != "full rank":
            if part:
                kra.merge(model)
            initializer = "zeros"
            if method == "low rank":
                # The product has entries of the size of the kernels'.
                initializer = {"name": "normal", "stddev": (3 / rank) ** 0.5}
                for layer in kernel_layers(model):
                    layer.kernel.assign(np.zeros(layer.kernel.shape))
            inject(model, rank, 100 * seed + part, initializer)
        model.compile(optimizer, loss)
        rows = slice(part * size * BATCH, (part + 1) * size * BATCH)
        model.fit(x[rows], y[rows], batch_size=BATCH, shuffle=False, verbose=0)
    nats = model.evaluate(*batches(held_out, 512, 0), verbose=0)
    state = sum(int(np.prod(v.shape)) for v in model.optimizer.variables)
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    return {"nats": float(nats), "state": state, "trained": trained}


@keras.saving.register_keras_serializable(package="benchmarks")
class Restart(keras.optimizers.schedules.LearningRateSchedule):
    """One part of a linear schedule, with a warm-up of its own."""

    def __init__(self, rate, warmup, start, steps):
        self.rate = rate
        self.warmup = warmup
        self.start = start
        self.steps = steps

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        left = (self.steps - self.start - step) / self.steps
        rise = (step + 1) / self.warmup
        return self.rate * keras.ops.minimum(left, rise)

    def get_config(self):
        return {
            "rate": self.rate,
            "warmup": self.warmup,
            "start": self.start,
            "steps": self.steps,
        }


def run(results, method, rate, seed, sizes):
    key = {"method": method, "rate": rate, "seed": seed, **sizes}
    numbers = results.find(**key)
    if numbers is None:
        numbers = train(method, rate, seed, **sizes)
        results.add(numbers, **key)
    return numbers


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a toy's sizes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--results", default=PATH)
    arguments = parser.parse_args()
    sizes = {
        "steps": arguments.steps,
        "width": 128,
        "layers": 4,
        "rank": 64,
    }
    if arguments.quick:
        sizes = {"steps": 8, "width": 16, "layers": 1, "rank": 4}
    results = experiment.Results(arguments.results)
    print("| method | rate | nats a character | trained | state |")
    print("| --- | --- | --- | --- | --- |")
    for method in METHODS:
        found = {
            rate: run(results, method, rate, 1000, sizes)["nats"]
            for rate in (RATES[:1] if arguments.quick else RATES)
        }
        rate = min(found, key=found.get)
        runs = [
            run(results, method, rate, seed, sizes)
            for seed in range(arguments.seeds)
        ]
        nats = [one["nats"] for one in runs]
        spread = f" ± {statistics.stdev(nats):.3f}" if len(nats) > 1 else ""
        print(
            f"| {method} | {rate:g} | {statistics.mean(nats):.3f}{spread} "
            f"| {runs[0]['trained']:,} | {runs[0]['state']:,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
