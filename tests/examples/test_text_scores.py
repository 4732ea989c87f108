import itertools

import pytest
import text_scores

pytestmark = pytest.mark.one_backend


def test_rouge_l_of_the_paper():
    # Lin 2004, section 3.1: the subsequences have 3 and 2 words of 4.
    reference = ["police killed the gunman"]
    assert text_scores.rouge_l("police kill the gunman", reference) == 0.75
    assert text_scores.rouge_l("the gunman kill police", reference) == 0.5


def test_rouge_l_weighs_precision_and_recall_alike():
    # All 2 words are found, of 4.
    assert text_scores.rouge_l("a c", ["A b, c d."]) == pytest.approx(2 / 3)
    assert text_scores.rouge_l("a c", ["x y", "a c!"]) == 1.0
    assert text_scores.rouge_l("", ["a"]) == 0.0


def test_subsequences_are_the_longest():
    def slow(a, b):
        for size in range(min(len(a), len(b)), 0, -1):
            if set(itertools.combinations(a, size)) & set(
                itertools.combinations(b, size)
            ):
                return size
        return 0

    words = ["a", "b", "c"]
    texts = [*itertools.product(words, repeat=4), ("b", "a", "c", "a", "b")]
    for a in texts[::5]:
        for b in texts[::3]:
            found = text_scores._longest_common_subsequence(a, b)
            assert found == slow(a, b)


def test_chrf_of_short_texts_by_hand():
    # Runs of one letter: 2 of 3 found, of 4. Runs of two: 1 of 2, of 3. Runs
    # of three: 0 of 1, of 2. The text has no longer ones.
    precision = (2 / 3 + 1 / 2 + 0) / 3
    recall = (2 / 4 + 1 / 3 + 0) / 3
    expected = 5 * precision * recall / (4 * precision + recall)
    assert text_scores.chrf(["a b x"], [["abcd"]]) == pytest.approx(expected)


# The package sacrebleu 2.6.0 gives `corpus_chrf(...).score / 100` of the test
# below for these.
TEXTS = [
    "Heron House is an inn at the lake.",
    "There is a hostel called Fern Hollow, and dogs are welcome.",
    "no",
]
REFERENCES = [
    ["Heron House is an inn on the north shore.", "The inn is Heron House."],
    ["You may bring your dog to the hostel Fern Hollow.", "It takes dogs."],
    ["Breakfast is not served.", "There is none."],
]


def test_chrf_takes_the_best_reference_of_each_text():
    score = text_scores.chrf(TEXTS, REFERENCES)
    assert score == pytest.approx(0.39189628545564065, abs=1e-12)
    for i, choices in enumerate(REFERENCES):
        turned = [*REFERENCES]
        turned[i] = choices[::-1]
        assert text_scores.chrf(TEXTS, turned) == score
    assert text_scores.chrf(["same"], [["other", "same"]]) == 1.0
    assert text_scores.chrf([""], [["a"]]) == 0.0


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
    with pytest.raises(ValueError, match="longer"):
        text_scores.scores(["a b"], split)
