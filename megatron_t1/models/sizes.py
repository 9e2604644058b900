"""A model's numbers of parameters and what a token costs, from its spec: for estimates, and to balance work by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_t1.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model's numbers of parameters, by how tensor parallelism splits them."""

    hidden: int
    vocab: int
    tied: bool
    query: int
    """Width of all query heads together."""
    key: int
    """Width of all key heads together; values have the same."""
    widths: tuple[int, ...]
    """Of every layer's MLP (in a mixture: of the experts that one token takes, and the shared one)."""
    split: tuple[int, ...]
    """Parameters of every layer that tensor parallelism splits."""
    whole: tuple[int, ...]
    """And that it does not."""
    experts: tuple[int, ...]
    """Of all its experts, which expert parallelism splits; 0 in a dense layer."""

    @classmethod
    def of(cls, spec: ModelSpec) -> Sizes:
        t: Mapping[str, Any] = spec.transformer
        h, d, num_layers = t["hidden_size"], t["kv_channels"], t["num_layers"]
        q, k = t["num_attention_heads"] * d, t["num_query_groups"] * d
        num_experts, frequency = t.get("num_moe_experts") or 0, t.get("moe_layer_freq", 1)
        sparse = frequency if isinstance(frequency, list) else [1] * num_layers
        sparse = sparse if num_experts else [0] * num_layers
        shared, one = t.get("moe_shared_expert_intermediate_size") or 0, t.get("moe_ffn_hidden_size") or 0
        attention = h * (q + 2 * k) + q * h + (q + 2 * k if t.get("add_qkv_bias") else 0)
        norms = 2 * h + (2 * d if t.get("qk_layernorm") else 0)
        return cls(
            hidden=h,
            vocab=spec.vocab_size,
            tied=spec.tied_embeddings,
            query=q,
            key=k,
            widths=tuple(one * t["moe_router_topk"] + shared if has else t["ffn_hidden_size"] for has in sparse),
            split=tuple(attention + 3 * h * (shared if has else t["ffn_hidden_size"]) for has in sparse),
            whole=tuple(norms + (h * num_experts if has else 0) for has in sparse),
            experts=tuple(3 * h * one * num_experts if has else 0 for has in sparse),
        )

    @property
    def num_layers(self) -> int:
        return len(self.widths)

    @property
    def mlp(self) -> int:
        """Width of the widest."""
        return max(self.widths)

    @property
    def total(self) -> int:
        layers = sum(self.split) + sum(self.whole) + sum(self.experts)
        return layers + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with, the head included (the embedding is looked up)."""
        attention = 2 * self.hidden * (self.query + self.key)
        mlps = 3 * self.hidden * sum(self.widths)
        return self.num_layers * attention + mlps + self.vocab * self.hidden

    @property
    def attention(self) -> float:
        """What attention costs by what the matrices do: (n + attention n^2) x 2 active flops are a forward pass over n
        tokens. Causal, so n^2 / 2 pairs, of which each takes 2 query flops for its score and as many for its value."""
        return self.num_layers * self.query / self.active
