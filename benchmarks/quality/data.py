"""Datasets of the experiments: the same small subsets on every machine.

The files are not part of this project, since their licences differ and SST-2
states none. DATA.md says what they are and where they come from. They are read
from the folder that the environment variable `KERAS_RANDADAPT_DATA` names, or
from `../shared/data` beside the checkout. Hashes of the rows determine which
rows are used, and a digest of the chosen rows is checked. Figures from two
machines are therefore figures of the same examples.
"""

import collections
import csv
import hashlib
import io
import json
import os
import pathlib
import typing

import numpy as np

VARIABLE = "KERAS_RANDADAPT_DATA"
BESIDE_CHECKOUT = pathlib.Path(__file__).parents[3] / "shared/data"

#: The digest of each dataset's three splits, half a SHA-256; see `_digest`.
DIGESTS = {
    "sst2": "de7549ac9ee19a9f575e30f76db1e221",
    "rt_polarity": "437bbdd9b0f45403b82e4c85e5acee15",
    "e2e": "29b1012e603463d683d22e311ffd7cf9",
    "sign_digits": "fa8f9166f42ec6dd9eeda65f16ab0e4d",
}

#: Two texts of different sentences share at most so many words in a row.
SHARED_WORDS = 4
#: The least number of words in a held-out text. SST-2's training texts include
#: phrases, but its test texts are sentences.
HELD_OUT_WORDS = 8
IMAGE_SIZE = 98


class Split(typing.NamedTuple):
    """Examples in an order that mixes the classes, so that slices do too.

    `inputs` is a list of texts or a uint8 array of images. `labels` is an
    int64 array of classes, or for E2E a list of texts.
    """

    inputs: typing.Any
    labels: typing.Any


def sst2():
    """SST-2: is a phrase or sentence of a film review positive (1) or not (0)?

    Returns:
        Three `Split`s: 2,000 texts for training and 500 held out, drawn from
        the training set of GLUE with an equal share of each class, and for the
        test the 872 sentences of its validation set. GLUE does not publish the
        labels of its test set.
    """
    return _texts("sst2", test_per_class=None)


def rt_polarity():
    """rt_polarity: is a sentence of a film review positive (1) or not (0)?

    Returns:
        Three `Split`s: 2,000 sentences for training, 500 held out and 1,066
        for the test, an equal share of each class.
    """
    return _texts("rt_polarity", test_per_class=533)


def e2e():
    """E2E: from attributes of a restaurant to a sentence about it.

    Returns:
        Three `Split`s with attributes as inputs and sentences as labels: 512
        rows for training, 100 held out and 300 for the test. No attributes
        occur in two of them, nor twice within the last two.
    """
    by_meaning = collections.defaultdict(list)
    for row in _rows("e2e_train.csv", ["mr", "ref"]):
        by_meaning[row["mr"]].append((row["mr"], row["ref"]))
    test = {}
    for row in _shuffled(_rows("e2e_test.csv", ["mr", "ref"]), "e2e"):
        if row["mr"] not in by_meaning:
            test.setdefault(row["mr"], (row["mr"], row["ref"]))
    meanings = _shuffled(by_meaning, "e2e")
    held_out = [_shuffled(by_meaning[mr], "e2e")[0] for mr in meanings[:100]]
    train = [pair for mr in meanings[100:] for pair in by_meaning[mr]]
    train = _shuffled(train, "e2e")[:512]
    splits = [train, held_out, list(test.values())[:300]]
    _check("e2e", splits, [512, 100, 300])
    return tuple(
        Split([mr for mr, _ in rows], [ref for _, ref in rows])
        for rows in splits
    )


def sign_digits():
    """Sign-language digits: photographs of hands that show 0 to 9.

    Returns:
        Three `Split`s of images, uint8 of shape `(n, 98, 98, 3)` (the files'
        100 x 100 pixels less one at each edge, so nothing is interpolated):
        60 a class for training, 40 a class held out and 40 for the test.
    """
    with np.load(_find("sign_digits.npz")) as file:
        content = file["jpeg"].tobytes()
        offsets = file["offsets"].tolist()
        labels = file["labels"].tolist()
        is_test = file["is_validation"].tolist()
    photos = {True: [], False: []}
    for start, end, label, test in zip(offsets, offsets[1:], labels, is_test):
        photos[test].append((content[start:end], label))
    rest = _shuffled(photos[False], "sign_digits", key=lambda row: row[0])
    held_out = _balanced(rest, 40)
    taken = set(held_out)
    train = _balanced([row for row in rest if row not in taken], 60)
    test = _shuffled(photos[True], "sign_digits", key=lambda row: row[0])
    splits = [train, held_out, _balanced(test, 40)]
    _check("sign_digits", splits, [600, 400, 400])
    return tuple(
        Split(
            np.stack([_pixels(jpeg) for jpeg, _ in rows]),
            np.array([label for _, label in rows], "int64"),
        )
        for rows in splits
    )


def few_shot(split, per_class, seed):
    """Draws few examples, as many of each class.

    Args:
        split: A `Split` with classes as labels.
        per_class: The number of examples of each class, at least 1.
        seed: An integer. Another seed draws other examples. With one seed, a
            larger draw includes a smaller one.

    Returns:
        A `Split` of `per_class` times the number of classes examples.

    Raises:
        TypeError: If the labels are no classes, or a number no integer.
        ValueError: If a class has fewer than `per_class` examples, or
            `per_class` is below 1.
    """
    labels = np.asarray(split.labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(
            "`split` should have integer classes as labels. Received labels "
            f"such as {split.labels[0]!r}. Use `sample` to draw texts."
        )
    _check_positive("per_class", per_class)
    _check_integer("seed", seed)
    counts = collections.Counter(labels.tolist())
    smallest = min(counts, key=counts.get)
    if counts[smallest] < per_class:
        raise ValueError(
            f"`per_class` should be at most {counts[smallest]}, the number of "
            f"examples of class {smallest}. Received: per_class={per_class}"
        )
    rows = [(i, labels[i].item()) for i in _indices(labels, seed)]
    return _take(split, [i for i, _ in _balanced(rows, per_class)])


def sample(split, count, seed):
    """Draws few examples, whatever their labels.

    Args:
        split: A `Split`.
        count: The number of examples, at least 1.
        seed: An integer. Another seed draws other examples. With one seed, a
            larger draw includes a smaller one.

    Returns:
        A `Split` of `count` examples.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If `count` is below 1 or above the number of examples.
    """
    _check_positive("count", count)
    _check_integer("seed", seed)
    if count > len(split.labels):
        raise ValueError(
            f"`count` should be at most {len(split.labels)}, the number of "
            f"examples. Received: count={count}"
        )
    return _take(split, _indices(split.labels, seed)[:count])


def _texts(name, test_per_class):
    test_rows = _labelled(f"{name}_validation.csv")
    seen_in_test = {text for text, _ in test_rows}
    test = _shuffled(test_rows, name)
    if test_per_class:
        test = _balanced(test, test_per_class)
    pool = _shuffled(
        [r for r in _labelled(f"{name}_train.csv") if r[0] not in seen_in_test],
        name,
    )
    long = [r for r in pool if len(r[0].split()) >= HELD_OUT_WORDS]
    held_out = _balanced(long, 250)
    overlaps = _Overlaps([text for text, _ in held_out])
    train = _balanced(pool, 1000, refuse=lambda row: overlaps(row[0]))
    splits = [train, held_out, test]
    _check(name, splits, [2000, 500, len(test)])
    return tuple(
        Split(
            [text for text, _ in rows],
            np.array([label for _, label in rows], "int64"),
        )
        for rows in splits
    )


class _Overlaps:
    """Tells whether a text shares a passage with held-out texts.

    The phrases of SST-2 are parts of sentences, often several of one sentence.
    A held-out phrase measures nothing if it is part of a training text.
    """

    def __init__(self, texts):
        self._joined = "\n".join(f" {_folded(text)} " for text in texts)
        self._runs = {run for text in texts for run in self._runs_of(text)}

    def __call__(self, text):
        if f" {_folded(text)} " in self._joined:
            return True
        return not self._runs.isdisjoint(self._runs_of(text))

    @staticmethod
    def _runs_of(text):
        words = _folded(text).split(" ")
        length = SHARED_WORDS + 1
        starts = range(len(words) - SHARED_WORDS)
        return {tuple(words[i : i + length]) for i in starts}


def _folded(text):
    return " ".join(text.lower().split())


def _labelled(file):
    """The texts of a file with their classes, without texts of both classes."""
    labels = collections.defaultdict(set)
    for row in _rows(file, ["sentence", "label"]):
        labels[row["sentence"].strip()].add(int(row["label"]))
    return [(text, *found) for text, found in labels.items() if len(found) == 1]


def _rows(file, columns):
    path = _find(file)
    with open(path, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = set(columns) - set(reader.fieldnames or [])
        if missing:
            raise ValueError(
                f"{path} should have the columns {columns}. Received: "
                f"{reader.fieldnames}"
            )
        return list(reader)


def directory():
    """The folder of the datasets; see the docstring of this module."""
    return pathlib.Path(os.environ.get(VARIABLE) or BESIDE_CHECKOUT)


def _find(file):
    path = directory() / file
    if not path.is_file():
        raise FileNotFoundError(
            f"The dataset {path} is not there. Datasets are not part of this "
            "project: benchmarks/quality/DATA.md says where they come from. "
            f"Name the folder that has them with the environment variable "
            f"{VARIABLE}."
        )
    return path


def _shuffled(rows, salt, key=None):
    """The rows, sorted by a hash of their content."""

    def digest(row):
        content = key(row) if key else json.dumps(row).encode()
        return hashlib.sha256(salt.encode() + b"\n" + content).digest()

    return sorted(rows, key=digest)


def _balanced(rows, per_class, refuse=lambda row: False):
    """The first rows of each class, in their order."""
    taken = collections.Counter()
    chosen = []
    for row in rows:
        label = row[1]
        if taken[label] < per_class and not refuse(row):
            taken[label] += 1
            chosen.append(row)
    return chosen


def _indices(labels, seed):
    return _shuffled(range(len(labels)), f"few-shot {seed}")


def _take(split, indices):
    def pick(values):
        if isinstance(values, np.ndarray):
            return values[indices]
        return [values[i] for i in indices]

    return Split(pick(split.inputs), pick(split.labels))


def _pixels(jpeg):
    # It is imported here, so that the text tasks do not need it.
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    top, left = ((length - IMAGE_SIZE) // 2 for length in pixels.shape[:2])
    return pixels[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]


def _digest(splits):
    """A hash of the examples. The files' line ends may differ."""
    total = hashlib.sha256()
    for rows in splits:
        for row in rows:
            for field in row:
                content = (
                    field if isinstance(field, bytes) else str(field).encode()
                )
                total.update(hashlib.sha256(content).digest())
        total.update(b"|")
    return total.hexdigest()[:32]


def _check(name, splits, sizes):
    """Raises `ValueError` if the examples are not those of the figures."""
    found = [len(rows) for rows in splits]
    if found != sizes:
        raise ValueError(
            f"The files of {name} in {directory()} are too small for "
            f"{sizes} examples. Received: {found}. See "
            "benchmarks/quality/DATA.md."
        )
    digest = _digest(splits)
    if digest != DIGESTS[name]:
        raise ValueError(
            f"The files of {name} in {directory()} are not those that the "
            f"benchmarks were made with: their examples have the digest "
            f"{digest}, and expected is {DIGESTS[name]}. See "
            "benchmarks/quality/DATA.md."
        )


def _check_positive(argument, value):
    _check_integer(argument, value)
    if value < 1:
        raise ValueError(
            f"`{argument}` should be at least 1. Received: {argument}={value}"
        )


def _check_integer(argument, value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"`{argument}` should be an integer. Received: {argument}={value!r}"
        )
