"""Layer specs: Megatron's own with Transformer Engine; without it its local one with two modules replaced.

`RMSNorm`: Megatron's wrapper around torch's norm refuses sequence parallelism. `PackedAttention`: the local
DotProductAttention refuses packed sequences. Both run on the CPU and on GPUs. `SandwichLayer` is for families whose
layers have more norms than Megatron knows, with either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch.utils.checkpoint import checkpoint

from megatron_t1.data.packing import rows_of

# Megatron-Core 0.16.1 forgets to say that it has none when Transformer Engine is not installed, and asks for its FP8 in
# the recomputation of norms, whose default means that there is some.
vars(moe_utils).setdefault("te_general_gemm", None)
if not megatron_random.HAVE_TE:
    vars(megatron_random.CheckpointWithoutOutput)["__init__"].__defaults__ = (None,)
_rotate = attention.apply_rotary_pos_emb


def _rotate_stream(t: torch.Tensor, freqs: torch.Tensor, config: TransformerConfig, **options: Any) -> torch.Tensor:
    """Megatron's, but for queries or keys [s, heads, d] that no kernel rotates: their angles were gathered by position
    (`T1GPTModel`), where it would ask the device for every sequence's length, four times a layer."""
    if options.get("cu_seqlens") is None or config.apply_rope_fusion:
        return _rotate(t, freqs, config, **options)
    return _rotate(t[:, None], freqs, config, **{**options, "cu_seqlens": None})[:, 0]


vars(attention)["apply_rotary_pos_emb"] = _rotate_stream


class RMSNorm(torch.nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron all-reduces the gradients of parameters marked so over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LocalPackedSeqParams(PackedSeqParams):
    """Packed sequences for `PackedAttention`, which finds the padded layouts computed once for all layers.

    `qkv_format` stays `sbhd`: Megatron then applies the rotary embedding to the whole stream at once.
    """

    def __init__(self, cu_seqlens: torch.Tensor, max_seqlen: int, context_rank: int, context_size: int) -> None:
        super().__init__(
            qkv_format="sbhd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
        )
        bounds = cu_seqlens.tolist()
        starts, lengths = np.array(bounds[:-1]), np.diff(bounds)
        self.padded_indices: list[torch.Tensor] = []
        """int64 [n, longest] for the n sequences of like length: the rows of the stream, padded. All padded to the
        longest of the stream, some short ones beside it would cost as much as if each were as long."""
        place, num_rows = np.empty(bounds[-1], np.int64), 0
        for power in np.unique(powers := np.frexp(lengths)[1]):  # within a factor of 2
            first, length = starts[powers == power, None], lengths[powers == power, None]
            column = np.arange(length.max())
            # Rows past a sequence's end read its last token; causality keeps them out of every real token's result.
            index = first + np.minimum(column, length - 1)
            valid = np.flatnonzero(column < length)
            place[index.ravel()[valid]] = num_rows + valid
            num_rows += index.size
            self.padded_indices.append(torch.from_numpy(index).to(cu_seqlens.device))
        self.place = torch.from_numpy(place).to(cu_seqlens.device)
        """int64 [s], where each row of the stream is among the padded ones, one layout after another."""
        if context_size > 1:
            rows = [torch.from_numpy(rows_of(rank, context_size, bounds)) for rank in range(context_size)]
            self.rows = rows[context_rank].to(cu_seqlens.device)
            """int64 [s], those of the stream that this rank has."""
            self.gathered = torch.cat(rows).argsort().to(cu_seqlens.device)
            """int64 [s x context_size], where each row of the stream is among those of all ranks, one after another."""


class PackedAttention(torch.nn.Module):
    """Causal attention within each packed sequence, on torch's scaled_dot_product_attention.

    The packed stream is read as [n, longest], in one batched call for all sequences of like length, and written back
    without the padding.

    Under context parallelism every rank gathers the keys and values of the stream and attends with its own queries,
    among zeros in the others' places: as much work as without, in memory that is freed behind each layer (the backward
    pass does it again). Transformer Engine's does not do that work.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        self.context_group = mpu.get_context_parallel_group() if config.context_parallel_size > 1 else None
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: LocalPackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [s, 1, heads, d], key and value [s, 1, kv_heads, d] -> [s, 1, heads * d]."""
        assert packed_seq_params is not None, "the trainer always packs"
        if self.context_group is None:
            return self._attend(query, key, value, packed_seq_params)
        return checkpoint(
            self._attend_to_others, query, key, value, packed_seq_params, use_reentrant=False, preserve_rng_state=False
        )

    def _attend_to_others(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: LocalPackedSeqParams
    ) -> torch.Tensor:
        key, value = (
            gather_from_sequence_parallel_region(part, group=self.context_group)[packed.gathered]
            for part in (key, value)
        )
        query = query.new_zeros(len(key), *query.shape[1:]).index_copy(0, packed.rows, query)
        return self._attend(query, key, value, packed)[packed.rows]

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: LocalPackedSeqParams
    ) -> torch.Tensor:
        def padded(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            # [s, 1, heads, d] -> [n, heads, longest, d]
            return x.squeeze(1)[index].transpose(1, 2)

        parts = []
        for index in packed.padded_indices:
            out = F.scaled_dot_product_attention(
                padded(query, index),
                padded(key, index),
                padded(value, index),
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
            parts.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(parts)[packed.place].unsqueeze(1)


class SandwichLayer(TransformerLayer):
    """A layer with a norm behind attention and MLP too, each before its output is added to the residual stream."""

    norm: Callable[..., torch.nn.Module]
    """Set by a subclass for the kind of block."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for name, add in (("post_self_attn_layernorm", "self_attn_bda"), ("post_mlp_layernorm", "mlp_bda")):
            norm = self.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            setattr(self, name, norm)
            setattr(self, add, partial(_normalise_and_add, norm, getattr(self, add)))


def _normalise_and_add(norm: torch.nn.Module, build_add: Callable[..., Any], *settings: Any) -> Callable[..., Any]:
    add = build_add(*settings)

    def normalised(output_and_bias: tuple[torch.Tensor, None], *rest: Any) -> torch.Tensor:
        output, bias = output_and_bias
        assert bias is None, "these families have no bias on the way out"
        return add((norm(output), None), *rest)

    return normalised


class LocalSandwichLayer(SandwichLayer):
    norm = RMSNorm


def local_block_spec(
    config: TransformerConfig, sandwich_norms: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Megatron's local GPT block with our norm (also at the end of the block) and our attention core."""

    def layer(num_experts: int | None) -> ModuleSpec:
        spec = get_gpt_layer_local_spec(
            num_experts=num_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
        parts = spec.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        attention = parts.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        if num_experts:
            # Transformer Engine keeps this norm by itself there; so named, its checkpoints load into these layers.
            del parts.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        if sandwich_norms:
            spec.module = LocalSandwichLayer
        return spec

    return TransformerBlockSubmodules(layer_specs=_of_this_stage(config, vp_stage, layer), layer_norm=RMSNorm)


def te_block_spec(config: TransformerConfig, sandwich_norms: bool, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's GPT block of Transformer Engine's layers."""
    from megatron.core.extensions.transformer_engine import TENorm

    class TESandwichLayer(SandwichLayer):
        norm = TENorm

    def layer(num_experts: int | None) -> ModuleSpec:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
        if sandwich_norms:
            spec.module = TESandwichLayer
        return spec

    return TransformerBlockSubmodules(layer_specs=_of_this_stage(config, vp_stage, layer), layer_norm=TENorm)


def _of_this_stage(
    config: TransformerConfig, vp_stage: int | None, layer: Callable[[int | None], ModuleSpec]
) -> list[ModuleSpec]:
    """The specs of this chunk's layers, dense ones and mixtures of experts as `moe_layer_freq` has them."""
    experts = config.num_moe_experts
    frequency = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [1] * config.num_layers
    kinds = {0: layer(None), 1: layer(experts)} if experts else dict.fromkeys((0, 1), layer(None))
    offset = get_transformer_layer_offset(config, vp_stage)
    return [kinds[kind] for kind in frequency[offset : offset + get_num_layers_to_build(config, vp_stage)]]
