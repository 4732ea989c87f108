"""Does rank matter at equal size? Updates of known rank have to be learned.

A frozen network with one adapted site learns from a teacher, which is the same
network with an update of a known rank at that site. All adapters have about 500
trained weights.
"""

import math

import keras
import numpy as np

import keras_randadapt as kra
from benchmarks.claims import training

DIM = 64
#: The norm of the update, as a share of the kernel's.
SHARE = 0.5
#: The noise of the targets, as a share of what the update changes. Without it
#: an adapter of the teacher's rank would learn it to the last digit.
NOISE = 0.1
TRAIN, HELD_OUT, TEST = 4096, 2048, 4096
BATCH, EPOCHS = 64, 30


def update(generator, rank, decay):
    """An update of norm 1 and a known rank.

    Args:
        generator: A NumPy generator.
        rank: int.
        decay: float. The i-th singular value is proportional to `i**-decay`.

    Returns:
        Array of shape `(DIM, DIM)`.
    """
    left, _ = np.linalg.qr(generator.normal(size=(DIM, DIM)))
    right, _ = np.linalg.qr(generator.normal(size=(DIM, DIM)))
    values = np.arange(1.0, rank + 1) ** -decay
    delta = left[:, :rank] * values @ right[:, :rank].T
    return delta / np.linalg.norm(delta)


def student():
    """The frozen network, whose weights `run` sets."""
    return keras.Sequential(
        [
            keras.Input((DIM,)),
            keras.layers.Dense(DIM, activation="gelu", name="site"),
            keras.layers.Dense(DIM, name="out"),
        ]
    )


def run(*, seed, final, data, arguments):
    """One run.

    Args:
        seed: int. It determines the network, the update, the examples and the
            adapter's frozen matrices.
        final: bool. Whether to measure on test examples.
        data: Not used.
        arguments: dict with `teacher_rank`, `decay` of its singular values,
            `adapter`, `options` and `rate`.

    Returns:
        A dict with `held_out` or `gain`: the natural logarithm of the ratio of
        the frozen network's squared error to that of the trained one.
    """
    training.keep_compiled_programs()
    keras.utils.set_random_seed(seed)
    generator = np.random.default_rng([25, seed])
    model = student()
    kernel, out = generator.normal(size=(2, DIM, DIM)) / math.sqrt(DIM)
    delta = update(generator, arguments["teacher_rank"], arguments["decay"])
    delta *= SHARE * np.linalg.norm(kernel)
    zeros = np.zeros(DIM)
    x = generator.normal(size=(TRAIN + HELD_OUT + TEST, DIM)).astype("float32")
    model.set_weights([kernel + delta, zeros, out, zeros])
    y = _outputs(model, x)
    model.set_weights([kernel, zeros, out, zeros])
    change = np.std(y - _outputs(model, x))
    y = y + NOISE * change * generator.normal(size=y.shape)

    report = kra.inject(model, training.adapter_of(arguments, seed), "site")
    steps = EPOCHS * TRAIN // BATCH
    rate = keras.optimizers.schedules.CosineDecay(arguments["rate"], steps)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.0)
    model.compile(optimizer, "mse")
    part = slice(TRAIN, TRAIN + HELD_OUT)
    if final:
        part = slice(TRAIN + HELD_OUT, None)
    before = np.mean((_outputs(model, x[part]) - y[part]) ** 2)
    model.fit(x[:TRAIN], y[:TRAIN].astype("float32"), BATCH, EPOCHS, verbose=0)
    after = np.mean((_outputs(model, x[part]) - y[part]) ** 2)
    gain = math.log(before / after)
    numbers = {"parameters": report.adapter_parameters}
    if not final:
        return {**numbers, "held_out": gain}
    rank = kra.analysis.intrinsic_rank(model, tolerance=0.01)["rank"]
    return {**numbers, "gain": gain, "rank": float(np.mean(rank))}


def _outputs(model, x):
    return model.predict(x, batch_size=2048, verbose=0).astype("float64")
