"""Lists of token ids as arrays for a language model.

Nothing here depends on a tokenizer or on a backend.
"""

import numpy as np


def pad(rows, length, value=0):
    """Fills lists of integers up to one length, on the right.

    Args:
        rows: A list of lists of integers, none longer than `length`.
        length: The length of the result's rows.
        value: The integer with which rows are filled up.

    Returns:
        An int32 array and a boolean one, both of shape `(len(rows), length)`.
        The boolean one is true where `rows` has an entry.

    Raises:
        ValueError: If a row is longer than `length`.
    """
    longest = max(len(row) for row in rows)
    if longest > length:
        raise ValueError(
            f"`length` should be at least {longest}, the number of tokens of "
            f"the longest text. Received: length={length}"
        )
    padded = np.full((len(rows), length), value, "int32")
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
        mask[i, : len(row)] = True
    return padded, mask


def completions(rows, starts, length):
    """Makes examples for training on the ends of texts.

    Args:
        rows: A list of lists of integers, the tokens of whole texts.
        starts: The number of tokens of each text that are not trained: those
            of its prompt. At least 1, as the first token has nothing before
            it.
        length: The length to fill up to, on the right. A text may have one
            token more.

    Returns:
        Inputs (a dict of arrays), the next tokens, and their weights, all of
        shape `(texts, length)`. Weights are 1 for tokens after the prompt and
        otherwise 0. Use them in `model.fit(x, y, sample_weight=w)`.

    Raises:
        ValueError: If a text has too many tokens.
    """
    padded, mask = pad(rows, length + 1)
    weight = np.zeros((len(rows), length), "float32")
    for i, (start, row) in enumerate(zip(starts, rows)):
        # The prompt's last token predicts the first one that is trained.
        weight[i, start - 1 : len(row) - 1] = 1.0
    inputs = {"token_ids": padded[:, :-1], "padding_mask": mask[:, :-1]}
    return inputs, padded[:, 1:], weight
