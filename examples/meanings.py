"""Attributes and texts about them: files in E2E's form, a split, prompts.

A meaning is a string such as "name[Heron House], area[lakeside], dogs[no]". A
CSV file has it in the column `mr`, and a text about it in the column `ref`.
"""

import csv
import hashlib
import re
import typing

_ATTRIBUTE = re.compile(r"\s*([^\[\],\s][^\[\],]*?)\s*\[([^\]]*)\]\s*(?:,|$)")


class Split(typing.NamedTuple):
    """Examples for training, and held-out meanings with all of their texts.

    `train` is a list of pairs of a meaning and a text. `held_out` is a dict
    from a meaning to the list of its texts. No meaning is in both.
    """

    train: list
    held_out: dict


def read_csv(path):
    """Reads a file of meanings and texts.

    Args:
        path: A CSV file in UTF-8 with the columns `mr` and `ref`.

    Returns:
        A list of pairs of strings.

    Raises:
        ValueError: If a column is missing, or a meaning can't be read.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"mr", "ref"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(
                f"{path} should have the columns 'mr' and 'ref'. Received: "
                f"{reader.fieldnames}"
            )
        rows = [(row["mr"], row["ref"]) for row in reader]
    for meaning, _ in rows:
        attributes(meaning)
    return rows


def attributes(meaning):
    """The attributes of a meaning.

    Args:
        meaning: A string, such as "name[Heron House], dogs[no]".

    Returns:
        A dict from names to values, both strings.

    Raises:
        ValueError: If the string has another form.

    Example:

    >>> attributes("name[Heron House], dogs[no]")
    {'name': 'Heron House', 'dogs': 'no'}
    """
    found, position = {}, 0
    while position < len(meaning):
        match = _ATTRIBUTE.match(meaning, position)
        if match is None:
            break
        found[match[1]] = match[2]
        position = match.end()
    if not found or position < len(meaning):
        raise ValueError(
            "A meaning should look like 'name[Heron House], dogs[no]'. "
            f"Received: {meaning!r}"
        )
    return found


def split(rows, train, held_out, seed=0):
    """Splits rows by their meanings.

    The order of meanings is that of a hash, so held-out ones are the same on
    every machine. The seed decides which of the others are trained.

    Args:
        rows: A list of pairs of a meaning and a text.
        train: The number of pairs to train on.
        held_out: The number of meanings to hold out.
        seed: An integer.

    Returns:
        A `Split`.

    Raises:
        ValueError: If there are not enough rows.
    """
    by_meaning = {}
    for meaning, text in rows:
        by_meaning.setdefault(meaning, []).append(text)
    order = sorted(by_meaning, key=_digest)
    kept = set(order[:held_out])
    rest = [row for row in rows if row[0] not in kept]
    if len(order) < held_out or len(rest) < train:
        raise ValueError(
            f"{len(rows)} rows of {len(order)} meanings are too few for "
            f"{held_out} held-out meanings and {train} rows to train on. "
            "Ask for other numbers."
        )
    rest.sort(key=lambda row: _digest(f"{seed}\n{row[0]}\n{row[1]}"))
    return Split(
        rest[:train], {one: by_meaning[one] for one in order[:held_out]}
    )


def prompt(meaning):
    """The prompt that asks for a text about a meaning."""
    return f"Attributes: {meaning}\nDescription:"


def _digest(text):
    return hashlib.sha256(text.encode()).digest()
