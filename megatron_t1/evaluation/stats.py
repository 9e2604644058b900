"""Estimators of accuracy and their uncertainty. scipy does the statistics; the formulas that it lacks are here."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
from scipy import special, stats

_NO_SPREAD = 1e-6
"""Between questions. What is not counted but computed (majority@k) is off by 1e-15, and pass@k may be within 1e-9."""


def wilson_interval(num_correct: float, num_samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion of independent trials; trials that are right in part count so."""
    share, z2 = num_correct / num_samples, float(stats.norm.ppf(0.5 + confidence / 2)) ** 2
    centre = share + z2 / (2 * num_samples)
    half = (z2 * (share * (1 - share) / num_samples + z2 / (4 * num_samples**2))) ** 0.5
    scale = 1 + z2 / num_samples
    # Of shares of 0 and 1 a bound is the share itself, which rounding would miss.
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))


def clustered_interval(means: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean over questions, each question's k samples one cluster (Student's t), within [0, 1].

    Miller, "Adding error bars to evals", arXiv 2411.00640. Questions that do not differ (by more than rounding), or a
    single one, show no spread: their interval is Wilson's, each question one trial, as if its samples said nothing
    beyond their mean.
    """
    values = np.asarray(means, np.float64)
    if len(values) < 2 or np.ptp(values) < _NO_SPREAD:
        return wilson_interval(float(values.sum()), len(values), confidence)
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


def interval_method(num_samples: int) -> str:
    """How `accuracy_interval` makes its interval, for people."""
    return "Wilson" if num_samples == 1 else "Student's t over questions, the samples of a question one cluster"


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    Unbiased (Chen et al., arXiv 2107.03374).
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: k must lie in [1, {num_samples}]")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_at_k(answers: Sequence[Hashable | None], right: Hashable, k: int) -> float:
    """Probability that the most frequent answer of k samples, drawn without replacement, is `right`.

    Ties are drawn for: m answers that tie count 1/m each. None is a sample without an answer, which does not vote.
    Exact, by counting: for c votes for `right`, the draws of its rivals, at most c votes each, are the coefficients of
    a polynomial in x (samples drawn) and y (rivals that tie), of which one power of x is needed. It is read off from
    the polynomial's values on the unit circle, where rivals with equally many samples are one power, and answers with
    fewer than c one binomial; 1/(1 + ties) is the integral of y^ties over [0, 1], exact by Gauss and Legendre.
    C(count, drawn) is weighted by p^drawn (1-p)^(count-drawn) with p = k/n, which all draws of k have in common: no
    number overflows.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"majority of {k} of {n} samples: k must lie in [1, {n}]")
    votes = Counter(answers)
    votes.pop(None, None)
    num_right = votes.pop(right, 0)
    num_other, alike = n - num_right, Counter(votes.values())  # alike: samples of an answer -> answers with so many
    chances = {count: stats.binom.pmf(np.arange(count + 1), count, k / n) for count in {num_right, *alike}}
    size = num_other + 1
    half = np.arange(size // 2 + 1)  # of the circle: the other one is conjugate
    x = np.exp(2j * np.pi / size * half)
    shares = np.where(half == -half % size, 1, 2) / size
    below = dict.fromkeys(alike, np.zeros_like(x))  # of an answer, the draws of fewer than c
    total = 0.0
    for c in range(1, min(num_right, k) + 1):
        rivals = {count: number for count, number in alike.items() if count >= c}
        rest = num_other - sum(count * number for count, number in rivals.items())
        y, weights = _legendre(min(sum(rivals.values()), k // c - 1) // 2 + 1)
        values = np.tile((1 - k / n + k / n * x) ** rest, (len(y), 1))  # [y, x]
        for count, number in rivals.items():
            below[count] = below[count] + chances[count][c - 1] * x ** (c - 1)
            values *= (below[count] + chances[count][c] * y[:, None] * x**c) ** number
        if k - c <= num_other:  # the others can fill the draw
            total += chances[num_right][c] * float(weights @ (values @ (shares * x ** (c - k))).real)
    return min(1.0, max(0.0, total / float(stats.binom.pmf(k, n, k / n))))


@functools.cache
def _legendre(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights over [0, 1]."""
    nodes, weights = special.roots_legendre(num_nodes)
    return (nodes + 1) / 2, weights / 2


class PairedDifference(NamedTuple):
    """Accuracy of the second run minus that of the first, on the same questions."""

    difference: float
    low: float
    high: float
    """95% interval: low, high."""
    p_value: float
    """Of no difference, two-sided."""
    test: str
    """How the p-value was made."""


def paired_difference(before: Sequence[Sequence[bool]], after: Sequence[Sequence[bool]]) -> PairedDifference:
    """Two runs on the same questions, both [questions][samples]; questions are drawn, samples belong to them.

    The interval is a percentile bootstrap over questions; where all of them change alike there is nothing to draw from,
    and it reaches down to Wilson's lower bound on the share of questions that change so. The p-value is McNemar's exact
    test (binomial on the questions that changed) for one sample each, else a permutation test that swaps the runs
    question by question.
    """
    first, second = (np.array([np.mean(samples) for samples in run], np.float64) for run in (before, after))
    differences = second - first
    mean = float(differences.mean())
    single = all(len(samples) == 1 for run in (before, after) for samples in run)
    test = "McNemar, exact" if single else "permutation of runs by question"
    if not differences.any():
        return PairedDifference(0.0, 0.0, 0.0, 1.0, test)
    low, high = sorted((mean, mean * wilson_interval(len(differences), len(differences))[0]))
    if np.ptp(differences) > _NO_SPREAD:
        found = stats.bootstrap(
            (differences,), np.mean, n_resamples=9999, batch=999, method="percentile", rng=np.random.default_rng(0)
        )
        low, high = map(float, found.confidence_interval)
    if single:
        gained, changed = int((differences > 0).sum()), int((differences != 0).sum())
        p_value = stats.binomtest(gained, changed).pvalue
    else:
        p_value = stats.permutation_test(
            (first, second),
            lambda x, y, axis: np.mean(y - x, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            batch=999,
            rng=np.random.default_rng(0),
        ).pvalue
    return PairedDifference(mean, low, high, float(p_value), test)
