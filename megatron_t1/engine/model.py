"""From a model spec to Megatron's GPTModel on this rank's pipeline stages, wrapped for data parallelism.

The model ends at the hidden states: the output layer's GEMM belongs to the fused head, which never holds the logits.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings import rotary_pos_embedding as megatron_rotary
from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as megatron_yarn
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_t1.algo.head.layout import Head
from megatron_t1.engine.config import ModelConfig, ParallelConfig
from megatron_t1.engine.layers import LocalPackedSeqParams, local_block_spec, te_block_spec
from megatron_t1.engine.layout import check_divisible
from megatron_t1.engine.parallel import shards
from megatron_t1.models.spec import ModelSpec, Yarn
from megatron_t1.platform.detect import Platform
from megatron_t1.types import Microbatch

_APEX_WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"
# Megatron keeps the angles of the last 32 lengths: a gigabyte of a GPU for samples of 64k tokens, in the servers' turn
# too. Here nearly every microbatch has another length.
_rotary: Any = megatron_rotary.RotaryEmbedding
_rotary.forward = _rotary.forward.__wrapped__


class T1GPTModel(GPTModel):
    """GPTModel whose last stage returns the final hidden states: [s, 1, h], or [s / tp, 1, h] under SP."""

    def _preprocess(self, input_ids, position_ids, decoder_input=None, inference_context=None, packed_seq_params=None,
                    padding_mask=None):  # fmt: skip
        out = super()._preprocess(
            input_ids, position_ids, decoder_input, inference_context, packed_seq_params, padding_mask
        )
        if self.config.apply_rope_fusion and not isinstance(packed_seq_params, LocalPackedSeqParams):
            return out
        decoder_input, rotary, *rest = out
        return decoder_input, rotary[position_ids[0]], *rest

    def _postprocess(self, hidden_states, *args, **kwargs):
        return hidden_states


def takes_te_layers(cfg: ModelConfig, platform: Platform) -> bool:
    """Whether the model is built of Transformer Engine's layers."""
    return platform.transformer_engine is not None and cfg.layers == "auto" and cfg.dtype != "float32"


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_config(
    cfg: ModelConfig, spec: ModelSpec, parallel: ParallelConfig, platform: Platform
) -> TransformerConfig:
    """Megatron's config from the checkpoint's architecture, our precision and layout, and the user's extra fields."""
    dtype, te_layers = getattr(torch, cfg.dtype), takes_te_layers(cfg, platform)
    fields: dict[str, Any] = {
        **spec.transformer,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "pipeline_model_parallel_layout": _pipeline_layout(spec, parallel),
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor or parallel.tensor,
        "sequence_parallel": parallel.sequence_parallel,
        "activation_func": F.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": platform.name == "cpu",
        # Every weight is read from a checkpoint. `perform_initialization=False` would also leave out the marks by which
        # the gradient norm tells sharded parameters from replicated ones.
        "init_method": _leave_as_is,
        "output_layer_init_method": _leave_as_is,
        "embedding_init_method": _leave_as_is,
        # The GEMM itself adds a weight's gradient to the float32 buffer, not rounded to bfloat16 before. Megatron's own
        # layers need a module of Apex for it.
        "gradient_accumulation_fusion": te_layers or (platform.apex and find_spec(_APEX_WEIGHT_GRADIENT) is not None),
        "masked_softmax_fusion": False,
        "bias_activation_fusion": platform.name == "cuda",
        # Older Transformer Engines can't fuse the interleaved kind, and none knows YaRN's factor on queries and keys.
        "apply_rope_fusion": te_layers and not spec.transformer.get("rotary_interleaved", False) and not spec.yarn,
        "calculate_per_token_loss": True,  # gradients are summed, the loss is already over the global token count
        "variable_seq_lengths": False,
        # Of two stages the interleaved schedule's batched exchange mixes up a rank's neighbours: they are one.
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        **_moe_defaults(spec, te_layers, platform),
    }
    if cfg.transformer.get("fp8"):
        fields["fp8_recipe"] = "tensorwise"  # keeps no scales, so there are none to save, and none are stale
    given = dict(cfg.transformer)
    if "attention_backend" in given:  # Megatron compares with members, and passes by anything else
        given["attention_backend"] = AttnBackend[given["attention_backend"]]
    try:
        config = TransformerConfig(**{**fields, **given})
    except Exception as error:  # asserts are among its ways
        told = str(error) or type(error).__name__
        raise ValueError(f"model.transformer: Megatron refuses it with this layout: {told}") from error
    if spec.yarn:
        # Megatron's attention looks for what it multiplies queries and keys by in fields that its config lacks: it is
        # (0.1 yarn_mscale ln yarn_rotary_scaling_factor + 1) / (0.1 yarn_mscale_all_dim ln ... + 1).
        scale = {"rotary_scaling_factor": math.e, "mscale": 10 * (spec.yarn.scale - 1), "mscale_all_dim": 0.0}
        vars(config).update({f"yarn_{name}": value for name, value in scale.items()})
    return config


def _pipeline_layout(spec: ModelSpec, parallel: ParallelConfig) -> list[list[str]] | None:
    """Megatron's name for what each pipeline chunk holds."""
    if parallel.pipeline == 1:
        return None
    layout = [["decoder"] * count for count in parallel.layers_of_stages(spec.transformer["num_layers"])]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def _moe_defaults(spec: ModelSpec, te_layers: bool, platform: Platform) -> dict[str, Any]:
    """How a mixture of experts is trained: no loss but T1's, and routing biases stay what the checkpoint says."""
    if "num_moe_experts" not in spec.transformer:
        return {}
    return {
        "moe_router_load_balancing_type": "none",
        "moe_router_bias_update_rate": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": te_layers,
        # Megatron's own sums a token's experts in bfloat16 and in no fixed order: no run is then equal to another.
        "moe_permute_fusion": te_layers and platform.name == "cuda",
    }


def build_model(
    cfg: ModelConfig, spec: ModelSpec, parallel: ParallelConfig, platform: Platform, device: torch.device | None = None
) -> tuple[TransformerConfig, list[T1GPTModel]]:
    """This rank's chunks of the model (one, or `parallel.virtual_pipeline`) with zeroed weights, which a checkpoint
    fills, on the platform's device unless told another."""
    check_divisible(spec, parallel, cfg.transformer)
    config = transformer_config(cfg, spec, parallel, platform)
    te_layers = takes_te_layers(cfg, platform)
    block_spec = te_block_spec if te_layers else local_block_spec
    if config.fp8 and not te_layers:
        raise ValueError(
            f"model.transformer.fp8 = {config.fp8} needs Transformer Engine's layers, which are not installed or "
            "turned off by model.layers = local or model.dtype = float32: the run would train without FP8"
        )
    if te_layers:
        # The output layer, a Megatron layer whose own GEMM never runs here, refuses `gradient_accumulation_fusion`
        # without Apex.
        vars(megatron_layers)["_grad_accum_fusion_available"] = True
    padding = parallel.tensor
    padded_vocab = -(-spec.vocab_size // padding) * padding
    chunks = []
    for number in range(parallel.virtual_pipeline):
        vp_stage = number if parallel.virtual_pipeline > 1 else None
        model = T1GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config, spec.sandwich_norms, vp_stage),
            vocab_size=padded_vocab,
            max_sequence_length=spec.max_position_embeddings,
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=spec.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=spec.rotary_base,
            rotary_percent=spec.rotary_fraction,
            vp_stage=vp_stage,
        )
        # With the group it would cut its table by rank, in which positions are still to be looked up.
        model.rotary_pos_emb.cp_group = None
        if spec.yarn:
            # Megatron's own class for it knows neither interleaved nor partial rotation.
            rotary = model.rotary_pos_emb
            rotary.inv_freq = _stretched(rotary.inv_freq, spec.rotary_base, spec.yarn)
        model.to(device or platform.device)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        chunks.append(model)
    return config, chunks


def _stretched(inv_freq: torch.Tensor, base: float, yarn: Yarn) -> torch.Tensor:
    """Radians a position of each pair of numbers, [rotated / 2], after YaRN."""
    low, high = megatron_yarn._yarn_find_correction_range(
        yarn.beta_fast, yarn.beta_slow, 2 * len(inv_freq), base, round(yarn.original_max_position_embeddings)
    )
    slowed = megatron_yarn._yarn_linear_ramp_mask(low, high, len(inv_freq), inv_freq.device)
    return inv_freq / yarn.factor * slowed + inv_freq * (1 - slowed)


def wrap_ddp(
    config: TransformerConfig, chunks: list[T1GPTModel], parallel: ParallelConfig
) -> list[DistributedDataParallel]:
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    return [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]


def packed_seq_params(microbatch: Microbatch, config: TransformerConfig, local: bool) -> PackedSeqParams:
    context = config.context_parallel_size
    if local:
        rank = mpu.get_context_parallel_rank() if context > 1 else 0
        return LocalPackedSeqParams(microbatch.cu_seqlens, microbatch.max_seqlen, rank, context)
    # What pads a sequence counts as its last tokens: causality keeps them out of every other's result, and Transformer
    # Engine has more kernels for streams without gaps. To cut the sequences it reads the padded bounds.
    padded = microbatch.cu_seqlens if context > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=microbatch.max_seqlen,
        max_seqlen_kv=microbatch.max_seqlen,
    )


def output_head(model: T1GPTModel, spec: ModelSpec, temperature: float) -> Head:
    """This rank's rows of the output layer, for the fused head (last pipeline stage only)."""
    weight = model.shared_embedding_or_output_weight() if spec.tied_embeddings else model.output_layer.weight
    tp = shards().tensor
    return Head(
        weight=weight,
        vocab_start=tp.rank * weight.shape[0],
        vocab_size=spec.vocab_size,
        temperature=temperature,
        tp_group=mpu.get_tensor_model_parallel_group() if tp.size > 1 else None,
        sequence_parallel=model.config.sequence_parallel,
    )
