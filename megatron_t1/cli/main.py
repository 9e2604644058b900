"""The `t1` command. Jobs read one YAML file and dotted overrides into their config class; unknown keys are errors.

Errors that a person can mend are printed as one message without a traceback (T1_TRACEBACK=1 shows it).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_t1 import plugins
from megatron_t1.cli.streams import outlive_the_terminal
from megatron_t1.stop import EXIT_STOPPED, STOP, Stopped

T = TypeVar("T")

USAGE = """\
usage: t1 COMMAND [--config FILE.yaml] [--section.field VALUE ...]

T1 reasoning RL (arXiv 2501.11651) on Megatron-Core and vLLM.

  run         SFT, evaluation, RL, evaluation, inference scaling and report, in one job
  sft         supervised fine-tuning of model.hf_path on data.sft
  rl          reinforcement learning of model.hf_path on data.train
  rollout     make and store the samples of rl.steps batches of data.train, without training
  replay      train a step of a run again, from its stored samples: `t1 replay runs/a --step 20`
  curate      make data.train: clean raw questions, keep those that model.hf_path solves in at most 30% of 16 samples
  evaluate    accuracy of model.hf_path (or an endpoint, or stored responses) on evaluate.sets or data.heldout
  compare     two evaluations, paired by question: `t1 compare runs/a/evaluate/sft runs/a/evaluate/rl`
  scaling     accuracy of model.hf_path on scaling.set or data.heldout against thinking budgets
  check       what would stop or spoil a run, and what it needs (`t1 check FILE.yaml --for rl --nodes 4 --vllm_nodes 2`)
  sync-check  push model.hf_path (--perturb: changed, and back) and hold every server's logprobs to the trainer's
  synthesize  SFT chains of trial, error and verification from questions, by any chat endpoints
  serve       start vLLM servers for model.hf_path and keep them up
  watch       a run on one page of the terminal, while it goes (`t1 watch RUN_DIR`)
  report      write the HTML report of a run; of several, one that compares them (`t1 report RUN_DIR ...`)
  grade       grade IN.jsonl into OUT.jsonl (`t1 grade IN.jsonl OUT.jsonl`), without any model
  convert     Hugging Face folder to Megatron checkpoint and back, and `verify`: compare two (`t1 convert --help`)
  logprobs    logprobs of given texts, and how far transformers or a server is (`t1 logprobs MODEL --input FILE`)
  quickstart-data   write the quickstart's task: questions, SFT traces, tokenizer, tiny model
  doctor      what is installed here, and what is missing for what

`t1 COMMAND --help` lists every option; `--print_config` after the options of a job shows what it would use.
"""


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    outlive_the_terminal()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in _COMMANDS:
        print(f"t1: there is no command {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return _COMMANDS[command](rest) or 0
    except KeyboardInterrupt as interrupt:
        resumable = "; `--resume` goes on from the last checkpoint" if command in ("run", "sft", "rl") else ""
        print("t1: interrupted" + (f"; {interrupt}" if str(interrupt) else resumable), file=sys.stderr)
        return 130
    except Stopped:
        if os.environ.get("RANK", "0") != "0":
            return 0  # a launcher ends all ranks once one has failed, and rank 0 has servers to close
        print("t1: stopped as asked; `--resume` goes on from here", file=sys.stderr)
        return EXIT_STOPPED
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("T1_TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") != "0":
            # One rank speaks: mostly all fail of the same cause, and the launcher ends this one while it waits. Not as
            # one that was killed: that is what a batch script would start again.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
            time.sleep(10.0)
        print(f"t1 {command}: error: {error}", file=sys.stderr)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            # The destructors of its groups may wait for ranks that are in a collective, and the launcher for this one.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        return 1


def _stop_on_signals() -> None:
    """A batch system's ways of pressing Ctrl-C, for jobs of one process."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)


def _line_of(command: str) -> str:
    return next(line.strip()[len(command) :].strip() for line in USAGE.splitlines() if line.split()[:1] == [command])


_SECTIONS = {
    "sft": ("model", "parallel", "data", "sft", "log"),
    "rl": ("model", "parallel", "data", "rollout", "sampling", "reward", "loss", "anchor", "rl", "evaluate", "log"),
    "rollout": ("model", "parallel", "data", "rollout", "sampling", "reward", "rl"),
    "curate": ("model", "data", "rollout", "sampling", "reward", "evaluate", "curate"),
    "evaluate": ("model", "data", "rollout", "reward", "evaluate"),
    "scaling": ("model", "data", "rollout", "reward", "evaluate", "scaling"),
    "serve": ("model", "rollout"),
    "sync-check": ("model", "parallel", "rollout"),
}
"""What a command reads of the whole configuration; `run` reads all of it."""


def _read(command: str, arguments: list[str], cls: type[T]) -> T:
    """The command's config; `--help` and `--print_config` end here."""
    from megatron_t1.cli import options

    if {"-h", "--help"} & set(arguments):
        from megatron_t1.cli.help import help_of

        print(help_of(command, _line_of(command), cls, _SECTIONS.get(command, ())), end="")
        raise SystemExit(0)
    config = options.read(cls, [word for word in arguments if word != "--print_config"])
    if "--print_config" in arguments:
        from megatron_t1.config import dump

        print(dump(config), end="")
        raise SystemExit(0)
    return config


def _on_ranks(parallel: Any, command: str, arguments: list[str]) -> int:
    """Run this command on as many trainer processes of this machine as it takes; nobody has started them yet."""
    from megatron_t1.cli import ranks

    return ranks.start(ranks.num_processes(parallel), [command, *arguments], alone=main)


def _trainer_job(command: str) -> Callable[[list[str]], int]:
    """A job on all trainer ranks: starts them when nobody has, keeps others out of run_dir, runs."""

    def job(arguments: list[str]) -> int:
        from megatron_t1.config import Config
        from megatron_t1.lock import locked

        cfg = _read(command, arguments, Config)
        cfg.model.folder()  # refused before processes start
        if "RANK" not in os.environ:
            return _on_ranks(cfg.parallel, command, arguments)
        from megatron_t1.platform import te

        te.check_layers(cfg.model.layers)
        folders = [Path(cfg.run_dir)]
        if command == "run":
            folders += [folders[0] / name for name in ("evaluate/sft", "evaluate/rl", "scaling/rl")]
        with contextlib.ExitStack() as stack:
            for folder in folders if os.environ["RANK"] == "0" else []:
                stack.enter_context(locked(folder))
            from megatron_t1 import pipeline

            STOP.install()
            {"run": pipeline.run_all, "sft": pipeline.run_sft, "rl": pipeline.run_rl}[command](cfg)
        return 0

    return job


def _labelled_job(command: str) -> Callable[[list[str]], int]:
    def job(arguments: list[str]) -> int:
        from megatron_t1.config import Config

        cfg = _read(command, arguments, Config)
        from megatron_t1 import pipeline
        from megatron_t1.lock import locked

        _stop_on_signals()
        label = cfg.label or command
        with locked(Path(cfg.run_dir) / command / label):
            {"evaluate": pipeline.run_evaluate, "scaling": pipeline.run_scaling}[command](cfg, label)
        return 0

    return job


def _sync_check(arguments: list[str]) -> int:
    from megatron_t1.config import SyncCheckConfig

    cfg = _read("sync-check", arguments, SyncCheckConfig)
    cfg.model.folder()
    if "RANK" not in os.environ:
        return _on_ranks(cfg.parallel, "sync-check", arguments)
    from megatron_t1.platform import te

    te.check_layers(cfg.model.layers)
    from megatron_t1 import pipeline

    return 0 if pipeline.run_sync_check(cfg) else 1


def _single_job(command: str) -> Callable[[list[str]], int]:
    """A job of one process with a folder of its own in run_dir."""

    def job(arguments: list[str]) -> int:
        from megatron_t1.config import Config

        cfg = _read(command, arguments, Config)
        from megatron_t1 import pipeline
        from megatron_t1.lock import locked

        _stop_on_signals()
        with locked(Path(cfg.run_dir) / command):
            {"curate": pipeline.run_curate, "rollout": pipeline.run_rollout}[command](cfg)
        return 0

    return job


def _replay(arguments: list[str]) -> int:
    from argparse import ArgumentParser

    from megatron_t1.cli import options
    from megatron_t1.config import Config

    parser = ArgumentParser(prog="t1 replay", description=_line_of("replay"), allow_abbrev=False,
                            epilog="Further options change the run's own: --parallel.tensor 2")  # fmt: skip
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--step", type=int, required=True, help="the step, counted from 1 as in metrics.jsonl")
    parser.add_argument("--profile", action="store_true", help="write torch's profile of the step to RUN/replay/")
    asked, rest = parser.parse_known_args(arguments)
    kept = asked.run_dir / "config.yaml"
    if not kept.is_file():
        raise ValueError(f"{kept} is not there: give the folder of a run whose RL has begun")
    if asked.step < 1:
        raise ValueError(f"--step = {asked.step}: steps are counted from 1")
    cfg = options.read(Config, ["--config", str(kept), *rest, "--run_dir", str(asked.run_dir)])
    if "RANK" not in os.environ:
        return _on_ranks(cfg.parallel, "replay", arguments)
    from megatron_t1 import pipeline

    pipeline.run_replay(cfg, asked.step, profiled=asked.profile)
    return 0


def _serve(arguments: list[str]) -> int:
    from megatron_t1.config import Config

    cfg = _read("serve", arguments, Config)
    from megatron_t1.servers.serve import serve

    _stop_on_signals()
    rollout = replace(cfg.rollout, urls=(), await_servers=0)  # what trainers elsewhere are told
    with contextlib.suppress(KeyboardInterrupt):
        serve(rollout, cfg.model.folder(), Path(cfg.run_dir), partial(print, flush=True))
    return 0


def _check(arguments: list[str]) -> int:
    from argparse import ArgumentParser

    from megatron_t1.check import estimate
    from megatron_t1.check.check import check
    from megatron_t1.check.dry_run import dry_run
    from megatron_t1.check.findings import Findings
    from megatron_t1.check.machines import Machines
    from megatron_t1.cli import options
    from megatron_t1.config import Config
    from megatron_t1.platform import gpus

    parser = ArgumentParser(
        prog="t1 check",
        usage="t1 check [FILE.yaml] [options] [--section.field VALUE ...]",
        description=_line_of("check"),
        allow_abbrev=False,
    )
    parser.add_argument("--for", dest="command", default="rl", help="the command that will run (rl)",
                        choices=["run", "sft", "rl", "evaluate", "scaling", "serve"])  # fmt: skip
    parser.add_argument("--nodes", type=int, default=1, help="nodes in all (1)")
    parser.add_argument("--vllm_nodes", type=int, default=0, help="of them for vLLM alone; 0: all do both (0)")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="(8)")
    parser.add_argument("--vllm_gpus", type=int, help="of every node for vLLM, when --vllm_nodes is 0 (half of them, "
                        "or all with rollout.share_gpus)")  # fmt: skip
    parser.add_argument("--ranks_per_node", type=int, help="trainer processes on a node (one a GPU)")
    parser.add_argument("--gpu", help="A100, H100 or H200 (this machine's, or H100)")
    parser.add_argument(
        "--grace_s",
        type=float,
        help="seconds that a trainer has from USR1 to its end (1740, as the batch scripts have it)",
    )
    parser.add_argument("--suggest", action="store_true", help="say the smallest layout of the trainer that "
                        "fits the longest sequence, as options to append")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the srun and vLLM commands that would run")
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    asked, rest = parser.parse_known_args(arguments)
    cfg, problems = options.parse(Config, rest)
    findings = Findings(problems=problems)
    said = {name: getattr(asked, name) for name in Machines.__dataclass_fields__ if name != "share_gpus"}
    said["gpu"] = asked.gpu or gpus.known(estimate.GPUS) or "H100"
    machines = Machines(**said, share_gpus=cfg is not None and cfg.rollout.share_gpus)
    if cfg is not None:
        check(cfg, asked.command, machines, findings, suggests=asked.suggest)
    print(findings.text())
    if asked.dry_run and cfg is not None:
        print(dry_run(cfg, asked.command, machines, rest))
    return 1 if findings.problems else 0


def _report(arguments: list[str]) -> int:
    from argparse import ArgumentParser

    from megatron_t1.report.report import write_report

    parser = ArgumentParser(prog="t1 report", description=_line_of("report"))
    parser.add_argument("run_dir", type=Path, nargs="+", help="folder of a run, running or over; several are compared")
    run_dirs = parser.parse_args(arguments).run_dir
    if len(run_dirs) > 1:
        from megatron_t1.report.compare import write_comparison

        print(write_comparison(run_dirs))
        return 0
    if not run_dirs[0].is_dir():
        raise ValueError(f"{run_dirs[0]} is not there: give the folder of a run")
    print(write_report(run_dirs[0]))
    return 0


def _watch(arguments: list[str]) -> int:
    from argparse import ArgumentParser

    from megatron_t1.report.watch import watch

    parser = ArgumentParser(prog="t1 watch", description=_line_of("watch"))
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("--once", action="store_true", help="print the page once, and end")
    parser.add_argument("--every_s", type=float, default=2.0, help="seconds between looks at the files (2)")
    asked = parser.parse_args(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        watch(asked.run_dir, every_s=asked.every_s, once=asked.once)
    return 0


def _compare(arguments: list[str]) -> int:
    from argparse import ArgumentParser

    from megatron_t1.evaluation.results import compare, describe

    parser = ArgumentParser(prog="t1 compare", description=_line_of("compare"))
    parser.add_argument("before", type=str, help="folder of an evaluation: run_dir/evaluate/LABEL, or one of its sets")
    parser.add_argument("after", type=str, help="the other one")
    parsed = parser.parse_args(arguments)
    print(describe(compare(Path(parsed.before), Path(parsed.after))))
    return 0


def _grade(arguments: list[str]) -> int:
    from megatron_t1.config import GradeConfig

    if len(arguments) >= 2 and not any(argument.startswith("-") for argument in arguments[:2]):
        arguments = ["--input", arguments[0], "--output", arguments[1], *arguments[2:]]
    cfg = _read("grade", arguments, GradeConfig)
    from megatron_t1.grade import grade

    grade(cfg)
    return 0


def _convert(arguments: list[str]) -> int:
    from argparse import ArgumentParser

    parser = ArgumentParser(prog="t1 convert", description=_line_of("convert"))
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("to-megatron", help="Hugging Face folder -> Megatron checkpoint; it loads at any layout")
    job.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="config.json, tokenizer and safetensors")
    job.add_argument("out", type=Path, metavar="OUT", help="folder to make; model.hf_path may name it")
    job.add_argument("--tp", type=int, default=1, help="tensor-parallel size that the files are cut for")
    job.add_argument("--pp", type=int, default=1, help="pipeline-parallel size that the files are cut for")
    job = jobs.add_parser("to-hf", help="Megatron checkpoint, converted or of a run -> Hugging Face folder")
    job.add_argument("checkpoint", type=Path, metavar="CKPT", help="from to-megatron, or a run's checkpoints/step_N")
    job.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    job.add_argument("--hf", type=Path, help="folder with config.json and tokenizer, for a checkpoint without them")
    job.add_argument("--max_shard_gb", type=float, default=4.0, help="largest safetensors file")
    job = jobs.add_parser("verify", help="compare two checkpoints of either kind; exit code 1 when they differ")
    job.add_argument("a", type=Path, metavar="A", help="Hugging Face folder or Megatron checkpoint")
    job.add_argument("b", type=Path, metavar="B", help="Hugging Face folder or Megatron checkpoint")
    job.add_argument("--hf", type=Path, help="folder with config.json, for a Megatron checkpoint without it")
    for job in jobs.choices.values():
        job.add_argument("--plugins", default="", metavar="MODULE[,...]", help="of yours, with the model's family")
    options = parser.parse_args(arguments)
    plugins.load(filter(None, options.plugins.split(",")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("one process converts: start it alone, not under torchrun or as several tasks")
    from megatron_t1 import convert

    try:
        if options.job == "to-megatron":
            print(convert.to_megatron(options.hf_dir, options.out, tp=options.tp, pp=options.pp).describe())
        elif options.job == "to-hf":
            shard = round(options.max_shard_gb * 1e9)
            done = convert.to_hf(options.checkpoint, options.out, hf_dir=options.hf, max_shard_bytes=shard)
            print(done.describe())
        else:
            return convert.verify_and_say(options.a, options.b, hf_dir=options.hf)
    except KeyboardInterrupt:
        print("t1 convert: interrupted; nothing is left of it", file=sys.stderr)
        return 130
    return 0


def _synthesize(arguments: list[str]) -> int:
    from megatron_t1.synthesize.config import SynthesizeConfig

    cfg = _read("synthesize", arguments, SynthesizeConfig)
    from megatron_t1.synthesize.run import describe, synthesize

    _stop_on_signals()
    print(describe(synthesize(cfg)))
    print(f"wrote {cfg.out}/sft.jsonl, chains.jsonl, summary.json, browse.html")
    return 0


def _logprobs(arguments: list[str]) -> int:
    from megatron_t1.config import LogprobsConfig

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]
    cfg = _read("logprobs", arguments, LogprobsConfig)
    if "RANK" not in os.environ:
        return _on_ranks(cfg.parallel, "logprobs", arguments)
    from megatron_t1.platform import te

    te.check_layers(cfg.layers)
    from megatron_t1.logprobs import run

    run(cfg)
    return 0


def _quickstart_data(arguments: list[str]) -> int:
    from megatron_t1.data.quickstart import QuickstartDataConfig, write

    cfg = _read("quickstart-data", arguments, QuickstartDataConfig)
    write(cfg)
    print(f"wrote {cfg.out}/model, sft.jsonl, rl.jsonl, heldout.jsonl")
    return 0


def _doctor(arguments: list[str]) -> int:
    from megatron_t1.cli.doctor import diagnose

    table, complete = diagnose()
    print(table)
    return 0 if complete else 1


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _trainer_job("run"),
    "sft": _trainer_job("sft"),
    "rl": _trainer_job("rl"),
    "rollout": _single_job("rollout"),
    "replay": _replay,
    "curate": _single_job("curate"),
    "evaluate": _labelled_job("evaluate"),
    "scaling": _labelled_job("scaling"),
    "check": _check,
    "sync-check": _sync_check,
    "synthesize": _synthesize,
    "serve": _serve,
    "watch": _watch,
    "report": _report,
    "compare": _compare,
    "grade": _grade,
    "convert": _convert,
    "logprobs": _logprobs,
    "quickstart-data": _quickstart_data,
    "doctor": _doctor,
}
