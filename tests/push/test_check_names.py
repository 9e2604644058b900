"""Which of a served folder's tensors a push has to bring. The refusals are shown on a real server in test_sync.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from megatron_t1.push.in_vllm.reload import check_names

SERVED = {
    "model.embed_tokens.weight": (6, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 8),
    "model.layers.1.mlp.down_proj.weight": (4, 8),
}


def model_config(folder: Path, names: dict[str, tuple[int, ...]], *, tied: bool) -> SimpleNamespace:
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, folder / "model.safetensors")
    return SimpleNamespace(model=str(folder), hf_config=SimpleNamespace(num_hidden_layers=2, tie_word_embeddings=tied))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)},
        {"model.layers.2.eh_proj.weight": (4, 8), "model.layers.2.mlp.down_proj.weight": (4, 8)},
    ],
)
def test_what_no_server_loads_is_not_asked_for(tmp_path: Path, more: dict[str, tuple[int, ...]]) -> None:
    check_names(model_config(tmp_path, SERVED | more, tied=False), SERVED)


def test_a_tied_head_may_be_there_or_not_on_either_side(tmp_path: Path) -> None:
    head = {"lm_head.weight": (6, 4)}
    check_names(model_config(tmp_path, SERVED | head, tied=True), SERVED)
    check_names(model_config(tmp_path, SERVED, tied=True), SERVED | head)
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        check_names(model_config(tmp_path, SERVED | head, tied=False), SERVED)
