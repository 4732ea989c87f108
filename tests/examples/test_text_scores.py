"""Scores of texts against their papers' formulas."""

import collections
import math
import re

import numpy as np
import pytest
import text_scores

pytestmark = pytest.mark.one_backend

TEXTS = [
    "the golden curry serves cheap food near the river bank",
    "there is a family friendly pub in the city centre today",
    "the mill is an english coffee shop with a high price",
]
REFERENCES = [
    ["the golden curry near the river serves very cheap food"],
    ["there is a pub in the city centre that is family friendly"],
    ["the mill is a high price english coffee shop by the river bank"],
]


def _grams(items, n):
    return collections.Counter(
        tuple(items[i : i + n]) for i in range(len(items) - n + 1)
    )


def _bleu(texts, references):
    """Equation 4 of Papineni et al., with one reference a text."""
    logs = 0.0
    for n in range(1, 5):
        found = total = 0
        for text, (reference,) in zip(texts, references):
            ours, theirs = (_grams(t.split(), n) for t in (text, reference))
            found += sum((ours & theirs).values())
            total += sum(ours.values())
        logs += math.log(found / total) / 4
    c = sum(len(text.split()) for text in texts)
    r = sum(len(reference.split()) for (reference,) in references)
    return min(1.0, math.exp(1 - r / c)) * math.exp(logs)


def _chrf(texts, references):
    """Popovic's F-score with beta = 2, over characters without spaces."""
    precisions, recalls = [], []
    for n in range(1, 7):
        found = ours_total = theirs_total = 0
        for text, (reference,) in zip(texts, references):
            ours, theirs = (
                _grams(t.replace(" ", ""), n) for t in (text, reference)
            )
            found += sum((ours & theirs).values())
            ours_total += sum(ours.values())
            theirs_total += sum(theirs.values())
        precisions.append(found / ours_total)
        recalls.append(found / theirs_total)
    p, r = np.mean(precisions), np.mean(recalls)
    return 5 * p * r / (4 * p + r)


def _rouge_l(text, reference):
    """Lin's F-score of the longest common subsequence of words."""
    a, b = (re.findall("[a-z0-9]+", t.lower()) for t in (text, reference))
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, one in enumerate(a):
        for j, two in enumerate(b):
            table[i + 1, j + 1] = (
                table[i, j] + 1
                if one == two
                else max(table[i, j + 1], table[i + 1, j])
            )
    common = table[-1, -1]
    return 2 * common / (len(a) + len(b))


class TestScores:
    def test_formulas(self):
        found = text_scores.corpus_scores(TEXTS, REFERENCES)
        assert tuple(found) == text_scores.NAMES
        rouge = [_rouge_l(t, r) for t, (r,) in zip(TEXTS, REFERENCES)]
        np.testing.assert_allclose(
            list(found.values()),
            [
                _bleu(TEXTS, REFERENCES),
                _chrf(TEXTS, REFERENCES),
                np.mean(rouge),
            ],
        )

    def test_several_references_of_different_number(self):
        references = [[REFERENCES[0][0], TEXTS[0]], *REFERENCES[1:]]
        found = text_scores.corpus_scores(TEXTS, references)
        single = text_scores.corpus_scores(TEXTS, REFERENCES)
        for name in text_scores.NAMES:
            assert found[name] > single[name] + 0.05, name
        perfect = text_scores.corpus_scores(TEXTS, [[text] for text in TEXTS])
        np.testing.assert_allclose(list(perfect.values()), 1)

    @pytest.mark.parametrize(
        "texts, references", [([], []), (["a"], []), (["a"], [[]])]
    )
    def test_errors(self, texts, references):
        with pytest.raises(ValueError, match="`references` must hold a list"):
            text_scores.corpus_scores(texts, references)


def test_rouge_l_of_the_paper():
    # Lin 2004, section 3.1: the subsequences have 3 and 2 words of 4.
    references = [["police killed the gunman"]]
    for text, expected in [
        ("police kill the gunman", 0.75),
        ("the gunman kill police", 0.5),
    ]:
        found = text_scores.corpus_scores([text], references)
        assert found["rouge_l"] == pytest.approx(expected)


def test_values_are_found_as_whole_words():
    meaning = "name[The Blue Door], price[£35], near[inn], dogs[no]"
    assert text_scores.mentioned("the blue door: 35 a night", meaning) == (
        pytest.approx(2 / 3)
    )
    assert text_scores.mentioned("Dinner at the blue doors", meaning) == 0.0
    assert text_scores.mentioned("anything", "dogs[no]") == 0.0


def test_all_scores():
    split = {"name[A b], dogs[no]": ["a b", "b"], "name[C]": ["c"]}
    scores = text_scores.scores(["a b", "d"], split)
    assert scores["rouge_l"] == 0.5
    assert scores["mentioned"] == 0.5
    assert 0 < scores["chrf"] < 1
    with pytest.raises(ValueError, match="`references` must hold"):
        text_scores.scores(["a b"], split)
