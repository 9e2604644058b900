"""Estimators against published figures, enumeration and simulation."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from scipy.stats import hypergeom

from megatron_t1.evaluation import stats


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_as_published(correct: int, total: int, low: float, high: float) -> None:
    assert stats.wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_holds_the_share_where_all_are_wrong_or_right() -> None:
    for total in range(1, 700):
        assert stats.wilson_interval(0, total)[0] == 0
        assert stats.wilson_interval(total, total)[1] == 1


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


def test_one_question_is_known_as_well_as_one_trial() -> None:
    """z = 1.96: (1 + z^2) half-widths of z sqrt(1/4 + z^2/4) around a half."""
    mean, low, high = stats.accuracy_interval([[True] * 16 + [False] * 16])
    half = 1.96 * (0.25 + 1.96**2 / 4) ** 0.5 / (1 + 1.96**2)
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-4)
    three = stats.clustered_interval([0.5] * 3)
    assert low < three[0] < 0.5 < three[1] < high
    assert sum(three) == pytest.approx(1)


@pytest.mark.parametrize(("num_samples", "k"), [(32, 8), (64, 16), (128, 32)])
def test_a_majority_that_is_always_right_has_the_interval_of_questions_that_are(num_samples: int, k: int) -> None:
    """By rounding alone one question's 1.0 is another's 1 - 1e-15."""
    answers = {
        f"{wrong}/{i}": ["right"] * (num_samples - wrong) + ["wrong"] * wrong
        for wrong in range(k // 4)
        for i in range(20)
    }
    shares = [stats.majority_at_k(given, "right", k) for given in answers.values()]
    assert stats.clustered_interval(shares) == pytest.approx(stats.wilson_interval(len(shares), len(shares)))


def test_pass_at_k_that_is_nearly_1_is_no_certainty() -> None:
    shares = [stats.pass_at_k(64, c, 16) for c in [40] * 15 + [64] * 15]
    assert stats.clustered_interval(shares)[0] == pytest.approx(0.8865, abs=1e-4)


def test_pairs_that_change_alike_by_thirds_are_no_certainty_either() -> None:
    thirds = [[True] * right + [False] * (3 - right) for right in range(4)]
    result = stats.paired_difference(thirds[:3] * 2, thirds[1:] * 2)
    assert (result.low, result.high) == pytest.approx((stats.wilson_interval(6, 6)[0] / 3, 1 / 3))


def test_pairs_that_all_change_alike_do_not_make_a_certainty() -> None:
    result = stats.paired_difference([[False]] * 3, [[True]] * 3)
    assert (result.difference, result.high) == (1.0, 1.0)
    assert result.low == pytest.approx(3 / (3 + 1.96**2), abs=1e-4)
    worse = stats.paired_difference([[True]] * 3, [[False]] * 3)
    assert (worse.low, worse.high) == pytest.approx((-1, -result.low))


def test_paired_difference_is_mcnemar_and_sees_what_unpaired_intervals_hide() -> None:
    before = [[False]] * 60 + [[True]] * 40
    after = [[True]] * 12 + [[False]] * 48 + [[True]] * 40
    result = stats.paired_difference(before, after)
    assert result.difference == pytest.approx(0.12)
    assert result.p_value == pytest.approx(2 / 2**12)  # twelve questions changed, all to the better
    half = 1.96 * np.sqrt(0.12 * 0.88 / 100)  # the bootstrap of a proportion, by the normal approximation
    assert (result.low, result.high) == pytest.approx((0.12 - half, 0.12 + half), abs=0.01)
    assert stats.paired_difference(before, before)[:4] == (0.0, 0.0, 0.0, 1.0)
    # Fleiss, Levin, Paik (2003), Statistical Methods for Rates and Proportions: the exact test on 5 against 15
    changed = [[True]] * 5 + [[False]] * 15
    assert stats.paired_difference(changed, [[not c] for (c,) in changed]).p_value == pytest.approx(0.0414, abs=5e-5)


def test_paired_difference_over_many_samples_keeps_its_promises() -> None:
    """Under no difference p < 0.05 comes 5% of the time and the interval holds 0 95% of the time."""
    rng = np.random.default_rng(1)
    rejected = covered = 0
    for _ in range(60):
        ability = rng.beta(0.5, 0.5, size=30)
        runs = [(rng.random((30, 4)) < ability[:, None]).tolist() for _ in range(2)]
        result = stats.paired_difference(*runs)
        assert result.test.startswith("permutation")
        rejected += result.p_value < 0.05
        covered += result.low <= 0 <= result.high
    assert rejected <= 7  # 3 expected; more than 7 has probability 0.8%
    assert covered >= 51  # 57 expected


def test_majority_at_k_is_the_vote_of_every_subset() -> None:
    """Against counting all subsets, ties shared, silent samples not voting."""
    rng = random.Random(0)

    def counted(answers: list[int | None], k: int) -> float:
        won = []
        for drawn in combinations(answers, k):
            votes = Counter(answer for answer in drawn if answer is not None)
            best = [answer for answer, count in votes.items() if count == max(votes.values())]
            won.append((1 in best) / max(1, len(best)))
        return float(np.mean(won))

    for _ in range(60):
        answers = [rng.choice([1, 2, 3, 4, None]) for _ in range(rng.randint(1, 9))]
        for k in range(1, len(answers) + 1):
            assert stats.majority_at_k(answers, 1, k) == pytest.approx(counted(answers, k)), (answers, k)
    with pytest.raises(ValueError, match="majority of 3 of 2"):
        stats.majority_at_k([1, 1], 1, 3)


def test_majority_at_k_of_64_by_simulation() -> None:
    answers = [1] * 20 + [2] * 15 + [3] * 10 + [None] * 9 + list(range(10, 20))
    rng = random.Random(0)
    won = 0.0
    for _ in range(4000):
        votes = Counter(answer for answer in rng.sample(answers, 16) if answer is not None)
        best = [answer for answer, count in votes.items() if count == max(votes.values())]
        won += (1 in best) / len(best)
    assert stats.majority_at_k(answers, 1, 16) == pytest.approx(won / 4000, abs=0.025)


def test_majority_at_k_among_many_answers_is_counted_to_the_last_draw() -> None:
    """Whole numbers of draws by (others drawn, votes of the best of them, how many have so many)."""
    rng = random.Random(0)

    def counted(answers: list[int | None], k: int) -> float:
        votes = Counter(answers)
        silent, num_right = votes.pop(None, 0), votes.pop(0, 0)
        ways = Counter({(drawn, 0, 0): comb(silent, drawn) for drawn in range(silent + 1)})
        for count in votes.values():
            grown: Counter[tuple[int, int, int]] = Counter()
            for (drawn, best, ties), number in ways.items():
                for own in range(count + 1):
                    tied = 1 if own > best else ties + (own == best > 0)
                    grown[drawn + own, max(best, own), tied] += number * comb(count, own)
            ways = grown
        won = Fraction()
        for (drawn, best, ties), number in ways.items():
            if 1 <= k - drawn <= num_right and k - drawn >= best:
                won += Fraction(number * comb(num_right, k - drawn), ties + 1 if k - drawn == best else 1)
        return float(won / comb(len(answers), k))

    for num_answers in (1, 5, 20, 40):
        answers = [rng.choice([0, None, *rng.choices(range(num_answers), k=5)]) for _ in range(60)]
        for k in (1, 2, 7, 31, 59, 60):
            assert stats.majority_at_k(answers, 0, k) == pytest.approx(counted(answers, k), abs=1e-12), (answers, k)


def test_majority_among_answers_that_were_given_once() -> None:
    """Two of the three right samples win; one ties with everything else that was drawn."""
    votes = hypergeom(1500, 3, 512)
    majority = stats.majority_at_k([1] * 3 + list(range(10, 1507)), 1, 512)
    assert majority == pytest.approx(votes.sf(1) + votes.pmf(1) / 512, rel=1e-9)


def test_majority_of_many_samples_does_not_overflow() -> None:
    """Two answers, 620 against 580: that a draw of 512 goes to the first is a hypergeometric tail."""
    votes = hypergeom(1200, 620, 512)
    majority = stats.majority_at_k([1] * 620 + [2] * 580, 1, 512)
    assert majority == pytest.approx(votes.sf(256) + votes.pmf(256) / 2, rel=1e-9)
