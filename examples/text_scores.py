"""Scores of generated texts, from their definitions.

ROUGE-L and chrF are what the packages `rouge-score` and `sacrebleu` compute by
default, and neither package is needed. The third score tells whether a text
says what it was asked to say.
"""

import collections
import re

import meanings

#: chrF compares runs of one to six characters, and counts recall twice.
CHRF_ORDER = 6
CHRF_BETA = 2.0


def words(text):
    """The lower-case words and numbers of a text, as ROUGE takes them."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(text, references):
    """ROUGE-L: the F score of the longest common subsequence of words.

    Args:
        text: A string.
        references: A list of strings. The best score counts.

    Returns:
        A float between 0 and 1.

    References:
        - Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004,
          section 3, with precision and recall of equal weight.
    """
    return max(_rouge_l(words(text), words(one)) for one in references)


def _rouge_l(text, reference):
    common = _longest_common_subsequence(text, reference)
    # It is twice the product of precision and recall over their sum.
    return 2 * common / max(len(text) + len(reference), 1)


def _longest_common_subsequence(a, b):
    # Row by row: an entry is the length for the words so far.
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def chrf(texts, references):
    """chrF2: the F score of runs of one to six characters, over all texts.

    Args:
        texts: A list of strings.
        references: A list of lists of strings, one for each text. The counts
            of the best reference enter.

    Returns:
        A float between 0 and 1.

    References:
        - Popović, "chrF: character n-gram F-score for automatic MT
          evaluation", WMT 2015.
    """
    totals = [(0, 0, 0)] * CHRF_ORDER
    for text, choices in zip(texts, references, strict=True):
        best = max((_runs(text, one) for one in choices), key=_chrf)
        totals = [tuple(map(sum, zip(*pair))) for pair in zip(totals, best)]
    return _chrf(totals)


def _runs(text, reference):
    """The numbers of runs of each length: of the text, the reference, both."""
    text, reference = ("".join(one.split()) for one in (text, reference))
    counts = []
    for n in range(1, CHRF_ORDER + 1):
        ours, theirs = (
            collections.Counter(one[i : i + n] for i in range(len(one) - n + 1))
            for one in (text, reference)
        )
        counts.append((ours.total(), theirs.total(), (ours & theirs).total()))
    return counts


def _chrf(counts):
    # An order that a text is too short for does not count.
    used = [one for one in counts if one[0] and one[1]]
    if not used:
        return 0.0
    precision = sum(both / ours for ours, _, both in used) / len(used)
    recall = sum(both / theirs for _, theirs, both in used) / len(used)
    weighted = CHRF_BETA**2 * precision + recall
    if weighted == 0:
        return 0.0
    return (1 + CHRF_BETA**2) * precision * recall / weighted


def mentioned(text, meaning):
    """The share of a meaning's values that a text has, word for word.

    Values "yes" and "no" do not count, as a text says them in other words.

    Args:
        text: A string.
        meaning: A string, such as "name[Heron House], dogs[no]".

    Returns:
        A float between 0 and 1.

    Example:

    >>> mentioned("Heron House is by a lake.", "name[Heron House], near[sea]")
    0.5
    """
    values = [
        value
        for value in meanings.attributes(meaning).values()
        if value not in ("yes", "no")
    ]
    said = f" {' '.join(words(text))} "
    found = [f" {' '.join(words(value))} " in said for value in values]
    return sum(found) / max(len(found), 1)


def scores(texts, split):
    """All scores of texts about held-out meanings.

    Args:
        texts: A list of strings, one for each meaning of `split`, in order.
        split: A dict from meanings to lists of references.

    Returns:
        A dict of floats between 0 and 1.
    """
    pairs = list(zip(texts, split, strict=True))
    rouge = [rouge_l(text, split[meaning]) for text, meaning in pairs]
    said = [mentioned(text, meaning) for text, meaning in pairs]
    return {
        "rouge_l": sum(rouge) / len(rouge),
        "chrf": chrf(texts, list(split.values())),
        "mentioned": sum(said) / len(said),
    }
