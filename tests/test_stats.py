"""Estimators against published figures, enumeration and simulation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from megatron_t1 import stats


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_as_published(correct: int, total: int, low: float, high: float) -> None:
    assert stats.wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("n", "c"), [(6, 0), (6, 1), (6, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n: int, c: int) -> None:
    samples = [i < c for i in range(n)]
    for k in range(1, n + 1):
        subsets = list(combinations(samples, k))
        assert stats.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match=r"pass@7 of 6 samples"):
        stats.pass_at_k(n, c, 7)


def test_clustered_interval_covers_where_independent_samples_would_not() -> None:
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(400):
        ability = rng.beta(0.5, 0.5, size=80)  # questions are easy or hard: 16 samples of one say much the same
        correct = rng.random((80, 16)) < ability[:, None]
        _, low, high = stats.accuracy_interval(correct.tolist())
        covered += low <= 0.5 <= high
        low, high = stats.wilson_interval(int(correct.sum()), correct.size)
        naive += low <= 0.5 <= high
    assert 0.92 < covered / 400 < 0.98
    assert naive / 400 < 0.6


def test_accuracy_interval_without_spread_is_not_a_point() -> None:
    mean, low, high = stats.accuracy_interval([[True, True]] * 20)
    assert mean == 1.0
    assert low == pytest.approx(1 - 0.1611, abs=1e-4)
    assert high == 1.0


def test_paired_difference_is_the_t_test_and_sees_what_unpaired_intervals_hide() -> None:
    before = [[False]] * 60 + [[True]] * 40
    after = [[True]] * 12 + [[False]] * 48 + [[True]] * 40
    result = stats.paired_difference(before, after)
    assert result.difference == pytest.approx(0.12)
    half = 1.98421695 * np.sqrt(0.12 * 0.88 / 99)  # t quantile of 99 degrees of freedom
    assert (result.low, result.high) == pytest.approx((0.12 - half, 0.12 + half))
    assert result.p_value < 0.001
    assert stats.paired_difference(before, before) == (0.0, 0.0, 0.0, 1.0)


def test_majority_takes_the_most_frequent_then_the_earliest() -> None:
    assert stats.majority(["3", "7", "7", None]) == "7"
    assert stats.majority(["3", "7"]) == "3"
