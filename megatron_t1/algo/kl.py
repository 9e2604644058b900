"""T1's KL to the anchor, normalised on policy: what a sample's is more than the batch's mean."""

from __future__ import annotations

from torch import Tensor


def centered(sums: Tensor) -> Tensor:
    """sum_t (log pi - log anchor) over each sample's own tokens, float64 [num_samples] -> less their mean, float32."""
    return (sums - sums.mean()).float()
