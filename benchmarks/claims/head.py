"""RM-LoRA on a classification layer, as in its paper's figure 1 and table 5.

Questions of banking77 are TF-IDF features, which are computed once. An adapter
trains the frozen layer on top of them.
"""

import collections
import csv
import functools
import math
import pathlib
import re

import keras
import numpy as np

import keras_randadapt as kra
from benchmarks.claims import training

#: The most frequent words are features, as many as the paper's model has.
WORDS = 768
HELD_OUT_A_CLASS = 10
BATCH = 32


def questions(folder):
    """The questions of banking77 and their intents.

    Args:
        folder: The folder with the data sets.

    Returns:
        Training texts, training labels, test texts and test labels. Labels are
        int32. The order is a fixed draw that does not depend on the file's.

    Raises:
        ValueError: If no folder is given.
    """
    if folder is None:
        raise ValueError(
            "This experiment needs banking77_train.csv and "
            "banking77_test.csv. Name their folder with --data. "
            "benchmarks/quality/DATA.md says where they come from."
        )
    parts = [_rows(folder, part) for part in ("train", "test")]
    names = sorted({label for _, label in parts[0]})
    found = []
    for rows in parts:
        found.append([text for text, _ in rows])
        numbers = [names.index(label) for _, label in rows]
        found.append(np.array(numbers, "int32"))
    return tuple(found)


def _rows(folder, part):
    path = pathlib.Path(folder, f"banking77_{part}.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    rows.sort()
    order = np.random.default_rng(77).permutation(len(rows))
    return [rows[i] for i in order]


@functools.cache
def features(folder):
    """TF-IDF features of all questions, of norm `sqrt(WORDS)`.

    A network's last features have such a norm, because a layer normalization
    makes them. It matters: with orthogonal factors the update has singular
    values of 1, and features of norm 1 would give no logit above 1.

    Args:
        folder: string, the folder with the data sets.

    Returns:
        Training features, training labels, test features and test labels, in
        the order of `questions`.
    """
    train, labels, test, test_labels = questions(folder)
    counts = collections.Counter(
        word for text in train for word in set(_words(text))
    )
    # Words of one count are in the order of the alphabet.
    known = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
    index = {word: i for i, word in enumerate(known)}
    idf = np.array([math.log(len(train) / counts[word]) for word in known])

    def of(texts):
        x = np.zeros((len(texts), len(known)), "float32")
        for row, text in zip(x, texts):
            for word in _words(text):
                if word in index:
                    row[index[word]] += 1
        x *= idf
        norms = np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
        x *= math.sqrt(WORDS) / norms
        return x

    return of(train), labels, of(test), test_labels


def _words(text):
    return re.findall(r"[a-z]+", text.lower())


def few(labels, per_class, seed):
    """Indices of training examples: so many of each class, none held out."""
    order = np.random.default_rng([26, seed]).permutation(len(labels))
    held_out = set(held_out_indices(labels))
    taken = collections.Counter()
    chosen = []
    for i in order:
        label = labels[i]
        if i not in held_out and taken[label] < per_class:
            taken[label] += 1
            chosen.append(i)
    return np.array(chosen)


@functools.cache
def _held_out(labels):
    taken = collections.Counter()
    chosen = []
    for i, label in enumerate(labels):
        if taken[label] < HELD_OUT_A_CLASS:
            taken[label] += 1
            chosen.append(i)
    return chosen


def held_out_indices(labels):
    """Indices of the held-out examples, the same for every seed."""
    return _held_out(tuple(labels.tolist()))


class _Curves(keras.callbacks.Callback):
    """Accuracies and the test loss after every epoch."""

    def __init__(self, parts):
        super().__init__()
        self._parts = parts
        self.curves = {name: [] for name in (*parts, "test_loss")}

    def on_epoch_end(self, epoch, logs=None):
        for name, (x, y) in self._parts.items():
            outputs = training.logits(self.model, x)
            accuracy = 100 * training.accuracy(outputs, y)
            self.curves[name].append(round(accuracy, 3))
            if name == "test":
                loss = _cross_entropy(outputs, y)
                self.curves["test_loss"].append(round(loss, 4))


def _cross_entropy(outputs, labels):
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(labels)), labels]
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - chosen))


def run(*, seed, final, data, arguments):
    """One run.

    Args:
        seed: int. It determines the examples, the layer's frozen weights, the
            adapter and the masks.
        final: bool. Whether to measure on test examples, at every epoch.
        data: The folder with the data sets.
        arguments: dict with `rank`, `per_class`, `epochs` and `rate`, and
            optionally `scaling` (1), `orthogonality` (0), `update_share` (1),
            the share of the rank that a step trains, and `decay` (0), of the
            weights.

    Returns:
        A dict with `held_out`, or with `test`, `train`, `gap`,
        `stopped` (the test accuracy after the epoch that was best on held-out
        examples), `rank`, `orthogonality_loss` and `curves`, in percent.
    """
    training.keep_compiled_programs()
    x, y, test_x, test_y = features(data)
    keras.utils.set_random_seed(seed)
    layer = keras.layers.Dense(
        int(y.max()) + 1,
        name="site",
        kernel_initializer=keras.initializers.GlorotUniform(seed),
    )
    model = keras.Sequential([keras.Input((x.shape[1],)), layer])
    rank = arguments["rank"]
    share = arguments.get("update_share", 1.0)
    adapter = kra.RMLoRA(
        rank,
        orthogonality=arguments.get("orthogonality", 0.0),
        update_rank=max(1, round(share * rank)),
        scaling=arguments.get("scaling", 1.0),
        seed=seed,
    )
    kra.inject(model, adapter, "site")
    optimizer = keras.optimizers.AdamW(
        arguments["rate"], weight_decay=arguments.get("decay", 0.0)
    )
    model.compile(optimizer, training.classification_loss())
    chosen = few(y, arguments["per_class"], seed)
    held_out = held_out_indices(y)
    parts = {"train": (x[chosen], y[chosen]), "test": (test_x, test_y)}
    if final:
        parts["held_out"] = (x[held_out], y[held_out])
    curves = _Curves(parts)
    model.fit(
        x[chosen],
        y[chosen],
        batch_size=BATCH,
        epochs=arguments["epochs"],
        verbose=0,
        callbacks=[curves] if final else [],
    )
    if not final:
        outputs = training.logits(model, x[held_out])
        return {"held_out": 100 * training.accuracy(outputs, y[held_out])}
    return {**_numbers(model, curves.curves), "curves": curves.curves}


def _numbers(model, curves):
    best = int(np.argmax(curves["held_out"]))
    analysis = kra.analysis
    return {
        "test": curves["test"][-1],
        "train": curves["train"][-1],
        "gap": curves["train"][-1] - curves["test"][-1],
        "stopped": curves["test"][best],
        "stopped_epoch": best + 1,
        "rank": analysis.intrinsic_rank(model, tolerance=0.01)["rank"][0],
        "orthogonality_loss": float(
            analysis.orthogonality_loss(model)["orthogonality_loss"][0]
        ),
    }
