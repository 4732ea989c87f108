"""Scores of generated texts against references: BLEU, chrF and ROUGE-L.

    python -m pip install -r constraints/scores.txt

The two packages are small and download nothing. Of the scores in the E2E table
of the RLoRA paper, METEOR is missing because it needs WordNet, a download, and
NIST and CIDEr because no maintained package computes them. The paper's BLEU is
that of the E2E challenge's own program, which tokenizes otherwise; compare
scores of this module with one another only.
"""

import collections
import statistics

#: The names of the scores. All go from 0 to 100, and larger is better.
NAMES = ("bleu", "chrf", "rouge_l")


def corpus_scores(texts, references):
    """The scores of texts, each against one or more references.

    BLEU has up to four words in a row, clipped counts of the whole corpus, a
    brevity penalty, the tokenization "13a" and exponential smoothing
    (Papineni et al. 2002; Post 2018). chrF has characters up to six in a row
    and weighs recall twice (Popovic 2015). ROUGE-L is the mean of each text's
    best F-score of the longest common subsequence of words (Lin 2004).

    Args:
        texts: list of strings.
        references: list of lists of strings: those of each text.

    Returns:
        A dict from the names in `NAMES` to floats.

    Raises:
        ImportError: If a package is not installed.
        ValueError: If there is no text, or not as many lists of references, or
            a list without a reference.
    """
    texts, references = list(texts), [list(one) for one in references]
    if not texts or len(texts) != len(references) or not all(references):
        raise ValueError(
            "`references` must hold a list of at least one reference for each "
            f"of `texts`. Received: {len(texts)} texts and the numbers of "
            f"references {[len(one) for one in references][:10]}"
        )
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ImportError(
            "The scores of texts need two packages: "
            "`python -m pip install -r constraints/scores.txt`."
        ) from error

    # sacrebleu wants the first references of all texts, then the second, ...
    # and takes `None` where a text has fewer.
    most = max(map(len, references))
    streams = [
        [one[i] if i < len(one) else None for one in references]
        for i in range(most)
    ]
    rouge = rouge_scorer.RougeScorer(["rougeL"])
    return {
        "bleu": sacrebleu.corpus_bleu(texts, streams).score,
        "chrf": sacrebleu.corpus_chrf(texts, streams).score,
        "rouge_l": 100
        * statistics.fmean(
            rouge.score_multi(one, text)["rougeL"].fmeasure
            for text, one in zip(texts, references)
        ),
    }


def grouped_references(inputs, texts):
    """Each input once, with all of its references.

    E2E has several sentences for one set of attributes.

    Args:
        inputs: list of strings.
        texts: list of strings, a reference for each input.

    Returns:
        The different inputs in the order of their first occurrence, and a list
        of references for each.
    """
    found = collections.defaultdict(list)
    for one, text in zip(inputs, texts, strict=True):
        found[one].append(text)
    return list(found), list(found.values())
