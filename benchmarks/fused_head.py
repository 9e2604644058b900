"""Time and memory of the fused head against plain autograd on full logits and against the bare GEMMs.

    python benchmarks/fused_head.py                                       # 2048 x 896 x 151,936 on one CPU thread
    python benchmarks/fused_head.py --dtype bfloat16 --paths gemm general
    python benchmarks/fused_head.py --peers                               # and TRL's and verl's, where installed
    python benchmarks/fused_head.py --errors
    python benchmarks/fused_head.py --device cuda --dtype bfloat16 --tokens 8192 --hidden 5120 --vocab 152064 --peers

Every measurement is a fresh process, so that peaks are its own, and the implementations take turns round after
round, so that a noisy machine disturbs all alike; ratios are formed within a round and their median is reported.
Time is CPU seconds of one thread, or CUDA events. Workspace is peak memory less inputs and less the gradients handed
out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from fused_head_peers import PEERS, installed

from megatron_t1.algo.config import LossConfig
from megatron_t1.algo.head.fused import fused_loss, logprob_entropy_nograd
from megatron_t1.algo.head.layout import AnchorHead, Head
from megatron_t1.algo.loss import TokenFields, t1_token_loss
from tests.algo.general_head import logprob_entropy

GEMMS = {"naive": 3, "naive_onednn": 3, "general": 4, "fused": 3, "forward": 1, "full_kl": 4}
"""Of every path: logits (again in the general path's backward; the anchor's in full_kl), dX, dW."""
PATHS = ("gemm", *GEMMS)
TEMPERATURE = 0.9
CFG = LossConfig(entropy_coef=0.01, kl_coef=0.01)


def token_loss(logprob, entropy, tokens, kl=None):
    return t1_token_loss(logprob, entropy, tokens, kl, cfg=CFG)


def naive(hidden, head, positions, targets, tokens, linear=F.linear):
    logp = F.log_softmax(linear(hidden[positions], head.weight).float() / head.temperature, -1)
    logprob = logp.gather(1, targets[:, None]).squeeze(1)
    entropy = -(logp.exp() * logp).sum(-1)
    token_loss(logprob, entropy, tokens)[0].sum().backward()


class OneDnnLinear(torch.autograd.Function):
    """F.linear on CPUs by oneDNN, where torch would take MKL."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight.t())

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return onednn(g, weight), onednn(g.t(), x)


def onednn(a, b):
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def naive_onednn(*data):
    naive(*data, linear=OneDnnLinear.apply)


def general(hidden, head, positions, targets, tokens):
    token_loss(*logprob_entropy(hidden, head, positions, targets), tokens)[0].sum().backward()


def fused(hidden, head, positions, targets, tokens):
    fused_loss(hidden, head, positions, targets, token_loss, tokens)[0].backward()


def forward(hidden, head, positions, targets, tokens):
    logprob_entropy_nograd(hidden, head, positions, targets)


def full_kl(hidden, head, positions, targets, tokens):
    anchor = AnchorHead(hidden=hidden, head=head)  # the same numbers take the same time
    fused_loss(hidden, head, positions, targets, token_loss, tokens, anchor=anchor)[0].backward()


def peer(name, hidden, head, positions, targets, tokens):
    logprob, entropy = PEERS[name][0](hidden[positions], head.weight, targets, head.temperature)
    token_loss(logprob.float(), entropy.float(), tokens)[0].sum().backward()


def inputs(device: str, dtype: torch.dtype, num_tokens: int, hidden_size: int, vocab_size: int):
    torch.manual_seed(0)
    weight = torch.empty(vocab_size, hidden_size, device=device, dtype=dtype)
    for rows in weight.split(4096):
        rows.normal_(std=hidden_size**-0.5)
    hidden = torch.randn(num_tokens, hidden_size, device=device).to(dtype).requires_grad_()
    head = Head(weight=weight.requires_grad_(), vocab_size=vocab_size, temperature=TEMPERATURE)
    noise = [torch.randn(num_tokens, device=device) for _ in range(4)]
    zeros = torch.zeros(num_tokens, device=device)
    tokens = TokenFields(
        advantage=noise[0],
        centered_kl=noise[1],
        rollout_logprob=-noise[2].abs(),
        anchor_logprob=-noise[3].abs(),
        sequence_log_ratio=zeros,
        geometric_log_ratio=zeros,
    )
    targets = torch.randint(vocab_size, (num_tokens,), device=device)
    return hidden, head, torch.arange(num_tokens, device=device), targets, tokens


def seconds(device: str, run: Callable[[], object]) -> float:
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def gemm_seconds(device: str, hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """The three GEMMs of a head over the whole vocabulary, each by the fastest library here."""
    libraries = ("torch", "onednn") if device == "cpu" and torch.backends.mkldnn.is_available() else ("torch",)
    hidden, weight = hidden.detach(), weight.detach()
    step = 1024 if device == "cpu" else 2**30
    best: dict[str, float] = {}
    for dtype in {hidden.dtype, torch.float32} if device == "cpu" else {hidden.dtype}:
        x = hidden.to(dtype)
        dz = torch.randn(len(x), min(step, len(weight)), device=device).to(dtype)
        for library in libraries:

            def mm(a, b, library=library):
                return onednn(a, b) if library == "onednn" else a @ b

            kinds = {
                "logits": lambda w, x=x, mm=mm: mm(x, w.t()),
                "dx": lambda w, dz=dz, mm=mm: mm(dz[:, : len(w)], w),
                "dw": lambda w, x=x, dz=dz, mm=mm: mm(dz[:, : len(w)].t(), x),
            }
            for name, kind in kinds.items():
                kind(weight[:step].to(dtype))
                spent = sum(
                    seconds(device, lambda kind=kind, w=w: kind(w)) for w in (w.to(dtype) for w in weight.split(step))
                )
                best[name] = min(spent, best.get(name, spent))
    return best


def errors(args: argparse.Namespace) -> None:
    """Largest errors of 128 tokens against plain float64 autograd; gradients relative to their largest entry."""
    hidden, head, positions, targets, tokens = inputs("cpu", torch.float32, 128, args.hidden, args.vocab)
    logprob, entropy = logprob_entropy_nograd(hidden, head, positions, targets)
    got = {}
    for path in (general, fused):
        hidden.grad = head.weight.grad = None
        path(hidden, head, positions, targets, tokens)
        got[path.__name__] = hidden.grad, head.weight.grad
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, head.weight))
    logp = F.log_softmax(hidden @ weight.t() / TEMPERATURE, -1)
    want_logprob = logp.gather(1, targets[:, None]).squeeze(1)
    want_entropy = -(logp.exp() * logp).sum(-1)
    print(f"logprob {(logprob - want_logprob).abs().max():.1e}, entropy {(entropy - want_entropy).abs().max():.1e}")
    token_loss(want_logprob, want_entropy, tokens)[0].sum().backward()
    for name, grads in got.items():
        dx, dw = ((a - b.grad).abs().max() / b.grad.abs().max() for a, b in zip(grads, (hidden, weight), strict=True))
        print(f"{name}: dX {dx:.1e}, dW {dw:.1e}")


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as f:
        known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in f)}
    return f"{known['model name']} (family {known['cpu family']}, model {known['model']})"


def proc_status_mib(key: str) -> float:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(key))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One path, once, in this process."""
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    run = {"gemm": None}.get(args.only, globals().get(args.only, partial(peer, args.only)))
    if run is not None:  # libraries load and kernels compile before the clock starts
        shape = (64, 64, 1024) if args.device == "cpu" else (args.tokens, args.hidden, args.vocab)
        run(*inputs(args.device, dtype, *shape))
    data = inputs(args.device, dtype, args.tokens, args.hidden, args.vocab)
    hidden, head = data[0], data[1]
    if run is None:
        return gemm_seconds(args.device, hidden, head.weight)
    if args.device == "cpu":
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # reset the peak
        before = proc_status_mib("VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    spent = []
    for _ in range(2):  # the first also pays for memory that the process has not touched yet
        hidden.grad = head.weight.grad = None
        spent.append(seconds(args.device, lambda: run(*data)))
    peak = proc_status_mib("VmHWM") if args.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    grads = sum(t.grad.nbytes for t in (hidden, head.weight) if t.grad is not None) / 2**20
    return {"first_seconds": spent[0], "seconds": spent[1], "peak_mib": peak, "workspace_mib": peak - before - grads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paths", nargs="+", default=PATHS, choices=PATHS)
    parser.add_argument("--peers", action="store_true", help="also other projects' losses, where they are installed")
    parser.add_argument("--only", choices=(*PATHS, *PEERS), help="measure this path in this process and print JSON")
    parser.add_argument("--errors", action="store_true", help="show errors against float64 and end")
    args = parser.parse_args()
    if args.errors:
        errors(args)
        return
    if args.only:
        print(json.dumps(measure(args)))
        return

    paths = [*args.paths, *(installed(args.device) if args.peers else [])]
    if args.device == "cuda" or args.dtype != "float32":
        paths = [path for path in paths if path != "naive_onednn"]  # torch takes oneDNN for bf16 by itself
    results: dict[str, list[dict[str, float]]] = {path: [] for path in paths}
    for number in range(args.rounds):
        for path in paths:
            command = [sys.executable, *sys.argv, "--only", path]
            out = subprocess.run(command, check=path not in PEERS, stdout=subprocess.PIPE, text=True).stdout
            if out:
                results[path].append(json.loads(out))
                print(f"round {number + 1} of {args.rounds}: {path} {out.strip()}", file=sys.stderr)
            else:
                print(f"{path} failed; it is left out", file=sys.stderr)

    def median(values) -> float:
        return statistics.median(values)

    size = f"{args.tokens} x {args.hidden} x {args.vocab}, {args.dtype}"
    print(f"\n{processor(args.device)}, {size}, {args.rounds} rounds\n")
    if "gemm" in results:
        gemms = results.pop("gemm")
        flop = 2 * args.tokens * args.hidden * args.vocab
        speeds = ", ".join(f"{k} {flop / median([g[k] for g in gemms]) / 1e9:.0f}" for k in gemms[0])
        print(f"fastest GEMMs, GFLOP/s: {speeds}\n")
    else:
        gemms = []
    print("| path | GEMMs | first s | second s | second to its GEMMs | second to naive | peak MiB | workspace MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for path, runs in results.items():
        if len(runs) < args.rounds:
            continue
        count = GEMMS[path] if path in GEMMS else PEERS[path][1]
        limits = [g["logits"] * max(count - 2, 1) + (g["dx"] + g["dw"] if count > 1 else 0.0) for g in gemms]
        to_limit = f"{median(r['seconds'] / g for r, g in zip(runs, limits, strict=True)):.2f}" if gemms else "-"
        to_naive = (
            f"{median(r['seconds'] / n['seconds'] for r, n in zip(runs, results['naive'], strict=True)):.2f}"
            if "naive" in results
            else "-"
        )
        first, second, peak, workspace = (median(r[k] for r in runs) for k in runs[0])
        columns = f"{first:.4g} | {second:.4g} | {to_limit} | {to_naive} | {peak:.0f} | {workspace:.0f}"
        print(f"| {path} | {count} | {columns} |")


if __name__ == "__main__":
    main()
