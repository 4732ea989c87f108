"""Few examples of text on MiniLM, whose lower layers are computed once.

The hidden states below the adapted layers never change, so they are computed
for all texts and kept in a file. A run trains the upper layers only.
"""

import functools
import os
import pathlib
import sys
import typing

import keras
import numpy as np

import keras_randadapt as kra
from benchmarks.claims import head
from benchmarks.claims import training

ROOT = pathlib.Path(__file__).parents[2]
for folder in ("examples", "benchmarks/quality"):
    sys.path.append(str(ROOT / folder))

import classifier  # noqa: E402
import data as datasets  # noqa: E402
import packaged  # noqa: E402

#: Texts are cut to so many tokens.
LENGTHS = {"sst2": 32, "rt_polarity": 40, "banking77": 24}
LAYERS = 6
BATCH = 32
#: Early stopping holds out a fifth of the examples.
SHARE_TO_STOP = 0.2
TARGETS = ["query", "value"]
#: The most test examples, and the most held-out ones.
TEST, HELD_OUT = 1540, 770


class Texts(typing.NamedTuple):
    """Texts of a data set: those to train on, held-out ones, and the test's."""

    train: tuple
    held_out: tuple
    test: tuple


def texts_of(task, folder):
    """The texts of a task and their classes.

    Args:
        task: `"sst2"`, `"rt_polarity"` or `"banking77"`.
        folder: The folder with the data sets.

    Returns:
        `Texts`, pairs of a list and an array.
    """
    if folder is None:
        raise ValueError(
            f"This experiment needs the files of {task}. Name their folder "
            "with --data. benchmarks/quality/DATA.md says where they are from."
        )
    if task == "banking77":
        rows, labels, test, test_labels = head.questions(folder)
        held_out = head.held_out_indices(labels)
        kept = sorted(set(range(len(rows))) - set(held_out))
        parts = [
            ([rows[i] for i in chosen], labels[chosen])
            for chosen in (kept, held_out)
        ]
        return Texts(*parts, (test, test_labels))
    os.environ[datasets.VARIABLE] = str(folder)
    return Texts(*map(tuple, getattr(datasets, task)()))


@functools.cache
def _minilm(length):
    _, backbone, preprocessor = classifier.load("minilm", 2, length)
    return backbone, preprocessor


@functools.cache
def states_of(task, first, folder):
    """What goes into layer `first` for every text of a task.

    Args:
        task: A name in `LENGTHS`.
        first: int, at least 1, the first layer that is adapted.
        folder: The folder with the data sets.

    Returns:
        A `Texts` of `((states, mask), labels)`. States are float16, since
        their file would otherwise be twice as large.
    """
    texts = texts_of(task, folder)
    sizes = (None, HELD_OUT, TEST)
    texts = [(list(x[:n]), y[:n]) for (x, y), n in zip(texts, sizes)]
    path = packaged.cache_dir() / "claims" / f"{task}-{first}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {}
        for name, (inputs, _) in zip(Texts._fields, texts):
            states, mask = _compute(inputs, LENGTHS[task], first)
            arrays |= {f"{name}_states": states, f"{name}_mask": mask}
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **arrays)
        # An interrupted run must not leave half of a file.
        os.replace(partial, path)
    with np.load(path) as file:
        parts = [
            ((file[f"{name}_states"], file[f"{name}_mask"]), labels)
            for name, (_, labels) in zip(Texts._fields, texts)
        ]
    for (states, _), labels in parts:
        if len(states) != len(labels):
            raise ValueError(
                f"{path} was made of other data sets. Remove it to make it "
                f"again. Received: {len(labels)} texts, and the file has "
                f"{len(states)}."
            )
    return Texts(*parts)


def _compute(inputs, length, first):
    backbone, preprocessor = _minilm(length)
    last = backbone.get_layer(f"transformer_layer_{first - 1}")
    below = keras.Model(backbone.input, last.output)
    tokens = classifier.tokenize(preprocessor, inputs)
    states = below.predict(tokens, batch_size=128, verbose=0)
    return states.astype("float16"), tokens["padding_mask"].astype(bool)


@functools.cache
def _upper(task, first, classes):
    """The layers from `first` on, a mean of tokens and a head."""
    backbone, _ = _minilm(LENGTHS[task])
    layer = backbone.get_layer(f"transformer_layer_{first - 1}")
    states = keras.Input(tuple(layer.output.shape[1:]))
    mask = keras.Input((states.shape[1],), dtype="bool")
    x = states
    for i in range(first, LAYERS):
        layer = backbone.get_layer(f"transformer_layer_{i}")
        x = layer(x, padding_mask=mask)
    x = keras.layers.GlobalAveragePooling1D()(x, mask=mask)
    x = keras.layers.Dense(classes, name=classifier.HEAD)(x)
    return keras.Model([states, mask], x)


def _reset_head(layer, seed):
    generator = np.random.default_rng([30, seed])
    shape = tuple(layer.kernel.shape)
    kernel = generator.normal(size=shape) / np.sqrt(shape[0])
    layer.set_weights([kernel, np.zeros(shape[1])])


def run(*, seed, final, data, arguments):
    """One run.

    Args:
        seed: int. It determines the examples, the head, the batches and the
            adapter.
        final: bool. Whether to measure on test examples.
        data: The folder with the data sets.
        arguments: dict with `task`, `first`, `per_class`, `epochs` and
            `head_rate`, and, unless the head alone is trained, `adapter`,
            `options` and `rate`. Optionally, `strength` and `head_strength` of
            the PAC-Bayes term, `decay` of the weights, and `patience` of early
            stopping, which holds out a fifth of the examples.

    Returns:
        A dict with `held_out` or `test` and `train`, accuracies in percent.
    """
    training.keep_compiled_programs()
    task, first = arguments["task"], arguments["first"]
    parts = states_of(task, first, data)
    labels = parts.train[1]
    model = _upper(task, first, int(labels.max()) + 1)
    keras.utils.set_random_seed(seed)
    _reset_head(model.get_layer(classifier.HEAD), seed)
    chosen = few(labels, arguments["per_class"], seed)
    x, y = _pick(parts.train, chosen)
    adapter = None
    if "adapter" in arguments:
        adapter = training.adapter_of(arguments, seed)
    flags = [layer.trainable for layer in model.layers]
    try:
        if adapter is None:
            for layer in model.layers:
                layer.trainable = layer.name == classifier.HEAD
        else:
            kra.inject(model, adapter, TARGETS, keep_trainable=classifier.HEAD)
        _train(model, x, y, arguments, adapter is not None)
        measured = parts.test if final else parts.held_out
        measured = _pick(measured, slice(None))
        outputs = training.logits(model, measured[0])
        train = training.accuracy(training.logits(model, x), y)
    finally:
        if adapter is not None and kra.sites(model):
            kra.eject(model)
        for layer, flag in zip(model.layers, flags):
            layer.trainable = flag
    return {
        "test" if final else "held_out": 100
        * training.accuracy(outputs, measured[1]),
        "train": 100 * train,
    }


def few(labels, per_class, seed):
    """Indices of so many examples of each class, or all that a class has.

    Classes take turns, because early stopping holds out the first examples.
    """
    order = np.random.default_rng([31, seed]).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        found = order[labels[order] == label][:per_class]
        chosen += [(turn, label, i) for turn, i in enumerate(found)]
    return np.array([i for _, _, i in sorted(chosen)])


def _pick(part, chosen):
    (states, mask), labels = part
    return [states[chosen].astype("float32"), mask[chosen]], labels[chosen]


def _train(model, x, y, arguments, adapted):
    decay = arguments.get("decay", 0.0)
    optimizer = keras.optimizers.AdamW(
        arguments["head_rate"], weight_decay=decay
    )
    if adapted:
        optimizer = kra.optimizers.learning_rate_groups(
            model,
            optimizer,
            adapter=arguments["rate"],
            head=arguments["head_rate"],
        )
    model.compile(optimizer, training.classification_loss())
    callbacks, validation = [], None
    strength = arguments.get("strength", 0.0)
    head_strength = arguments.get("head_strength", 0.0)
    if strength or head_strength:
        callbacks.append(
            kra.callbacks.PACBayes(
                x, y, strength=strength, head_strength=head_strength
            )
        )
    if "patience" in arguments:
        callbacks.append(
            keras.callbacks.EarlyStopping(
                "val_loss",
                patience=arguments["patience"],
                restore_best_weights=True,
            )
        )
        kept = round(SHARE_TO_STOP * len(y))
        validation = [one[:kept] for one in x], y[:kept]
        x, y = [one[kept:] for one in x], y[kept:]
    model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=arguments["epochs"],
        verbose=0,
        validation_data=validation,
        callbacks=callbacks,
    )
