"""T1's KL to the anchor, normalised on policy: what a sample's is more than the others' of the same prompt.

    T1 (arXiv 2501.11651):  c_i = KL_i - mean of KL_j over the K-1 others,   KL_i = sum_t log pi_t - log anchor_t

i.e. leave-one-out of r - beta KL. For samples of pi its expected gradient is that of KL(pi||anchor), with either
baseline and with none: these only change the variance.

Off policy -beta KL_i, of the present pi, still is a part of sample i's reward: with samples of mu and unbounded
weights by sequence E_mu[s KL_i grad log pi] is the gradient of KL(pi||anchor). So c has the weight of the advantage,
and what `algo.advantage` says of the baseline under each weight is true of c's. The mean of KL_i over samples of mu is
not KL(pi||anchor), and may be negative.
"""

from __future__ import annotations

import numpy as np

from megatron_t1.algo.advantage import leave_one_out
from megatron_t1.algo.config import KlBaseline


def centered(kl: np.ndarray, groups: np.ndarray, baseline: KlBaseline) -> np.ndarray:
    """KL of each sample in nats, float64 [num_samples] -> the c of each, float64 [num_samples].

    Args:
        groups: int64 [num_samples], equal for the samples of one prompt; a sample alone keeps its KL.
    """
    match baseline:
        case "none":
            return kl
        case "batch":
            return leave_one_out(kl)
        case "prompt":
            c = np.empty_like(kl)
            for group in np.unique(groups):
                members = groups == group
                c[members] = leave_one_out(kl[members])
            return c
