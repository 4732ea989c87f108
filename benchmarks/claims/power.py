"""How many pairs a difference needs, and what pairs say about it.

SciPy has the distributions. It is installed wherever JAX is.
"""

import dataclasses
import math

import numpy as np
from scipy import stats

#: More pairs than any experiment can have.
MOST_PAIRS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: float.
        low: float, the lower end.
        high: float, the upper end.
        pairs: int, the number of pairs behind it.
    """

    estimate: float
    low: float
    high: float
    pairs: int


def power_of_pairs(difference, deviation, pairs, alpha=0.05):
    """The chance that a two-sided paired t-test sees a difference.

    Args:
        difference: float, the true mean difference of a pair.
        deviation: float, the standard deviation of the differences.
        pairs: int, at least 2.
        alpha: float, the chance of a false alarm.

    Returns:
        float in [0, 1].
    """
    shift = abs(difference) / deviation * math.sqrt(pairs)
    edge = stats.t.ppf(1 - alpha / 2, pairs - 1)
    above = stats.nct.sf(edge, pairs - 1, shift)
    below = stats.nct.cdf(-edge, pairs - 1, shift)
    # SciPy gives NaN for the far tail, where the chance is nought.
    return float(np.nan_to_num(above) + np.nan_to_num(below))


def pairs_needed(difference, deviation, power=0.8, alpha=0.05):
    """The least number of pairs with which a difference is seen.

    Args:
        difference: float, not 0. The true mean difference of a pair.
        deviation: float above 0. The standard deviation of the differences.
        power: float in (0, 1). The chance of seeing it.
        alpha: float in (0, 1). The chance of a false alarm, two-sided.

    Returns:
        int, at least 2.

    Raises:
        ValueError: If no number of pairs suffices.
    """
    if not difference or not deviation > 0:
        raise ValueError(
            "`difference` must not be 0 and `deviation` must be above 0. "
            f"Received: difference={difference}, deviation={deviation}"
        )
    low, high = 1, 2
    while power_of_pairs(difference, deviation, high, alpha) < power:
        low, high = high, 2 * high
        if high > MOST_PAIRS:
            raise ValueError(
                f"More than {MOST_PAIRS} pairs would be needed. Received: "
                f"difference={difference}, deviation={deviation}"
            )
    while high - low > 1:
        middle = (low + high) // 2
        if power_of_pairs(difference, deviation, middle, alpha) < power:
            low = middle
        else:
            high = middle
    return high


def mean_difference(ours, theirs, alpha=0.05):
    """The mean of paired differences and its t interval.

    Args:
        ours: Sequence of floats, one for each pair.
        theirs: Sequence of floats, in the same order.
        alpha: float, 1 minus the interval's level.

    Returns:
        An `Interval`.

    Raises:
        ValueError: If there are fewer than two pairs, or not as many of each.
    """
    ours, theirs = _paired(ours, theirs, 2)
    differences = ours - theirs
    count = len(differences)
    half = (
        stats.t.ppf(1 - alpha / 2, count - 1)
        * differences.std(ddof=1)
        / math.sqrt(count)
    )
    mean = differences.mean()
    return Interval(float(mean), float(mean - half), float(mean + half), count)


def deviation_ratio(ours, theirs, alpha=0.05):
    """The ratio of two standard deviations over paired seeds.

    The two runs of a pair share their examples, so their figures are
    correlated and an F-test would be wrong. This is the variance-ratio test
    for correlated samples: `x + c y` and `x - c y` are uncorrelated only if
    `c` is the ratio of the deviations. The interval holds the ratios that the
    test of that correlation does not refuse. It has a closed form.

    Args:
        ours: Sequence of floats, one for each pair.
        theirs: Sequence of floats, in the same order.
        alpha: float, 1 minus the interval's level.

    Returns:
        An `Interval` of the ratio of the deviation of `ours` to that of
        `theirs`.

    Raises:
        ValueError: If there are fewer than three pairs, not as many of each,
            or if one side does not vary.

    References:
        - Pitman, 1939, and Morgan, 1939, in Biometrika 31.
    """
    ours, theirs = _paired(ours, theirs, 3)
    count = len(ours)
    if not ours.std() or not theirs.std():
        raise ValueError("A side does not vary, so there is no ratio.")
    ratio = ours.std(ddof=1) / theirs.std(ddof=1)
    correlation = np.corrcoef(ours, theirs)[0, 1]
    quantile = stats.t.ppf(1 - alpha / 2, count - 2)
    k = 1 + 2 * (1 - correlation**2) * quantile**2 / (count - 2)
    root = math.sqrt(k**2 - 1)
    return Interval(
        float(ratio),
        float(ratio * math.sqrt(k - root)),
        float(ratio * math.sqrt(k + root)),
        count,
    )


def power_of_ratio(ratio, pairs, alpha=0.05):
    """The chance that a variance-ratio test sees a ratio of deviations.

    It is that of the F-test of uncorrelated samples, which is the least
    favourable case.

    Args:
        ratio: float above 0, the true ratio of two standard deviations.
        pairs: int, the runs of each side.
        alpha: float, the chance of a false alarm, two-sided.

    Returns:
        float in [0, 1].
    """
    degrees = pairs - 1
    high = stats.f.ppf(1 - alpha / 2, degrees, degrees)
    return float(
        stats.f.sf(high / ratio**2, degrees, degrees)
        + stats.f.cdf(1 / high / ratio**2, degrees, degrees)
    )


def ratio_pairs_needed(ratio, power=0.8, alpha=0.05):
    """The least number of pairs with which a ratio of deviations is seen."""
    pairs = 3
    while power_of_ratio(ratio, pairs, alpha) < power:
        pairs += 1
        if pairs > 10_000:
            raise ValueError(
                f"More than 10,000 pairs would be needed. Received: {ratio}"
            )
    return pairs


def _paired(ours, theirs, least):
    ours, theirs = np.asarray(ours, "float64"), np.asarray(theirs, "float64")
    if ours.shape != theirs.shape or len(ours) < least:
        raise ValueError(
            f"At least {least} pairs are needed, and as many of each side. "
            f"Received: {len(ours)} and {len(theirs)}"
        )
    return ours, theirs
