"""What the rewards of a prompt's samples make of each other: T1's leave-one-out, and GRPO's.

Leave-one-out (RLOO): A_i = r_i - mean of the other K-1 rewards of the same prompt.

Kool, van Hoof, Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!" (2019); T1 uses it unscaled, without
dividing by the group's standard deviation. Assumes that a group's samples are independent draws of one policy. Equals
K / (K-1) x (r_i - mean of all K); it is 0 for a group whose rewards are all equal.

Off policy, with samples of mu and weights w (`algo.loss`), the mean of the others stays a baseline b that knows nothing
of sample i; that it estimates mu's mean reward and not pi's changes the variance alone. It drops out of the gradient,

    E_mu[w_t b grad log pi(y_t)] = b E_pi[grad log pi(y_t)] = 0,

under unbounded weights, by sequence as by token. Another weight w' (bounded, masked, stopped, GSPO's) leaves of it
b E_mu[(w - w') grad log pi], in all -E_mu[(w - w') (r - b) grad log pi]: a smaller bias than without b where b is near
the rewards of what was cut. No weights leave b grad KL(mu||pi), which moves pi to mu for b < 0 and from it for b > 0.
"""

from __future__ import annotations

import numpy as np

from megatron_t1.algo.config import ADVANTAGES
from megatron_t1.types import Group


@ADVANTAGES.add
def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """float [K] -> float64 [K]; K = 1 has no baseline and keeps its reward."""
    rewards = np.asarray(rewards, np.float64)
    if len(rewards) == 1:
        return rewards
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


@ADVANTAGES.add
def grpo(rewards: np.ndarray) -> np.ndarray:
    """float [K] -> float64 [K]: (r_i - mean) / (standard deviation + 1e-6), of all K (Shao et al., arXiv 2402.03300).

    The division weights prompts that are nearly always or nearly never solved more. K = 1 gives 0.
    """
    rewards = np.asarray(rewards, np.float64)
    if len(rewards) == 1:
        return np.zeros(1)
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)


def assign(groups: list[Group], advantage: str = "leave_one_out") -> list[Group]:
    """Set `Sample.advantage` on every sample from the rewards of its group, by the advantage of that name.

    Raises:
        ValueError: a sample that has not been graded.
    """
    for group in groups:
        rewards = []
        for sample in group.samples:
            if sample.reward is None:
                raise ValueError(f"prompt {group.prompt.id}: a sample has no reward; grade before assigning advantages")
            rewards.append(sample.reward.value)
        for sample, value in zip(group.samples, ADVANTAGES[advantage](np.array(rewards)), strict=True):
            sample.advantage = float(value)
    return groups
