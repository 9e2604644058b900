"""A pass over microbatches that is cut off between two of them, once rank 0 was asked to stop.

Megatron's schedule is one call in which ranks wait for tensors of others: none may leave it early. All leave the same
microbatches out instead, and zeros pass through the pipeline in their place, which costs next to nothing. What is in
the pipeline by then is finished.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model

from megatron_t1.stop import STOP, Stopped
from megatron_t1.types import Microbatch


class Cut:
    """Of one pass over as many microbatches on every rank."""

    def __init__(self) -> None:
        self._left_out: list[bool] = []  # by number
        self._told: list[dist.Work] = []

    @property
    def made(self) -> bool:
        return any(self._left_out)

    def leaves_out(self, number: int) -> bool:
        """The same on every rank. Rank 0, which begins a microbatch before the later stages do, decides by its signal
        and tells the others, and waits for none of them."""
        while len(self._left_out) <= number:  # else another chunk of this rank's has asked
            asked = torch.tensor(STOP.asked, dtype=torch.uint8)
            if dist.get_rank() == 0:
                self._told += [dist.isend(asked, rank) for rank in range(1, dist.get_world_size())]
            else:
                dist.recv(asked, 0)
            self._left_out.append(bool(asked))
        return self._left_out[number]

    def finish(self) -> None:
        """
        Raises:
            Stopped: microbatches were left out; on every rank.
        """
        for message in self._told:
            message.wait()
        if self.made:
            raise Stopped


def zeros_onward(chunk: torch.nn.Module, config: TransformerConfig, microbatch: Microbatch) -> torch.Tensor:
    """In place of what the chunk makes of a microbatch, and of its gradient: no more than its shape."""
    received = get_attr_wrapped_model(chunk, "decoder").input_tensor
    if received is None:  # on the first stage
        shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
        received = torch.zeros(
            len(microbatch.token_ids) // shards, 1, config.hidden_size,
            dtype=config.params_dtype, device=microbatch.token_ids.device, requires_grad=True,
        )  # fmt: skip
    return received.clone()


def no_loss(hidden: torch.Tensor, non_loss_data: bool = False) -> Any:
    """As the schedule asks for it, with a gradient for the stages before."""
    return None if non_loss_data else (hidden.float().sum(), torch.tensor(0, dtype=torch.int), None)
