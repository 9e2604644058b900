"""The commands around a run, with parsers of their own: what it needs, how it goes, what came of it, and its files."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_t1 import plugins
from megatron_t1.cli.usage import line_of


def _check(arguments: list[str]) -> int:
    from argparse import ArgumentParser

    import torch

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
        description=line_of("check"),
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
    parser.add_argument("--gpu", help="A100, H100 or H200, of another machine (this one's, with its memory, or H100)")
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
    said = {name: getattr(asked, name) for name in vars(asked) if name in Machines.__dataclass_fields__}
    said["gpu"] = asked.gpu or gpus.known(estimate.GPUS) or "H100"
    if asked.gpu is None and torch.cuda.is_available():
        said["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
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

    parser = ArgumentParser(prog="t1 report", description=line_of("report"))
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

    parser = ArgumentParser(prog="t1 watch", description=line_of("watch"))
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

    parser = ArgumentParser(prog="t1 compare", description=line_of("compare"))
    parser.add_argument("before", type=str, help="folder of an evaluation: run_dir/evaluate/LABEL, or one of its sets")
    parser.add_argument("after", type=str, help="the other one")
    parsed = parser.parse_args(arguments)
    print(describe(compare(Path(parsed.before), Path(parsed.after))))
    return 0


def _convert(arguments: list[str]) -> int:
    from argparse import ArgumentParser

    parser = ArgumentParser(prog="t1 convert", description=line_of("convert"))
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


def _doctor(arguments: list[str]) -> int:
    from megatron_t1.cli.doctor import diagnose

    table, complete = diagnose()
    print(table)
    return 0 if complete else 1


TOOLS: dict[str, Callable[[list[str]], int]] = {
    "check": _check,
    "watch": _watch,
    "report": _report,
    "compare": _compare,
    "convert": _convert,
    "doctor": _doctor,
}
