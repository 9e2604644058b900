"""Estimators of accuracy and their uncertainty. scipy does the statistics; the formulas that it lacks are here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
from scipy import stats


def wilson_interval(num_correct: int, num_samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion of independent trials."""
    interval = stats.binomtest(num_correct, num_samples).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def clustered_interval(means: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean over questions, each question's k samples one cluster (Student's t), within [0, 1]."""
    values = np.asarray(means, np.float64)
    if len(values) < 2 or np.ptp(values) == 0:
        return wilson_interval(round(values.sum()), len(values), confidence)
    low, high = stats.t.interval(confidence, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    return max(0.0, float(low)), min(1.0, float(high))


def accuracy_interval(correct: Sequence[Sequence[bool]]) -> tuple[float, float, float]:
    """Mean accuracy and its 95% interval from [questions][samples]; Wilson for one sample each, else clustered."""
    means = [float(np.mean(samples)) for samples in correct]
    if all(len(samples) == 1 for samples in correct):
        low, high = wilson_interval(round(sum(means)), len(means))
    else:
        low, high = clustered_interval(means)
    return float(np.mean(means)), low, high


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    Unbiased (Chen et al., arXiv 2107.03374).
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: k must lie in [1, {num_samples}]")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority(answers: Sequence[Hashable]) -> Hashable:
    """The most frequent answer; the earliest of those that tie."""
    return Counter(answers).most_common(1)[0][0]


class PairedDifference(NamedTuple):
    """Accuracy of the second run minus that of the first, on the same questions."""

    difference: float
    low: float
    high: float
    """95% interval: low, high."""
    p_value: float
    """Of no difference, two-sided."""


def paired_difference(before: Sequence[Sequence[bool]], after: Sequence[Sequence[bool]]) -> PairedDifference:
    """Two runs on the same questions, both [questions][samples]: t-test on the differences of the questions' means."""
    first, second = ([float(np.mean(samples)) for samples in run] for run in (before, after))
    differences = np.subtract(second, first)
    mean = float(differences.mean())
    if np.ptp(differences) == 0:  # no spread, no test
        return PairedDifference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    result = stats.ttest_rel(second, first)
    low, high = result.confidence_interval(0.95)
    return PairedDifference(mean, float(low), float(high), float(result.pvalue))
