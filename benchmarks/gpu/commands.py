"""`t1` as a user runs it, with a real vLLM on the trainer's own GPU: convert, push and compare, the whole loop."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.results import Check
from tests.tiny import make_tiny

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
SHARING = {"num_servers": 1, "share_gpus": True, "gpu_memory_utilization": 0.1}
LARGER = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 4}


def convert(check: Check) -> None:
    """There and back, and a Megatron checkpoint's logprobs against transformers."""
    for family in ("Qwen2ForCausalLM", "Qwen3MoeForCausalLM")[: 1 if check.smoke else 2]:
        with check.case(family):
            base = emptied(check.work / family)
            folder = make_tiny(family, base / "hf", dtype="bfloat16", init_std=0.1)
            codes = [
                t1("convert", "to-megatron", folder, base / "megatron")[0],
                t1("convert", "to-hf", base / "megatron", base / "back")[0],
                t1("convert", "verify", folder, base / "back")[0],
            ]
            check.report(f"{family} there and back", not any(codes), exit_codes=codes)
            _compare_logprobs(check, f"{family} logprobs", base / "megatron", "transformers", base)


def push(check: Check) -> None:
    """Into a server without CUDA graphs, by every transport that a shared GPU allows."""
    _push(check, {"enforce-eager": True}, ("shm",) if check.smoke else ("shm", "tcp"))


def push_graphs(check: Check) -> None:
    """Into a server that has compiled its model and captured CUDA graphs."""
    _push(check, {}, ("shm",))


def _push(check: Check, vllm_args: dict[str, object], transports: tuple[str, ...]) -> None:
    dtype = "float32" if check.smoke else "bfloat16"
    base = emptied(check.work / "run")
    folder = make_tiny("Qwen2ForCausalLM", base / "hf", dtype=dtype, init_std=0.05, **({} if check.smoke else LARGER))
    rollout = SHARING | {"dtype": dtype, "max_model_len": 512, "vllm_args": vllm_args}
    config = {"run_dir": str(base / "run"), "model": {"hf_path": str(folder), "dtype": dtype}, "rollout": rollout}
    config["parallel"] = {"nproc_per_node": 1, "max_tokens_per_microbatch": 2048}
    (base / "config.yaml").write_text(json.dumps(config))
    with serving(base) as (urls, key_file):
        check.report("t1 serve", bool(urls))
        if not urls:
            return
        given = ("--config", base / "config.yaml", "--rollout.urls", json.dumps(urls), "--rollout.key_file", key_file)
        for transport in transports:
            rc, text = t1("sync-check", *given, "--rollout.transport", transport)
            rows = re.findall(r"^\S+ +(\d+) +(\S+) +(\S+) +(\S+)  (.+)$", text, re.MULTILINE)
            check.report(f"sync-check {transport}", rc == 0 and bool(rows), exit_code=rc, rows=rows)
        _compare_logprobs(check, "logprobs against the server", folder, urls[0], base, "--key_file", key_file)


def loop(check: Check) -> None:
    """The quickstart as docs/cluster.md has it for one GPU, cut short, and resumed for one more step."""
    sft_steps, rl_steps = (20, 2) if check.smoke else (200, 6)
    base, options = quickstart(check)
    options += ["--sft.max_steps", sft_steps, "--sft.optim.warmup_steps", 10]
    options += ["--rl.steps", rl_steps, "--rl.checkpoint.every_steps", rl_steps // 2]
    rc, _ = t1("run", *options, timeout_s=1500 if check.smoke else 300)
    rows = metrics_of(base / "run")
    differences = [row["logprob_diff"] for row in rows]
    fine = rc == 0 and len(rows) == rl_steps and all(math.isfinite(d) and d < 0.05 for d in differences)
    stages = ("seconds/generate", "seconds/anchor", "seconds/train", "push_seconds")
    check.report(
        "t1 run",
        fine,
        exit_code=rc,
        logprob_diff=differences,
        rewards=[round(row["reward"], 3) for row in rows],
        last_step={stage: round(rows[-1][stage], 3) for stage in stages} if rows else None,
    )
    if fine:
        given = ("--config", base / "run" / "config.yaml", "--model.hf_path", base / "run" / "sft" / "hf", "--resume")
        rc, _ = t1("rl", *given, "--rl.steps", rl_steps + 1)
        steps = [row["step"] for row in metrics_of(base / "run")]
        check.report("resume", rc == 0 and steps == list(range(1, rl_steps + 2)), exit_code=rc, steps=steps)


def quickstart(check: Check) -> tuple[Path, list[object]]:
    """The folder with the task's data, and options to run it on one GPU."""
    base = emptied(check.work / "quickstart")
    rc, _ = t1("quickstart-data", "--out", base / "data", "--seed", 0)
    check.report("t1 quickstart-data", rc == 0)
    data = {
        "model.hf_path": "model",
        "data.sft": "sft.jsonl",
        "data.train": "rl.jsonl",
        "data.heldout": "heldout.jsonl",
    }
    options: list[object] = ["--config", QUICKSTART / "quickstart.yaml", "--config", QUICKSTART / "one_gpu.yaml"]
    options += [word for name, file in data.items() for word in (f"--{name}", base / "data" / file)]
    options += ["--run_dir", base / "run"]
    if check.smoke:
        options += ["--model.dtype", "float32", "--rollout.dtype", "float32"]
    return base, options


def _compare_logprobs(check: Check, case: str, model: Path, against: str, base: Path, *more: object) -> None:
    texts = base / "texts.jsonl"
    lines = [{"prompt": f"Question {number}?", "response": "x" * (20 + 7 * number)} for number in range(6)]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dtype = "float32" if check.smoke and against != "transformers" else "bfloat16"
    given = ("--input", texts, "--against", against, "--dtype", dtype, "--parallel.nproc_per_node", 1, *more)
    rc, text = t1("logprobs", model, *given)
    said = re.search(r"differences (\S+) at most, (\S+) in the mean", text)
    mean = float(said[2]) if said else math.inf
    check.report(case, rc == 0 and mean < 0.03, exit_code=rc, largest=said and float(said[1]), mean=mean)


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "rl" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def t1(*arguments: object, timeout_s: float = 180) -> tuple[int, str]:
    """Exit code and output, which goes to the log as it comes."""
    print("$ t1", *arguments, flush=True)
    process = _start(arguments, subprocess.PIPE, {})
    timer = threading.Timer(timeout_s, _end, [process])
    timer.start()
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        print(line, end="", flush=True)
    timer.cancel()
    return process.wait(), "".join(lines)


@contextlib.contextmanager
def serving(base: Path, **environment: str) -> Iterator[tuple[list[str], str]]:
    """`t1 serve`, up: its servers' URLs, and the file with their key; no URLs when it did not come up."""
    path = base / "serve.txt"
    with path.open("w") as log:
        process = _start(("serve", "--config", base / "config.yaml"), log, environment)
    try:
        said, deadline = None, time.monotonic() + 400
        while said is None and process.poll() is None and time.monotonic() < deadline:
            said = re.search(r"rollout.urls: (\[.*\])\s+rollout.key_file: (\S+)", path.read_text())
            time.sleep(0.2)
        yield (json.loads(said[1].replace("'", '"')), said[2]) if said else ([], "")
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        _end(process)
        print(path.read_text()[-4000:])


def _start(arguments: tuple[object, ...], output: object, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_t1", *map(str, arguments)],
        stdout=output,  # type: ignore[call-overload]
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    """A check that is killed leaves nothing on the GPU."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(5)
