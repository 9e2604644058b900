"""Several ranks, over NCCL, on one GPU: layouts against one rank, and pushes by broadcasts into a server.

NCCL refuses two ranks on one GPU of one host, and knows a host by NCCL_HOSTID: a name for each rank brings every kind
of group to run, through the loopback network, one kernel at a time. So this shows what is computed, not how fast.
"""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu.commands import LARGER, QUICKSTART, emptied, metrics_of, serving, t1
from benchmarks.gpu.results import Check, relative
from megatron_t1.weights.hf_folder import HFFolder
from tests.forks import WORKERS, environment
from tests.models.families import FAMILIES
from tests.tiny import make_tiny

SP = {"sequence_parallel": True}
EXPERTS = ("qwen3_moe", "glm4_moe")
OVERLAPPED = "DP2 distributed optimizer, overlapped"
LAYOUTS: dict[int, dict[str, tuple[dict[str, Any], tuple[str, ...]]]] = {
    2: {
        "TP2 SP": ({"tensor": 2, **SP}, ("qwen2 tied", "glm4", *EXPERTS)),
        "PP2": ({"pipeline": 2}, ("qwen2 tied", "glm4_moe")),
        "PP2 VP2": ({"pipeline": 2, "virtual_pipeline": 2}, ("qwen2 tied",)),
        "DP2": ({"distributed_optimizer": False}, ("qwen2 tied", "qwen3_moe")),
        OVERLAPPED: (
            {"distributed_optimizer": True, "overlap_grad_reduce": True},
            ("qwen2 tied", "qwen3_moe"),
        ),
        "its checkpoint, at TP2 SP": (
            {"tensor": 2, **SP, "distributed_optimizer": True, "checkpoint_of": OVERLAPPED},
            ("qwen2 tied", "qwen3_moe"),
        ),
        "CP2": ({"context": 2, "max_tokens_per_microbatch": 64}, ("qwen2 tied", "glm4", *EXPERTS)),
        "EP2": ({"expert": 2}, EXPERTS),
        "TP2 SP, EP2 of whole experts": ({"tensor": 2, **SP, "expert": 2, "expert_tensor": 1}, EXPERTS),
    },
    4: {
        "TP2 PP2 SP": ({"tensor": 2, "pipeline": 2, **SP}, ("qwen2 tied", "glm4_moe")),
        "CP2 TP2 SP": ({"context": 2, "tensor": 2, **SP}, ("qwen2 tied", "qwen3_moe")),
    },
}
LIMITS = {"float32": (1e-5, 1e-5, 1e-4), "bfloat16": (3e-2, 5e-2, 0.1), "bfloat16 experts": (0.2, 5e-2, 0.3)}
"""Logits and the gradient norm, and in the median of the tensors the gradients, relative. In bfloat16 two experts may
nearly tie for a token, and other sums then choose the other one."""


def ranks_bf16(check: Check) -> None:
    """Transformer Engine's layers."""
    _ranks(check, "bfloat16")


def ranks_fp32(check: Check) -> None:
    _ranks(check, "float32")


def _ranks(check: Check, dtype: str) -> None:
    families = sorted(set(chain(*(names for layouts in LAYOUTS.values() for _, names in layouts.values()))))
    base = emptied(check.work / dtype)
    for family in families:
        FAMILIES[family](base / "checkpoints" / family, dtype=dtype)
    alone = {"one rank": ({}, families)}
    for num_ranks, layouts in {1: alone, **LAYOUTS}.items():
        if check.smoke and num_ranks > 2:
            continue
        asked = {name: ({**fields, "model": {"dtype": dtype}}, names) for name, (fields, names) in layouts.items()}
        worker = (WORKERS / "parity_worker.py", base / "checkpoints", base / "out", json.dumps(asked))
        codes = run_ranks(num_ranks, *worker, limit_s=900 if check.smoke else 240)
        check.report(f"{dtype}, {num_ranks} ranks", not any(codes), exit_codes=codes)
        for layout, (fields, names) in layouts.items() if num_ranks > 1 else ():
            for family in names:
                case = f"{dtype} {family} {layout}"
                with check.case(case):
                    if "checkpoint_of" in fields:
                        _compare_loaded(check, case, base / "out", layout, family)
                    else:
                        limits = LIMITS[dtype + " experts" * (family in EXPERTS and dtype == "bfloat16")]
                        _compare(check, case, base / "out", layout, family, limits)


def _compare(check: Check, case: str, out: Path, layout: str, family: str, limits: tuple[float, float, float]) -> None:
    want, got = (load_file(out / name / family / "results") for name in ("one rank", layout))
    logits = max(relative(got[name], want[name]) for name in want if name.startswith("logits/"))
    norm = abs(float(got["norm"] / want["norm"]) - 1)
    kind = "grad/" if any(name.startswith("grad/") for name in got) else "after/"
    errors = {n: relative(got[n], want[n]) for n in want if n.startswith(kind) and want[n].double().norm() > 0}
    worst = max(errors, key=errors.__getitem__)
    median = float(torch.tensor(list(errors.values())).median())
    fine = logits < limits[0] and norm < limits[1] and median < limits[2] and math.isfinite(errors[worst])
    check.report(
        case, fine, logits=logits, grad_norm=norm, compared=kind, median=median, worst=errors[worst], at=worst
    )  # fmt: skip


def _compare_loaded(check: Check, case: str, out: Path, layout: str, family: str) -> None:
    saved, loaded = load_file(out / OVERLAPPED / family / "results"), HFFolder(out / layout / family)
    trained = {name.removeprefix("after/"): tensor for name, tensor in saved.items() if name.startswith("after/")}
    differ = [name for name, tensor in trained.items() if not torch.equal(loaded.read(name), tensor)]
    check.report(case, bool(trained) and not differ, tensors=len(trained), differ=differ[:3])


def collective(check: Check) -> None:
    """The groups of pushes: one trainer rank and two into a server; then two RL steps by two ranks."""
    dtype = "float32" if check.smoke else "bfloat16"
    base = emptied(check.work / "run")
    folder = make_tiny("Qwen2ForCausalLM", base / "hf", dtype=dtype, init_std=0.05, **({} if check.smoke else LARGER))
    rollout = {"dtype": dtype, "max_model_len": 512, "num_servers": 1, "gpu_memory_utilization": 0.1}
    rollout |= {"transport": "collective", "vllm_args": {"enforce-eager": True}, "sync_timeout_s": 60}
    config = {"run_dir": str(base / "run"), "model": {"hf_path": str(folder), "dtype": dtype}, "rollout": rollout}
    config["parallel"] = {"max_tokens_per_microbatch": 2048}
    (base / "config.yaml").write_text(json.dumps(config))
    with serving(base, **_host("server")) as (urls, key_file):
        check.report("t1 serve", bool(urls))
        if not urls:
            return
        given = ["--config", base / "config.yaml", "--rollout.urls", json.dumps(urls), "--rollout.key_file", key_file]
        layouts = (("one rank", 1, []), ("TP2", 2, ["--parallel.tensor", 2]), ("PP2", 2, ["--parallel.pipeline", 2]))
        for name, num_ranks, layout in layouts[: 2 if check.smoke else 3]:
            log = base / f"{name}.txt"
            words = ("-m", "megatron_t1", "sync-check", *given, *layout, *["--perturb"] * (name == "TP2"))
            codes = run_ranks(num_ranks, *words, limit_s=600 if check.smoke else 120, log=log)
            rows = re.findall(r"^\S+ +(\d+) +(.+)$", log.read_text(), re.MULTILINE)
            pushed = re.search(r"pushed (\d+) tensors, (\S+) MB, as version \d+ in (\S+) s", log.read_text())
            check.report(
                f"sync-check {name}", not any(codes) and bool(rows), exit_codes=codes, rows=rows,
                pushed=pushed and pushed.groups(),
            )  # fmt: skip
        _kill_a_rank(check, base, folder, {"urls": urls, "key_file": key_file, "sync_timeout_s": 90})
        rc, _ = t1("quickstart-data", "--out", base / "data", "--seed", 0)
        settings = {"data.train": base / "data/rl.jsonl", "data.heldout": base / "data/heldout.jsonl"}
        settings |= {"rl.steps": 2, "rl.prompts_per_step": 8, "sampling.num_samples": 4, "sampling.max_new_tokens": 64}
        settings |= {"parallel.tensor": 2, "model.hf_path": folder, "rl.checkpoint.every_steps": 1}
        words = ["-m", "megatron_t1", "rl", "--config", QUICKSTART / "quickstart.yaml", *given]
        words += [word for name, value in settings.items() for word in (f"--{name}", value)]
        codes = run_ranks(2, *words, limit_s=900 if check.smoke else 150, log=base / "rl.txt")
        rows = metrics_of(base / "run")
        check.report(
            "t1 rl, TP2", not rc and not any(codes) and len(rows) == 2, exit_codes=codes,
            logprob_diff=[row["logprob_diff"] for row in rows], push_s=[row["push_seconds"] for row in rows],
        )  # fmt: skip


def _kill_a_rank(check: Check, base: Path, folder: Path, rollout: dict[str, Any]) -> None:
    """In the fifth broadcast of its second push: what waits on the GPUs must end, and the next trainer be served."""
    pushes = ("tp2 collective", "killed in collective"), ("tp2 collective",)
    codes, versions = [], []
    for turn, layouts in enumerate(pushes, 1):
        given = json.dumps([(layout, str(folder), 100 * turn + number) for number, layout in enumerate(layouts)])
        worker = (WORKERS / "trainer.py", json.dumps(rollout), given, base / "pushed.json")
        codes += run_ranks(2, *worker, limit_s=300, log=base / f"killed {turn}.txt")
        versions += [result["version"] for result in json.loads((base / "pushed.json").read_text())]
    said = (base / "pushed.error").read_text()
    fine = codes == [0, -signal.SIGKILL, 0, 0] and versions == [100, 200]
    check.report("a rank killed in its broadcasts", fine, exit_codes=codes, versions=versions, said=said[:400])


def run_ranks(num_ranks: int, *words: object, limit_s: float, log: Path | None = None) -> list[int]:
    """The exit code of each rank; once one has failed the others are given a few seconds to end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0"}
    output = log.open("w") if log else None
    command = [sys.executable, *map(str, words)]
    processes = [
        subprocess.Popen(
            command, stdout=output, stderr=output, env=environment(**world, RANK=str(rank), **_host(f"rank {rank}"))
        )
        for rank in range(num_ranks)
    ]
    try:
        for process in processes:
            limit_s = limit_s if process.wait(limit_s) == 0 else 10
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
        codes = [process.wait() for process in processes]
    if log:
        print(log.read_text()[-6000:])
    return codes


def _host(name: str) -> dict[str, str]:
    return {"NCCL_HOSTID": name.replace(" ", "_"), "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
