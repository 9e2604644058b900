"""Everything that needs a GPU, checked and measured on one, in one command:

    python -m benchmarks.gpu                       # in the project's folder, with the cluster's packages
    python -m benchmarks.gpu --only resume,step
    python -m benchmarks.gpu --smoke               # tiny sizes on the CPU: is the script itself right?

Every check is a process of its own with a deadline; small ones run side by side, then what is timed runs alone. Results
are JSON lines in OUT/results.jsonl (status ok, FAIL or info), output is in OUT/logs; both are there during the run.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANES = (
    ("machine", "families_bf16", "families_local"),
    ("kernels", "resume", "packing"),
    ("push",),
    ("push_graphs",),
    ("loop",),
    ("convert",),
    ("ranks_bf16", "ranks_fp32"),
    ("collective",),
)
"""Checks of one lane run one after the other, lanes side by side."""
ALONE = ("turns", "step", "head", "memory", "memory_local", "share")
MODULES = {
    "machine": "machine", "families_bf16": "families", "families_local": "families", "kernels": "kernels",
    "resume": "resume", "packing": "families", "push": "commands", "push_graphs": "commands", "loop": "commands",
    "convert": "commands", "step": "step", "head": "head", "memory": "step", "memory_local": "step",
    "ranks_bf16": "ranks", "ranks_fp32": "ranks", "collective": "ranks",
    "share": "share", "turns": "turns",
}  # fmt: skip
LIMIT_S = 600


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"some of {','.join(MODULES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for results and logs")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which what still runs is ended")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, one check after the other")
    parser.add_argument("--check", choices=MODULES, help="this one, in this process")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.check:
        return _check(args.check, args.out, args.smoke)
    chosen = set(filter(None, args.only.split(","))) or set(MODULES)
    if unknown := chosen - MODULES.keys():
        parser.error(f"--only: no such checks: {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    (args.out / "results.jsonl").unlink(missing_ok=True)
    deadline = time.monotonic() + args.budget
    ended: dict[str, str] = {}

    def run(names: tuple[str, ...]) -> None:
        for name in names:
            if name in chosen:
                ended[name] = _run(name, args.out, args.smoke, deadline)

    if args.smoke:
        run(tuple(name for lane in LANES for name in lane))
    else:
        lanes = [threading.Thread(target=run, args=(lane,)) for lane in LANES]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()
    run(ALONE)
    return _summarize(args.out, ended)


def _check(name: str, out: Path, smoke: bool) -> int:
    from benchmarks.gpu.results import Check

    faulthandler.enable()
    check = Check(name=name, out=out, smoke=smoke)
    with check.case("start"):
        job: Callable[[Check], None] = getattr(import_module(f"benchmarks.gpu.{MODULES[name]}"), name)
        job(check)
        return 0
    return 1


def _run(name: str, out: Path, smoke: bool, deadline: float) -> str:
    """In a process group of its own, whose end is the end of all that the check has started."""
    limit = min(LIMIT_S, deadline - time.monotonic())
    if limit < 5:
        return "no time left"
    log = out / "logs" / f"{name}.txt"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--check", name, "--out", str(out), *["--smoke"] * smoke]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)  # faulthandler then says where it stood
            time.sleep(2)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"ended after {limit:.0f} s"
    return f"exit code {process.returncode}"


def _summarize(out: Path, ended: dict[str, str]) -> int:
    path = out / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for status in ("ok", "info", "FAIL"):
        for row in (row for row in rows if row["status"] == status):
            fields = {name: value for name, value in row.items() if name not in ("check", "case", "status")}
            print(f"{status:4} {row['check']} / {row['case']}: {json.dumps(fields)}")
    failed = [row for row in rows if row["status"] == "FAIL"]
    broken = {name: how for name, how in ended.items() if how != "exit code 0"}
    print(
        f"{len(rows) - len(failed)} fine, {len(failed)} failed; ended early: {broken or 'none'}. Logs: {out / 'logs'}"
    )
    return 1 if failed or broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
