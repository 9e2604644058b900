"""T1's centring against its formula, worked by hand, and what it does to the variance."""

import numpy as np
import pytest

from megatron_t1.algo.kl import centered

KL, GROUPS = np.array([10.0, 1.0, 12.0, 3.0, 5.0]), np.array([0, 1, 0, 1, 2])


@pytest.mark.parametrize(
    ("baseline", "c"),
    [
        ("prompt", [-2.0, -2.0, 2.0, 2.0, 5.0]),
        ("batch", [10 - 21 / 4, 1 - 30 / 4, 12 - 19 / 4, 3 - 28 / 4, 5 - 26 / 4]),
        ("none", [10.0, 1.0, 12.0, 3.0, 5.0]),
    ],
)
def test_the_others_of_the_prompt_are_the_baseline(baseline, c):
    np.testing.assert_allclose(centered(KL, GROUPS, baseline), c, rtol=1e-15)


def test_a_policy_that_is_the_anchor_is_not_moved():
    for baseline in ("prompt", "batch", "none"):
        assert not centered(np.zeros(5), GROUPS, baseline).any()
