"""What transformers says the logprobs are, and the cuts of a state dict that trainer ranks hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megatron_t1.models.weight_map import Piece

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")


def logprobs(
    model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int], temperature: float
) -> torch.Tensor:
    """float32 [len(response)]: transformers' logprobs of a response after temperature."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Hugging Face name -> tensor; a tied head is left out, as in its safetensors."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def whole(tensors: dict[str, torch.Tensor], names: Iterable[str] | None = None) -> list[Piece]:
    """Uncut pieces: one rank, or the stage of a pipeline when `names` are given."""
    return [_piece(name, tensors[name], None, 0, 1) for name in (names or tensors)]


def tensor_parallel(tensors: dict[str, torch.Tensor], rank: int, size: int) -> list[Piece]:
    """Pieces of one tensor-parallel rank: columns, rows, or replicated. Views are split further, as Megatron's are."""
    pieces = []
    for name, tensor in tensors.items():
        dim = None
        if any(key in name for key in COLUMN_PARALLEL):
            dim = 0
        elif name.endswith(ROW_PARALLEL):
            dim = 1
        pieces.append(_piece(name, tensor, dim, rank, size))
    return pieces


def _piece(name: str, tensor: torch.Tensor, dim: int | None, rank: int, size: int) -> Piece:
    index = [slice(0, n) for n in tensor.shape]
    if dim is not None:
        step = tensor.shape[dim] // size
        index[dim] = slice(rank * step, (rank + 1) * step)
    view = tensor[tuple(index)].clone()
    if dim == 0:
        view = view.view(2, -1, *view.shape[1:])
    return Piece(name=name, shape=tuple(tensor.shape), index=tuple(index), view=view)
