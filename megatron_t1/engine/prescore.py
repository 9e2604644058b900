"""What the loss must know of whole samples before the first backward, from forward passes over the step's microbatches.

The anchor is asked for its logprobs, and the policy for its own where a sum over a sample's tokens is a constant of the
loss: T1's centred KL (`algo.kl`) and the ratios of whole samples (`algo.loss`), which share the one pass. The servers'
logprobs cannot stand in for the policy's: they are of other weights off policy, of another distribution where top_p or
min_p cut it, and of another precision. With anchor = policy every KL is 0.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_t1.algo.config import LossConfig
from megatron_t1.algo.head.fused import logprob_entropy_nograd
from megatron_t1.algo.head.layout import Head
from megatron_t1.algo.kl import centered
from megatron_t1.engine.anchor import Anchor
from megatron_t1.engine.step import Engine
from megatron_t1.types import Microbatch, TrainSequence


def prescore(
    engine: Engine,
    anchor: Anchor | None,
    microbatches: list[Microbatch],
    sequences: list[TrainSequence],
    loss: LossConfig,
) -> dict[str, float]:
    """Set on this rank's microbatches what `loss` needs: of the anchor `anchor_logprob`, and `anchor_hidden` for the
    full-vocabulary KL (both on the last pipeline stage); where the policy is scored `centered_kl`, `sequence_log_ratio`
    and `geometric_log_ratio`. Collective over the trainer's ranks. Without an anchor and ratios of samples no pass is
    made.

    Args:
        sequences: those of the whole step, which `sample_index` of the microbatches counts along.

    Returns:
        Where both are scored, mean and standard deviation over all samples of log policy - log anchor in nats, of
        samples of the policy its KL to the anchor; {} else.
    """

    def logprobs(hidden: torch.Tensor, head: Head, microbatch: Microbatch) -> torch.Tensor:
        return logprob_entropy_nograd(hidden, head, microbatch.target_positions, microbatch.targets)[0]

    def anchor_logprobs(hidden: torch.Tensor, head: Head, microbatch: Microbatch) -> torch.Tensor:
        if loss.kl_estimator == "full":
            microbatch.anchor_hidden = hidden.cpu()
        return logprobs(hidden, head, microbatch)

    if anchor is not None:
        of_anchor = engine.map_hidden(anchor.chunks, microbatches, anchor_logprobs)
        for microbatch, anchor_logprob in zip(microbatches, of_anchor, strict=False):  # on other stages there are none
            microbatch.anchor_logprob = anchor_logprob
    if not loss.scores_policy:
        return {}
    of_policy = engine.map_hidden(engine.chunks, microbatches, logprobs)
    differences = [
        torch.stack([policy - microbatch.anchor_logprob, policy - microbatch.rollout_logprob], dim=1)
        for microbatch, policy in zip(microbatches, of_policy, strict=False)
    ]
    kl, log_ratio = _sums(engine, microbatches, differences, len(sequences)).T
    num_tokens = np.array([len(sequence.response_ids) for sequence in sequences])
    of_samples = {"sequence_log_ratio": log_ratio, "geometric_log_ratio": log_ratio / num_tokens}
    if anchor is not None:
        groups = np.array([sequence.group for sequence in sequences])
        of_samples["centered_kl"] = centered(kl, groups, loss.kl_baseline)
    for name, values in of_samples.items():
        constants = torch.from_numpy(values).float().to(engine.platform.device)
        for microbatch in microbatches:
            setattr(microbatch, name, constants[microbatch.sample_index])
    return {"kl_sample": float(kl.mean()), "kl_sample_std": float(kl.std())} if anchor is not None else {}


def _sums(engine: Engine, microbatches: list[Microbatch], values: list[torch.Tensor], num_samples: int) -> np.ndarray:
    """Of values [T, 2] of the last stage's ranks, the sums by sample on every rank: float64 [num_samples, 2].

    They are added up on the host, token by token, so that neither packing nor the order of a GPU's atomics is in the
    result, and of the layout only, in the last bits, over how many ranks of a context group a sample is spread.
    """
    sums = torch.zeros(num_samples, 2, dtype=torch.float64)
    if mpu.get_tensor_model_parallel_rank() == 0:
        for microbatch, of_tokens in zip(microbatches, values, strict=False):
            sums.index_add_(0, microbatch.sample_index.cpu(), of_tokens.double().cpu())
    sums = sums.to(engine.platform.device)
    dist.all_reduce(sums)
    return sums.cpu().numpy()
