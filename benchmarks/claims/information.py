"""Is the PAC-Bayes term better than early stopping, and when?

A small network is trained on a task of four classes. Then the task changes, and
few examples of the new one are there, some with wrong labels. Adapters learn it
with the term, without it, and with other means against overfitting.
"""

import functools
import typing

import keras
import numpy as np

import keras_randadapt as kra
from benchmarks.claims import training

DIM, LATENT, CLASSES = 64, 8, 4
#: How far the task turns, in radians. Adapting to clean labels gains ten points
#: and more.
TURN = 0.8
PRETRAINING, HELD_OUT, TEST = 4000, 1000, 4000
BATCH, EPOCHS = 16, 40
#: Early stopping holds out a fifth of the examples.
SHARE_TO_STOP = 0.2
SITES = ["first", "second"]
HEAD = "logits"


class World(typing.NamedTuple):
    """What all runs of a seed share."""

    model: keras.Model
    weights: list
    draw: typing.Callable
    """From a count and a number to inputs and labels of the new task."""


def _random_function(generator):
    """A smooth function from the latent space to the classes' scores."""
    first = 1.5 * generator.normal(size=(LATENT, 32)) / np.sqrt(LATENT)
    bias = 0.5 * generator.normal(size=32)
    second = generator.normal(size=(32, CLASSES)) / np.sqrt(32)
    latent = generator.normal(size=(6000, LATENT))

    def scores(z):
        return np.tanh(z @ first + bias) @ second

    # Classes would otherwise be of unequal size.
    known = scores(latent)
    return lambda z: (scores(z) - known.mean(0)) / known.std(0)


def _network():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((DIM,)),
            layers.Dense(DIM, activation="gelu", name=SITES[0]),
            layers.Dense(DIM, activation="gelu", name=SITES[1]),
            layers.Dense(CLASSES, name=HEAD),
        ]
    )


@functools.lru_cache(maxsize=64)
def world(seed):
    """The pretrained network and the two tasks of a seed."""
    keras.utils.set_random_seed(seed)
    generator = np.random.default_rng([27, seed])
    embedding = generator.normal(size=(LATENT, DIM)) / np.sqrt(LATENT)
    old, other = (_random_function(generator) for _ in range(2))

    def examples(count, number, turn):
        own = np.random.default_rng([28, seed, number])
        latent = own.normal(size=(count, LATENT))
        x = latent @ embedding + 0.1 * own.normal(size=(count, DIM))
        scores = np.cos(turn) * old(latent) + np.sin(turn) * other(latent)
        return x.astype("float32"), scores.argmax(1).astype("int32")

    model = _network()
    optimizer = keras.optimizers.AdamW(3e-3)
    model.compile(optimizer, training.classification_loss())
    model.fit(*examples(PRETRAINING, 0, 0.0), 64, 15, verbose=0)

    def draw(count, number):
        return examples(count, number, TURN)

    return World(model, model.get_weights(), draw)


def with_noise(labels, share, seed):
    """Labels of which a share is replaced by another class."""
    generator = np.random.default_rng([29, seed])
    wrong = generator.permutation(len(labels))[: round(share * len(labels))]
    labels = labels.copy()
    step = generator.integers(1, CLASSES, len(wrong))
    labels[wrong] = (labels[wrong] + step) % CLASSES
    return labels


def run(*, seed, final, data, arguments):
    """One run.

    Args:
        seed: int. It determines the network, the tasks, the examples, the
            noise and the adapter.
        final: bool. Whether to measure on test examples.
        data: Not used.
        arguments: dict with `examples`, `noise`, and unless the frozen network
            is measured, `adapter`, `options`, `rate` and `head_rate`.
            Optionally, `strength` and `head_strength` of the PAC-Bayes term,
            `decay` of the weights, and `patience` of early stopping, which
            holds out a fifth of the examples.

    Returns:
        A dict with `held_out` or `test`, in percent, and `train`, the accuracy
        on the training labels.
    """
    training.keep_compiled_programs()
    here = world(seed)
    model = here.model
    model.set_weights(here.weights)
    count = arguments["examples"]
    x, clean = here.draw(count, 1)
    y = with_noise(clean, arguments["noise"], seed)
    keras.utils.set_random_seed(seed)
    adapted = "adapter" in arguments
    epochs = 0
    try:
        if adapted:
            kra.inject(
                model,
                training.adapter_of(arguments, seed),
                SITES,
                keep_trainable=HEAD,
            )
            epochs = _train(model, x, y, arguments)
        measured = here.draw(TEST, 2) if final else here.draw(HELD_OUT, 3)
        outputs = training.logits(model, measured[0])
        train = training.accuracy(training.logits(model, x), y)
    finally:
        if adapted:
            kra.eject(model)
    return {
        "test" if final else "held_out": 100
        * training.accuracy(outputs, measured[1]),
        "train": 100 * train,
        "epochs": epochs,
    }


def _train(model, x, y, arguments):
    """Trains, and returns the number of epochs that the weights are from."""
    optimizer = kra.optimizers.learning_rate_groups(
        model,
        keras.optimizers.AdamW(weight_decay=arguments.get("decay", 0.0)),
        adapter=arguments["rate"],
        head=arguments["head_rate"],
    )
    model.compile(optimizer, training.classification_loss())
    callbacks = []
    validation = None
    strength = arguments.get("strength", 0.0)
    if strength or arguments.get("head_strength", 0.0):
        callbacks.append(
            kra.callbacks.PACBayes(
                x,
                y,
                strength=strength,
                head_strength=arguments.get("head_strength", 0.0),
            )
        )
    stopping = None
    if "patience" in arguments:
        stopping = keras.callbacks.EarlyStopping(
            "val_loss",
            patience=arguments["patience"],
            restore_best_weights=True,
        )
        callbacks.append(stopping)
        kept = round(SHARE_TO_STOP * len(x))
        validation = x[:kept], y[:kept]
        x, y = x[kept:], y[kept:]
    model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=EPOCHS,
        verbose=0,
        validation_data=validation,
        callbacks=callbacks,
    )
    return EPOCHS if stopping is None else stopping.best_epoch + 1
