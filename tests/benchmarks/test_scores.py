"""Scores of texts against their papers' formulas, and the training recipe."""

import collections
import importlib.util
import math
import re

import keras
import numpy as np
import pytest
import recipe
import scores
from keras import ops

pytestmark = pytest.mark.one_backend

needs_packages = pytest.mark.skipif(
    not all(
        importlib.util.find_spec(name) for name in ("sacrebleu", "rouge_score")
    ),
    reason="constraints/scores.txt is not installed",
)

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
    return 100 * min(1.0, math.exp(1 - r / c)) * math.exp(logs)


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
    return 100 * 5 * p * r / (4 * p + r)


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
    @needs_packages
    def test_formulas(self):
        found = scores.corpus_scores(TEXTS, REFERENCES)
        assert tuple(found) == scores.NAMES
        rouge = [_rouge_l(t, r) for t, (r,) in zip(TEXTS, REFERENCES)]
        np.testing.assert_allclose(
            list(found.values()),
            [
                _bleu(TEXTS, REFERENCES),
                _chrf(TEXTS, REFERENCES),
                100 * np.mean(rouge),
            ],
        )

    @needs_packages
    def test_several_references_of_different_number(self):
        references = [[REFERENCES[0][0], TEXTS[0]], *REFERENCES[1:]]
        found = scores.corpus_scores(TEXTS, references)
        single = scores.corpus_scores(TEXTS, REFERENCES)
        for name in scores.NAMES:
            assert found[name] > single[name] + 5, name
        perfect = scores.corpus_scores(TEXTS, [[text] for text in TEXTS])
        np.testing.assert_allclose(list(perfect.values()), 100)

    @pytest.mark.parametrize(
        "texts, references", [([], []), (["a"], []), (["a"], [[]])]
    )
    def test_errors(self, texts, references):
        with pytest.raises(ValueError, match="`references` must hold a list"):
            scores.corpus_scores(texts, references)

    def test_grouped_references(self):
        inputs, found = scores.grouped_references("aba", ["x", "y", "z"])
        assert inputs == ["a", "b"] and found == [["x", "z"], ["y"]]


class TestRecipe:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
    def test_label_smoothing(self, smoothing):
        generator = np.random.default_rng(0)
        logits = generator.normal(size=(3, 4, 5))
        labels = generator.integers(0, 5, (3, 4))
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
        loss = recipe.SmoothedCrossentropy(smoothing)
        np.testing.assert_allclose(
            float(loss(labels, logits.astype("float32"))),
            -np.mean(np.sum(targets * logs, axis=-1)),
            rtol=1e-5,
        )

    @pytest.mark.every_backend
    def test_warm_up(self):
        schedule = recipe.LinearWarmup(0.4, 4, 10)
        found = [float(ops.convert_to_numpy(schedule(t))) for t in range(12)]
        rise = [0.1, 0.2, 0.3, 0.4]
        fall = [0.4 * left / 6 for left in (6, 5, 4, 3, 2, 1, 0, 0)]
        np.testing.assert_allclose(found, rise + fall, atol=1e-6)
        alone = recipe.LinearWarmup(1.0, 0, 4)
        found = [float(ops.convert_to_numpy(alone(t))) for t in range(5)]
        np.testing.assert_allclose(found, [1, 0.75, 0.5, 0.25, 0])

    def test_it_trains_and_is_serialized(self):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
        optimizer = keras.optimizers.AdamW(recipe.LinearWarmup(0.1, 2, 6))
        model.compile(optimizer, recipe.SmoothedCrossentropy(0.2))
        x = np.ones((4, 3), "float32")
        model.fit(x, np.array([0, 1, 2, 3]), epochs=2, verbose=0)
        loss = recipe.SmoothedCrossentropy(0.2)
        assert type(loss).from_config(loss.get_config()).smoothing == 0.2
        schedule = recipe.LinearWarmup(0.1, 2, 6)
        clone = recipe.LinearWarmup.from_config(schedule.get_config())
        assert (clone.rate, clone.warmup, clone.steps) == (0.1, 2, 6)

    def test_errors(self):
        with pytest.raises(ValueError, match="`warmup` must be"):
            recipe.LinearWarmup(0.1, 5, 5)
        with pytest.raises(ValueError, match="`smoothing` must be"):
            recipe.SmoothedCrossentropy(1.0)
