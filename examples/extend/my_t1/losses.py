"""A token loss and an advantage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from megatron_t1.algo.config import ADVANTAGES, TOKEN_LOSSES, LossConfig
from megatron_t1.algo.loss import Metrics, TokenFields, t1_token_loss


@TOKEN_LOSSES.add
def t1_uncertain(
    logprob: Tensor, entropy: Tensor, tokens: TokenFields, kl: Tensor | None = None, *, cfg: LossConfig
) -> tuple[Tensor, Metrics]:
    """T1's loss, with the reward's gradient of tokens that are all but certain (p > 0.99) left out. All are [T]."""
    uncertain = logprob.detach() <= np.log(0.99)
    return t1_token_loss(logprob, entropy, replace(tokens, advantage=tokens.advantage * uncertain), kl, cfg=cfg)


@ADVANTAGES.add
def centered_ranks(rewards: np.ndarray) -> np.ndarray:
    """float [K] -> float64 [K]: ranks from -1 to 1 (equal rewards share theirs), so that no outlier dominates."""
    ranks = np.array([(rewards < r).sum() + ((rewards == r).sum() - 1) / 2 for r in rewards])
    return 2 * ranks / max(1, len(rewards) - 1) - 1
