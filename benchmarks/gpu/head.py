"""The head at its real size against full logits, other projects' losses and its GEMMs alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.results import Check, free_memory, peak_bytes, relative, synchronize

sys.path.insert(0, str(Path(__file__).parents[1]))  # as the script beside does when it is run by its path
import fused_head as bench
from fused_head_peers import PEERS, installed


def head(check: Check) -> None:
    shape = (64, 64, 2048) if check.smoke else (8192, 5120, 152064)
    device, dtype = ("cpu", torch.float32) if check.smoke else ("cuda", torch.bfloat16)
    for path in ("general", "fused", "full_kl"):
        with check.case(f"errors {path}"):
            _errors(check, path, device, dtype, *shape[1:])
    with check.case("2.5e9 logits"):
        free_memory()
        data = bench.inputs(device, dtype, *((16, 16, 512) if check.smoke else (16384, 256, 152064)))
        bench.fused(*data)
        fused = data[0].grad.clone()
        data[0].grad = data[1].weight.grad = None
        bench.general(*data)
        error = relative(data[0].grad, fused)
        check.report("2.5e9 logits", error < 2e-2, fused_to_general=error)
        del data, fused
    with check.case("GEMMs"):
        free_memory()
        data = bench.inputs(device, dtype, *shape)
        for _ in range(2):
            gemms = bench.gemm_seconds(device, data[0], data[1].weight)
        check.report("GEMMs", None, milliseconds={kind: round(1e3 * s, 2) for kind, s in gemms.items()})
        del data
    paths: dict[str, tuple[Callable[..., Any], int]] = {
        name: (getattr(bench, name), bench.GEMMS[name]) for name in ("forward", "fused", "general", "full_kl", "naive")
    }
    paths["fused into main_grad"] = bench.fused, 3  # as in training: dW goes to the optimizer's float32 buffer
    for name in [] if check.smoke else installed(device):
        paths[name] = lambda *data, name=name: bench.peer(name, *data), PEERS[name][1]
    for name, (run, num_gemms) in paths.items():
        with check.case(name):
            _time(check, name, run, num_gemms, device, dtype, shape)


def _time(
    check: Check,
    name: str,
    run: Callable[..., Any],
    num_gemms: int,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
) -> None:
    free_memory()
    data = bench.inputs(device, dtype, *shape)
    hidden, weight = data[0], data[1].weight
    if "main_grad" in name:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    try:
        run(*data)  # libraries load, kernels compile
    except ImportError as error:
        check.report(name, None, error=str(error)[:200])
        return
    spent = []
    for _ in range(1 if check.smoke else 5):
        hidden.grad = weight.grad = None
        free_memory()
        before = peak_bytes()
        spent.append(bench.seconds(device, lambda: run(*data)))
    synchronize()
    kept = sum(t.grad.nbytes for t in (hidden, weight) if t.grad is not None)
    seconds = sorted(spent)[len(spent) // 2]
    flops = 2.0 * shape[0] * shape[1] * shape[2] * num_gemms
    check.report(
        name,
        True,
        milliseconds=round(1e3 * seconds, 2),
        best_milliseconds=round(1e3 * min(spent), 2),
        num_gemms=num_gemms,
        tflops=round(flops / seconds / 1e12),
        workspace_gib=round((peak_bytes() - before - kept) / 2**30, 2),
    )


def _errors(check: Check, path: str, device: str, dtype: torch.dtype, hidden_size: int, vocab: int) -> None:
    """128 tokens over the whole vocabulary against float64."""
    free_memory()
    data = bench.inputs(device, dtype, 128, hidden_size, vocab)
    hidden, head, targets = data[0], data[1], data[3]
    getattr(bench, path)(*data)
    logprob, entropy = bench.logprob_entropy_nograd(hidden, head, data[2], targets)
    x, w = (t.detach().double().requires_grad_() for t in (hidden, head.weight))
    logp = torch.log_softmax(x @ w.t() / bench.TEMPERATURE, -1)
    want = logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)
    errors = {
        "logprob": float((logprob - want[0]).abs().max()),
        "entropy": float((entropy - want[1]).abs().max()),
    }
    if path != "full_kl":  # its reference needs the anchor's logits: tests/algo/test_head_triton.py
        bench.token_loss(*want, data[4])[0].sum().backward()
        errors |= {"dX": relative(hidden.grad, x.grad), "dW": relative(head.weight.grad, w.grad)}
    check.report(f"errors {path}", max(errors.values()) < (5e-6 if check.smoke else 1e-2), **errors)
