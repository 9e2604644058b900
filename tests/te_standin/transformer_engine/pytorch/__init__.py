"""The layers. Where Transformer Engine marks parameters, fuses gradients or speaks to other ranks, so do these."""

from __future__ import annotations

import itertools
import math
import sys
import types
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class TransformerEngineBaseModule(nn.Module):
    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass


class _Gather(torch.autograd.Function):
    """Sequence parallelism: the parts of all ranks, along the first dimension."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        return _all_gather(part, group)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    """Its counterpart: each rank's part of the sum."""

    @staticmethod
    def forward(ctx, whole, group):
        ctx.group = group
        return _reduce_scatter(whole, group)

    @staticmethod
    def backward(ctx, grad):
        return _all_gather(grad, ctx.group), None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _all_gather(part: Tensor, group: Any) -> Tensor:
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _reduce_scatter(whole: Tensor, group: Any) -> Tensor:
    part = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    dist.reduce_scatter_tensor(part, whole.contiguous(), group=group)
    return part


class _Multiply(torch.autograd.Function):
    """x W^T, whose weight gradient is added to `main_grad` at once where asked."""

    @staticmethod
    def forward(ctx, x, weight, fuse):
        ctx.save_for_backward(x, weight)
        ctx.fuse = fuse
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        if not ctx.fuse:
            return grad @ weight, of_weight, None
        weight.main_grad.add_(of_weight)
        weight.grad_added_to_main_grad = True
        return grad @ weight, torch.zeros_like(weight), None


def _multiply(x: Tensor, weight: nn.Parameter, fuse: bool) -> Tensor:
    return _Multiply.apply(x, weight, fuse and hasattr(weight, "main_grad") and torch.is_grad_enabled())


def _cut(parameter: nn.Parameter, dim: int) -> None:
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1


class Linear(TransformerEngineBaseModule):
    def __init__(self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
                 tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True,
                 return_bias=False, params_dtype=None, parallel_mode=None, parameters_split=None, device="cuda",
                 ub_overlap_ag=False, ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_dgrad=False,
                 ub_bulk_wgrad=False, ub_name=None, delay_wgrad_compute=False, symmetric_ar_type=None,
                 save_original_input=False, name=None):  # fmt: skip
        super().__init__()
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else tp_group.size()
        self.parallel_mode, self.fuse = parallel_mode, fuse_wgrad_accumulation
        self.sequence_parallel = sequence_parallel and self.tp_size > 1
        self.use_bias, self.return_bias = bias, return_bias
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=params_dtype))
        _cut(self.weight, 1 if parallel_mode == "row" else 0)
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=params_dtype)) if bias else None
        if bias and parallel_mode == "column":
            _cut(self.bias, 0)
        elif bias and parallel_mode == "row":
            self.bias.sequence_parallel = sequence_parallel

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        alone = self.tp_size == 1
        if self.parallel_mode == "column" and not alone:
            inp = (_Gather if self.sequence_parallel else _Copy).apply(inp, self.tp_group)
        out = _multiply(inp, self.weight, self.fuse)
        if self.parallel_mode == "row" and not alone:
            out = (_Scatter if self.sequence_parallel else _Sum).apply(out, self.tp_group)
        if self.bias is not None and not self.return_bias:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, eps=1e-5, sequence_parallel=False, fuse_wgrad_accumulation=False,
                 tp_group=None, tp_size=1, get_rng_state_tracker=None, init_method=None, bias=True,
                 normalization="LayerNorm", return_bias=False, params_dtype=None, parallel_mode=None,
                 return_layernorm_output=False, return_layernorm_output_gathered=False, parameters_split=None,
                 zero_centered_gamma=False, device="cuda", ub_overlap_ag=False, ub_overlap_rs=False,
                 ub_overlap_rs_dgrad=False, ub_bulk_wgrad=False, ub_bulk_dgrad=False, ub_name=None,
                 delay_wgrad_compute=False, symmetric_ar_type=None, name=None):  # fmt: skip
        super().__init__(
            in_features, out_features, sequence_parallel, fuse_wgrad_accumulation, tp_group, tp_size,
            bias=bias, return_bias=return_bias, params_dtype=params_dtype, parallel_mode=parallel_mode,
        )  # fmt: skip
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=params_dtype))
        self.layer_norm_weight.sequence_parallel = sequence_parallel

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        return super().forward(F.rms_norm(inp, (inp.shape[-1],), self.layer_norm_weight, self.eps))


class RMSNorm(TransformerEngineBaseModule):
    def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None,
                 zero_centered_gamma=False, hidden_size=None, device=None, dtype=None, sm_margin=0):  # fmt: skip
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype))
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LayerNorm(RMSNorm):
    pass


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(self, num_gemms, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False,
                 tp_group=None, tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None,
                 bias=True, return_bias=False, params_dtype=None, parallel_mode=None, device="cuda",
                 ub_overlap_rs=False, ub_overlap_ag=False, ub_name=None, delay_wgrad_compute=False,
                 save_original_input=False, name=None):  # fmt: skip
        super().__init__()
        assert not bias
        self.num_gemms, self.use_bias, self.fuse = num_gemms, bias, fuse_wgrad_accumulation
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        for i in range(num_gemms):
            weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
            _cut(weight, 1 if parallel_mode == "row" else 0)  # always, cut or not: the gradient norm counts by it
            self.register_parameter(f"weight{i}", weight)

    def init_fp8_metadata(self, num_gemms=1):
        pass

    def forward(self, inp, m_splits, is_first_microbatch=None):
        parts = enumerate(inp.split(list(m_splits)))
        return torch.cat([_multiply(part, getattr(self, f"weight{i}"), self.fuse) for i, part in parts])


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
                 attn_mask_type="causal", window_size=None, sequence_parallel=False, tp_size=1,
                 get_rng_state_tracker=None, tp_group=None, layer_number=None, attention_type="self", cp_group=None,
                 cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p", softmax_scale=None, softmax_type="vanilla",
                 return_max_logit=False):  # fmt: skip
        super().__init__()
        self.qkv_format, self.num_gqa_groups = qkv_format, num_gqa_groups // tp_size
        self.cp_group, self.cp_size = cp_group, 1 if cp_group is None else cp_group.size()
        assert cp_comm_type == "p2p"
        self.scale = softmax_scale or 1 / math.sqrt(kv_channels)

        def forgive(module: nn.Module, keys: Any) -> None:
            missing = [key for key in keys.missing_keys if "core_attention._extra_state" not in key]
            keys.missing_keys[:] = missing

        self.register_load_state_dict_post_hook(forgive)

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, cu_seqlens_q=None,
                cu_seqlens_kv=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None,
                max_seqlen_kv=None, attn_mask_type=None, window_size=None, checkpoint_core_attention=False,
                core_attention_bias_type="no_bias", core_attention_bias=None, alibi_slopes=None, fast_zero_fill=True,
                inference_params=None, pad_between_seqs=None, fp8_output=False, num_splits=1):  # fmt: skip
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
        assert query_layer.dim() == 3
        assert key_layer.shape[1] == self.num_gqa_groups
        assert cu_seqlens_q.dtype == torch.int32
        ends, outs = cu_seqlens_q.tolist(), []
        assert max_seqlen_q >= max(end - start for start, end in itertools.pairwise(ends))
        if self.cp_size > 1:
            assert torch.equal(cu_seqlens_q, cu_seqlens_q_padded), "FlashAttention takes no gaps between sequences"
            assert torch.equal(cu_seqlens_q, cu_seqlens_kv_padded)
            return self._of_chunks(query_layer, key_layer, value_layer, ends)
        for start, end in itertools.pairwise(ends):
            q, k, v = (part[start:end].transpose(0, 1)[None] for part in (query_layer, key_layer, value_layer))
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs).flatten(1)

    def _of_chunks(self, query: Tensor, key: Tensor, value: Tensor, ends: list[int]) -> Tensor:
        """This rank's chunks of every sequence, number `rank` from its beginning and from its end."""
        size, rank, mine, outs = self.cp_size, self.cp_group.rank(), len(query), []
        assert mine * size == ends[-1]
        keys, values = (_Gather.apply(part, self.cp_group) for part in (key, value))
        for start, end in itertools.pairwise(ends):
            chunk, rest = divmod(end - start, 2 * size)
            assert rest == 0, "a sequence that can't be cut"
            at = start // size
            places = [mine * r + at for r in range(size)] + [mine * r + at + chunk for r in reversed(range(size))]
            whole = torch.cat([torch.arange(place, place + chunk) for place in places])
            for first, number in ((at, rank), (at + chunk, 2 * size - 1 - rank)):
                seen = whole[: (number + 1) * chunk]
                q = query[first : first + chunk]
                parts = (part.transpose(0, 1)[None] for part in (q, keys[seen], values[seen]))
                mask = torch.ones(chunk, len(seen), dtype=torch.bool).tril(number * chunk)
                out = F.scaled_dot_product_attention(
                    *parts, attn_mask=mask, scale=self.scale, enable_gqa=q.shape[1] != key.shape[1]
                )
                outs.append(out[0].transpose(0, 1))
        return torch.cat(outs).flatten(1)


def _module(name: str, **members: Any) -> None:
    module = types.ModuleType(f"{__name__}.{name}")
    module.__dict__.update(members)
    sys.modules[module.__name__] = module
    if "." not in name:
        globals()[name] = module


class _NoFp8:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


@contextmanager
def fp8_autocast(**options):
    yield


class _RandomStates:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.states_: dict[str, Any] = {}


@contextmanager
def _recompute(activation_recompute=False, recompute_phase=False):
    yield


def _rotary(t, freqs, tensor_format="sbhd", start_positions=None, interleaved=False, fused=False, cu_seqlens=None,
            cp_size=1, cp_rank=0):  # fmt: skip
    assert tensor_format == "thd"
    assert fused
    assert not interleaved
    assert t.dim() == 3
    ends = cu_seqlens.tolist()
    parts = []
    for start, end in itertools.pairwise(ends):
        chunks = freqs[: end - start, 0, 0].chunk(2 * cp_size)
        parts += [freqs[: end - start, 0, 0]] if cp_size == 1 else [chunks[cp_rank], chunks[-1 - cp_rank]]
    angles = torch.cat(parts)[:, None]
    turned, rest = t[..., : angles.shape[-1]].float(), t[..., angles.shape[-1] :]
    first, second = turned.chunk(2, -1)
    turned = turned * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
    return torch.cat([turned.to(t.dtype), rest], -1)


class _Quantized(Tensor):
    pass


class _MXFP8(_Quantized):
    pass


class Fp8Padding(nn.Module):
    def __init__(self, *args: Any) -> None:
        super().__init__()


class Fp8Unpadding(Fp8Padding):
    pass


_OPS = "AllReduce BasicLinear Bias FusibleOperation GEGLU GELU LayerNorm RMSNorm ReGLU ReLU ReduceScatter Sequential"
_PERMUTATIONS = (
    "permute",
    "permute_with_probs",
    "sort_chunks_by_index",
    "sort_chunks_by_index_with_probs",
    "unpermute",
)
_module("fp8", FP8GlobalStateManager=_NoFp8, fp8_autocast=fp8_autocast)
_module(
    "distributed",
    CudaRNGStatesTracker=_RandomStates,
    activation_recompute_forward=_recompute,
    checkpoint=None,
    get_all_rng_states=dict,
    is_fp8_activation_recompute_enabled=bool,
)
_module("module")
_module("module.base", get_dummy_wgrad=None, TransformerEngineBaseModule=TransformerEngineBaseModule)
_module("ops", **{name: type(name, (nn.Module,), {}) for name in (*_OPS.split(), "SiLU", "SwiGLU")})
_module("attention")
_module("attention.rope", apply_rotary_pos_emb=_rotary)
_module("permutation", **{f"moe_{name}": None for name in _PERMUTATIONS})
_module("cross_entropy", parallel_cross_entropy=None)
_module(
    "router",
    fused_compute_score_for_moe_aux_loss=None,
    fused_moe_aux_loss=None,
    fused_topk_with_score_function=None,
)
_module("cpp_extensions")
_module("tensor", QuantizedTensor=_Quantized)
_module("tensor.float8_tensor", Float8Tensor=_Quantized)
_module("tensor.mxfp8_tensor", MXFP8Tensor=_MXFP8)
_module("tensor.utils", cast_master_weights_to_fp8=None, replace_raw_data=None, post_all_gather_processing=None)
_module("float8_tensor", Float8Tensor=_Quantized)
