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
    num_layers: int
    vocab: int
    tied: bool
    query: int
    """Width of all query heads together."""
    key: int
    """Width of all key heads together; values have the same."""
    mlp: int
    """Width of the MLP (of the experts that one token takes, for a mixture)."""
    split_per_layer: int
    whole_per_layer: int
    experts_per_layer: int = 0
    """Of all experts of a mixture; expert parallelism splits them."""

    @classmethod
    def of(cls, spec: ModelSpec) -> Sizes:
        t: Mapping[str, Any] = spec.transformer
        h, d = t["hidden_size"], t["kv_channels"]
        q, k = t["num_attention_heads"] * d, t["num_query_groups"] * d
        experts = t.get("num_moe_experts")
        ffn = t["moe_ffn_hidden_size"] if experts else t["ffn_hidden_size"]
        shared = t.get("moe_shared_expert_intermediate_size") or 0 if experts else ffn
        bias = q + 2 * k if t.get("add_qkv_bias") else 0
        norms = 2 * h + (2 * d if t.get("qk_layernorm") else 0)
        return cls(
            hidden=h,
            num_layers=t["num_layers"],
            vocab=spec.vocab_size,
            tied=spec.tied_embeddings,
            query=q,
            key=k,
            mlp=ffn * t.get("moe_router_topk", 1) + shared if experts else ffn,
            split_per_layer=h * (q + 2 * k) + q * h + 3 * h * shared + bias,
            whole_per_layer=norms + (h * experts if experts else 0),
            experts_per_layer=3 * h * ffn * experts if experts else 0,
        )

    @property
    def total(self) -> int:
        per_layer = self.split_per_layer + self.whole_per_layer + self.experts_per_layer
        return self.num_layers * per_layer + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with, the head included (the embedding is looked up)."""
        mlp = 3 * self.hidden * self.mlp
        attention = 2 * self.hidden * (self.query + self.key)
        return self.num_layers * (attention + mlp) + self.vocab * self.hidden

    @property
    def attention(self) -> float:
        """What attention costs by what the matrices do: (n + attention n^2) x 2 active flops are a forward pass over n
        tokens. Causal, so n^2 / 2 pairs, of which each takes 2 query flops for its score and as many for its value."""
        return self.num_layers * self.query / self.active
