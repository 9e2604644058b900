"""The head's GEMMs: logits at least in float32, gradients accumulated so, by the fastest library of the machine.

On CUDA narrow operands feed the tensor cores. On CPUs torch's GEMM rounds its result to the operands' type, so those of
the logits are widened. dX and dW are sums over tiles and over microbatches: one tile's share may be rounded to bf16
(as every bf16 linear layer's is), their sum is not, and CPUs with fast bf16 instructions are fed with bf16.

torch sends float32 to MKL, which does not use all of a CPU that Intel did not make: oneDNN (strict fp32 too) gives the
logits 1.2 times as fast on Zen 4. On Intel's it loses 10% to MKL, for want of an in-place form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "GenuineIntel"
_INTEL = "GenuineIntel" in _CPUINFO
# Intel's AVX-512 does bf16 no faster than fp32, only its AMX does.
_FAST_BF16 = ("amx_bf16" if _INTEL else "avx512_bf16") in _CPUINFO
# a @ b^T; torch may not have it.
_ONEDNN_LINEAR: Any = (
    None if _INTEL or not torch.backends.mkldnn.is_available() else getattr(torch.ops.mkldnn, "_linear_pointwise", None)
)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays (for tests); everything narrower is accumulated in float32."""
    return torch.promote_types(dtype, torch.float32)


def logits_operand_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What `matmul` on this device is to be fed with."""
    return dtype if device.type == "cuda" else accumulation_dtype(dtype)


def gradient_operand_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What `add_matmul_` on this device is to be fed with."""
    if dtype == torch.bfloat16 and _FAST_BF16:
        return dtype
    return logits_operand_dtype(device, dtype)


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out [m, n] = a [m, k] @ b [k, n], float32 (float64 if b is)."""
    dtype = logits_operand_dtype(b.device, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if dtype != out.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(_onednn(a, b)) if _onednn_takes(a) else torch.mm(a, b, out=out)


def add_matmul_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, overwrite: bool = False) -> None:
    """out += alpha a @ b, or out = alpha a @ b."""
    dtype = gradient_operand_dtype(b.device, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    beta = 0.0 if overwrite else 1.0
    if out.dtype == dtype and not _onednn_takes(a):
        out.addmm_(a, b, beta=beta, alpha=alpha)
        return
    if a.device.type == "cuda":
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out_dtype=out.dtype, out=out)
        return
    product = _onednn(a, b) if _onednn_takes(a) else torch.mm(a, b)
    if not overwrite:
        out.add_(product, alpha=alpha)
    else:
        out.copy_(product if alpha == 1.0 else product.mul_(alpha))


def _onednn_takes(a: Tensor) -> bool:
    return _ONEDNN_LINEAR is not None and a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() > 0


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return _ONEDNN_LINEAR(a, b.t(), None, "none", [], "")
