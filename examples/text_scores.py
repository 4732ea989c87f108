"""Scores of generated texts against references.

The packages `sacrebleu` and `rouge-score` compute BLEU, chrF and ROUGE-L, and
they download nothing. Another score tells whether a text says what it was asked
to say. METEOR of the E2E challenge is absent because it needs WordNet, which is
a download, and NIST and CIDEr because no maintained package computes them. The
challenge's own program tokenizes otherwise, so compare scores of this module
with one another only.
"""

import re
import statistics

import meanings
import sacrebleu
from rouge_score import rouge_scorer

#: The names of the scores that `corpus_scores` gives.
NAMES = ("bleu", "chrf", "rouge_l")


def corpus_scores(texts, references):
    """The scores of texts, each against one or more references.

    BLEU has up to four words in a row, clipped counts of the whole corpus, a
    brevity penalty, the tokenization "13a" and exponential smoothing. chrF has
    characters up to six in a row and weighs recall twice. ROUGE-L is the mean
    of each text's best F score of the longest common subsequence of words.

    Args:
        texts: list of strings.
        references: list of lists of strings: those of each text.

    Returns:
        A dict from the names in `NAMES` to floats between 0 and 1.

    Raises:
        ValueError: If there is no text, or not as many lists of references, or
            a list without a reference.

    References:
        - Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine
          Translation", ACL 2002; Post, "A Call for Clarity in Reporting BLEU
          Scores", WMT 2018.
        - Popović, "chrF: character n-gram F-score for automatic MT
          evaluation", WMT 2015.
        - Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004,
          section 3, with precision and recall of equal weight.
    """
    texts, references = list(texts), [list(one) for one in references]
    if not texts or len(texts) != len(references) or not all(references):
        raise ValueError(
            "`references` must hold a list of at least one reference for each "
            f"of `texts`. Received: {len(texts)} texts and the numbers of "
            f"references {[len(one) for one in references][:10]}"
        )
    # sacrebleu wants the first references of all texts, then the second, ...
    # and takes `None` where a text has fewer.
    most = max(map(len, references))
    streams = [
        [one[i] if i < len(one) else None for one in references]
        for i in range(most)
    ]
    rouge = rouge_scorer.RougeScorer(["rougeL"])
    return {
        "bleu": sacrebleu.corpus_bleu(texts, streams).score / 100,
        "chrf": sacrebleu.corpus_chrf(texts, streams).score / 100,
        "rouge_l": statistics.fmean(
            rouge.score_multi(one, text)["rougeL"].fmeasure
            for text, one in zip(texts, references)
        ),
    }


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
    said = _words(text)
    found = [_words(value) in said for value in values]
    return sum(found) / max(len(found), 1)


def _words(text):
    """The lower-case words and numbers of a text, with spaces around each."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def scores(texts, split):
    """All scores of texts about held-out meanings.

    Args:
        texts: A list of strings, one for each meaning of `split`, in order.
        split: A dict from meanings to lists of references.

    Returns:
        A dict of floats between 0 and 1.

    Raises:
        ValueError: If there are not as many texts as meanings.
    """
    found = corpus_scores(texts, split.values())
    said = [mentioned(text, meaning) for text, meaning in zip(texts, split)]
    return {**found, "mentioned": statistics.fmean(said)}
