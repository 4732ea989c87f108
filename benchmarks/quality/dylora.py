"""DyLoRA's table of every rank, on a teacher of known spectrum.

    KERAS_BACKEND=jax python benchmarks/quality/dylora.py --seeds 5

The table of the DyLoRA paper compares, at each rank, a DyLoRA that was trained
once with a LoRA of the largest rank that is cut. A network of one tanh layer
of 32 units learns the outputs of a teacher, which is the same network with an
update of rank 8 whose singular values fall by a third from one to the next.
Every row is trained on 1,000 examples in 60 epochs at the rate of the grid
that has the least loss on held-out examples at the largest rank, and the table
has the loss on 2,000 others divided by that of the network without training.
The ways to get a rank `b` are

- "LoRA, trained at b": a LoRA of rank `b`, the aim;
- "LoRA(8), cut": the first `b` directions of a LoRA of rank 8, at the scale
  `alpha / b`, as in the paper;
- "LoRA(8), cut by SVD": the `b` largest singular values of its update;
- "DyLoRA", "DyLoRA, frozen" and "DyLoRA, geometric": `kra.truncate` of a
  DyLoRA of rank 8. The last draws rank `b` with a probability of `0.7**b`.

Every run is a row of results/dylora.csv; those that are there are not made
again.
"""

import argparse
import os
import pathlib
import statistics

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import experiment
import keras
import numpy as np

import keras_randadapt as kra

WIDTH = 32
RANK = 8
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
EPOCHS = 60
PATH = pathlib.Path(__file__).parent / "results" / "dylora.csv"

METHODS = {
    "LoRA": lambda seed: kra.LoRA(RANK, alpha=RANK, seed=seed),
    "DyLoRA": lambda seed: kra.DyLoRA(RANK, alpha=RANK, seed=seed),
    "DyLoRA, frozen": lambda seed: kra.DyLoRA(
        RANK, alpha=RANK, frozen=True, seed=seed
    ),
    "DyLoRA, geometric": lambda seed: kra.DyLoRA(
        RANK,
        alpha=RANK,
        probabilities=[0.7**b for b in range(1, RANK + 1)],
        seed=seed,
    ),
}


def problem(seed):
    """The network, and the teacher's inputs and outputs in three parts."""
    generator = np.random.default_rng([11, seed])
    first, kernel, last = generator.normal(size=(3, WIDTH, WIDTH))
    left, right = (
        np.linalg.qr(generator.normal(size=(WIDTH, RANK)))[0] for _ in range(2)
    )
    update = (left * 4 * 1.5 ** -np.arange(RANK)) @ right.T
    arrays = [one / WIDTH**0.5 for one in (first, kernel, last)]
    inputs = keras.Input((WIDTH,))
    x = inputs
    for name in ("first", "site", "last"):
        activation = None if name == "last" else "tanh"
        x = keras.layers.Dense(
            WIDTH, activation=activation, use_bias=False, name=name
        )(x)
    model = keras.Model(inputs, x)
    for layer, array in zip(model.layers[1:], arrays):
        layer.kernel.assign(array.astype("float32"))
    x = generator.normal(size=(3500, WIDTH))
    hidden = np.tanh(np.tanh(x @ arrays[0]) @ (arrays[1] + update))
    x, y = x.astype("float32"), (hidden @ arrays[2]).astype("float32")
    parts = [slice(0, 1000), slice(1000, 1500), slice(1500, None)]
    return model, [(x[part], y[part]) for part in parts]


def train(model, adapter, data, rate):
    kra.inject(model, adapter, "site")
    keras.utils.set_random_seed(adapter.seed)
    model.compile(keras.optimizers.AdamW(rate, weight_decay=0.0), "mse")
    model.fit(*data, epochs=EPOCHS, batch_size=50, verbose=0)


def loss(model, data):
    return float(
        np.mean(
            (model.predict(data[0], batch_size=500, verbose=0) - data[1]) ** 2
        )
    )


def cut_losses(model, name, data):
    """The loss of the trained adapter at each rank, by every way to cut."""
    found = {}
    (adapter,) = model._randadapt.adapters("default").values()
    a, b = (
        keras.ops.convert_to_numpy(v) for v in (adapter.lora_a, adapter.lora_b)
    )
    scaling = adapter.scaling
    kra.eject(model)
    kernel = model.get_layer("site").kernel
    base = keras.ops.convert_to_numpy(kernel)
    left, values, right = np.linalg.svd(scaling * a @ b)
    # The step reads the kernel anew, so one function serves all ranks.
    model.compile(loss="mse")
    for rank in range(1, RANK + 1):
        updates = {"cut": scaling * RANK / rank * a[:, :rank] @ b[:rank]}
        if name == "LoRA":
            svd = (left[:, :rank] * values[:rank]) @ right[:rank]
            updates["cut by SVD"] = svd
        for way, update in updates.items():
            kernel.assign(base + update.astype("float32"))
            found.setdefault(way, []).append(loss(model, data))
    kernel.assign(base)
    return found


def search(results, name):
    """The rate with the least loss at the largest rank, on another seed."""
    found = {}
    for rate in RATES:
        key = {"method": name, "rank": RANK, "rate": rate, "seed": 1000}
        numbers = results.find(**key)
        if numbers is None:
            model, (training, held_out, _) = problem(1000)
            train(model, METHODS[name](1000), training, rate)
            numbers = {"held_out": loss(model, held_out)}
            results.add(numbers, **key)
        found[rate] = numbers["held_out"]
    return min(found, key=found.get)


def run(results, name, rate, seed):
    key = {"method": name, "rank": RANK, "rate": rate, "seed": seed}
    numbers = results.find(**key)
    if numbers is None:
        model, (training, _, test) = problem(seed)
        untrained = loss(model, test)
        train(model, METHODS[name](seed), training, rate)
        numbers = {
            way: [one / untrained for one in losses]
            for way, losses in cut_losses(model, name, test).items()
        }
        results.add(numbers, **key)
    return numbers


def run_at_rank(results, rank, rate, seed):
    key = {"method": "trained", "rank": rank, "rate": rate, "seed": seed}
    numbers = results.find(**key)
    if numbers is None:
        model, (training, _, test) = problem(seed)
        untrained = loss(model, test)
        train(model, kra.LoRA(rank, alpha=rank, seed=seed), training, rate)
        numbers = {"loss": loss(model, test) / untrained}
        results.add(numbers, **key)
    return numbers["loss"]


def table(results, seeds):
    """Yields the name of each row, and its losses of all ranks and seeds."""
    rates = {name: search(results, name) for name in METHODS}
    yield (
        "LoRA, trained at b",
        [
            [
                run_at_rank(results, rank, rates["LoRA"], seed)
                for seed in range(seeds)
            ]
            for rank in range(1, RANK + 1)
        ],
    )
    for name in METHODS:
        runs = [run(results, name, rates[name], seed) for seed in range(seeds)]
        for way in runs[0]:
            title = f"LoRA({RANK}), {way}" if name == "LoRA" else name
            yield title, list(zip(*(one[way] for one in runs)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", default=PATH)
    arguments = parser.parse_args()
    results = experiment.Results(arguments.results)
    ranks = [str(rank) for rank in range(1, RANK + 1)]
    print("| rank b | " + " | ".join(ranks) + " |")
    print("|" + " --- |" * (RANK + 1))
    for title, losses in table(results, arguments.seeds):
        cells = [
            f"{statistics.mean(one):.3f} ± {statistics.stdev(one):.3f}"
            if len(one) > 1
            else f"{one[0]:.3f}"
            for one in losses
        ]
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
