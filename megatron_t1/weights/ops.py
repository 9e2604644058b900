"""How a Megatron parameter and Hugging Face tensors name the same numbers.

An op is data: which Hugging Face tensors a Megatron parameter is made of, and how tensor parallelism cuts it. Its one
method, `pieces`, lists this rank's part as (Hugging Face name, full shape, index into it, view into the local
parameter). The views alias the parameter, so the same list serves import (write into the views), export and the live
sync (read from them): no direction is written twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Piece:
    """This rank's part of one Hugging Face tensor.

    `hf[index]` and `view` hold the same numbers in the same order; `view` may have more dimensions (a fused QKV is cut
    by KV group), so copy with `hf[index].view(view.shape)`.
    """

    name: str
    """Hugging Face name."""
    shape: tuple[int, ...]
    """Full shape of the Hugging Face tensor."""
    index: tuple[slice, ...]
    """Where in it this piece lies, one slice a dimension."""
    view: torch.Tensor
    """The local Megatron numbers, aliased; possibly not contiguous."""

    @property
    def dtype(self) -> torch.dtype:
        return self.view.dtype

    @property
    def num_bytes(self) -> int:
        return self.view.numel() * self.view.element_size()
