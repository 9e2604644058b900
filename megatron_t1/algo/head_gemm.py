"""The head's GEMMs: at least float32 out, whatever goes in, by the fastest library of the machine.

On CUDA narrow operands feed the tensor cores. On CPUs they are widened, because torch's CPU GEMM would round its result
to bf16. torch sends float32 to MKL, which is slow on CPUs not made by Intel; oneDNN (strict fp32 too) is then about
twice as fast. On Intel's it loses 10% to MKL, for want of an in-place form.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def _onednn_linear():
    """oneDNN's a @ b^T if torch has it and this is not an Intel CPU, else None."""
    cpuinfo = Path("/proc/cpuinfo")
    intel = cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()
    if intel or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONEDNN_LINEAR = _onednn_linear()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays (for tests); everything narrower is accumulated in float32."""
    return torch.promote_types(dtype, torch.float32)


def operand_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What a GEMM on this device should be fed with."""
    return dtype if device.type == "cuda" else accumulation_dtype(dtype)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [m, k] @ b [k, n], float32 (float64 if b is), into `out` [m, n] if given."""
    dtype = operand_dtype(b.device, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if dtype != accumulation_dtype(dtype):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    if _ONEDNN_LINEAR is not None and dtype == torch.float32 and a.device.type == "cpu" and a.numel() > 0:
        product = _ONEDNN_LINEAR(a, b.t(), None, "none", [], "")
        return product if out is None else out.copy_(product)
    return torch.mm(a, b, out=out)


def add_matmul_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, overwrite: bool = False) -> None:
    """out += alpha a @ b, or out = alpha a @ b, rounded once when `out` is narrower than float32."""
    dtype = operand_dtype(b.device, b.dtype)
    beta = 0.0 if overwrite else 1.0
    if out.dtype == dtype == accumulation_dtype(dtype) and (_ONEDNN_LINEAR is None or a.device.type != "cpu"):
        out.addmm_(a.to(dtype), b.to(dtype), beta=beta, alpha=alpha)
    elif out.dtype == torch.float32 and a.device.type == "cuda" and torch.__version__ >= (2, 12):
        torch.addmm(out, a.to(dtype), b.to(dtype), beta=beta, alpha=alpha, out_dtype=torch.float32, out=out)
    elif overwrite:
        out.copy_(matmul(a, b).mul_(alpha))
    else:
        out.add_(matmul(a, b), alpha=alpha)
