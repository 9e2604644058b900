"""What the machine has: the platform, `t1 doctor`, Transformer Engine, the ceilings that other figures are held to."""

from __future__ import annotations

import subprocess
import sys

import torch

from benchmarks.gpu.results import Check
from megatron_t1.platform.detect import setup


def machine(check: Check) -> None:
    found = setup()
    fine = check.smoke or (found.name == "cuda" and bool(found.transformer_engine))
    check.report("platform", fine, says=found.describe(), torch=torch.__version__, cuda=torch.version.cuda)
    done = subprocess.run([sys.executable, "-m", "megatron_t1", "doctor"], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    check.report("t1 doctor", done.returncode == 0, rc=done.returncode)
    if check.smoke:
        return
    with check.case("Transformer Engine"):
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.quantization import check_fp8_support

        layer = te.LayerNormLinear(256, 512, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16)
        out = layer(torch.randn(32, 256, device="cuda", dtype=torch.bfloat16))
        out.sum().backward()
        check.report("Transformer Engine", bool(torch.isfinite(out).all()), fp8=check_fp8_support())
    with check.case("ceilings"):
        from triton.testing import do_bench

        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        gemm_ms = do_bench(lambda: a @ b, warmup=50, rep=200, return_mode="median")
        source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
        target = torch.empty_like(source)
        copy_ms = do_bench(lambda: target.copy_(source), warmup=20, rep=100, return_mode="median")
        check.report(
            "ceilings",
            None,
            gpu=torch.cuda.get_device_name(),
            bf16_tflops=round(2 * 8192**3 / gemm_ms / 1e9),
            copy_terabytes_per_s=round(2 * source.nbytes / copy_ms / 1e9, 2),
        )
