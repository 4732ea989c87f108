"""Labelled texts: CSV files, and splits that are the same on every machine."""

import collections
import csv
import hashlib
import typing


class Split(typing.NamedTuple):
    """Disjoint lists of `(text, label)`.

    Hyperparameters are chosen on `tuning`, so that `validation` is used only
    once, for the reported score.
    """

    train: list
    validation: list
    tuning: list


def read_csv(path, text_column=None, label_column="label"):
    """Reads labelled texts from a CSV file with a header row.

    Args:
        path: The file, in UTF-8.
        text_column: The name of the column of texts. Defaults to "text" or
            "sentence", whichever the file has.
        label_column: The name of the column of labels, which may be numbers or
            words.

    Returns:
        A list of `(text, label)`, labels as integers, and the list of label
        names in the order of these integers.

    Raises:
        ValueError: If a column is missing, or fewer than two labels occur.
    """
    # Spreadsheets write a byte-order mark before the first column's name.
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if text_column is None:
            known = [name for name in ("text", "sentence") if name in columns]
            text_column = known[0] if known else "text"
        for argument, column in (
            ("text_column", text_column),
            ("label_column", label_column),
        ):
            if column not in columns:
                raise ValueError(
                    f"{path} has no column {column!r}. Its columns are "
                    f"{columns}: name one with `{argument}`."
                )
        rows = [(row[text_column], row[label_column]) for row in reader]
    names = sorted({label for _, label in rows}, key=_number_or_word)
    if len(names) < 2:
        raise ValueError(
            f"Column {label_column!r} of {path} should have two labels or "
            f"more. Received: {names}"
        )
    index = {name: i for i, name in enumerate(names)}
    return [(text, index[label]) for text, label in rows], names


def _number_or_word(label):
    """A sorting key that puts "2" before "10" and numbers before words."""
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)


def few_shot_split(examples, train, validation, seed=0):
    """Splits examples into a few for training and a fixed set for validation.

    The order is that of a hash of seed and text. The split is therefore the
    same on every machine and with every library version, and a text that
    occurs twice is in one part only. Validation examples are taken from the
    front and training examples from the back, so a change of one number does
    not change the other part.

    Args:
        examples: A list of `(text, label)`.
        train: The number of training examples, with an equal share of each
            label.
        validation: The number of examples in `validation`, and in `tuning`.
        seed: An integer. Another seed gives another split.

    Returns:
        A `Split`.

    Raises:
        ValueError: If there are not enough examples.
    """
    by_text = dict(examples)
    order = sorted(
        by_text,
        key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest(),
    )
    shuffled = [(text, by_text[text]) for text in order]
    held_out, rest = shuffled[: 2 * validation], shuffled[2 * validation :]

    labels = sorted(set(by_text.values()))
    share = train // len(labels)
    taken = collections.Counter()
    chosen = []
    for text, label in reversed(rest):
        if taken[label] < share:
            taken[label] += 1
            chosen.append((text, label))
    for label in labels:
        if share == 0 or taken[label] < share:
            raise ValueError(
                f"{train} training examples for {len(labels)} labels beside "
                f"2 x {validation} held out need {max(share, 1)} of each "
                f"label. Received: {len(by_text)} examples, which leave "
                f"{taken[label]} of label {label}. Ask for other numbers."
            )
    return Split(chosen, held_out[:validation], held_out[validation:])
