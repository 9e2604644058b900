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

from megatron_t1.cli.streams import outlive_the_terminal
from megatron_t1.cli.tools import TOOLS
from megatron_t1.cli.usage import USAGE, line_of
from megatron_t1.stop import EXIT_STOPPED, STOP, Stopped

T = TypeVar("T")


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

        print(help_of(command, line_of(command), cls, _SECTIONS.get(command, ())), end="")
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
        from megatron_t1 import asking
        from megatron_t1.lock import locked

        _stop_on_signals()
        label = cfg.label or command
        with locked(Path(cfg.run_dir) / command / label):
            {"evaluate": asking.run_evaluate, "scaling": asking.run_scaling}[command](cfg, label)
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
        from megatron_t1 import asking
        from megatron_t1.lock import locked

        _stop_on_signals()
        with locked(Path(cfg.run_dir) / command):
            {"curate": asking.run_curate, "rollout": asking.run_rollout}[command](cfg)
        return 0

    return job


def _replay(arguments: list[str]) -> int:
    from argparse import ArgumentParser

    from megatron_t1.cli import options
    from megatron_t1.config import Config

    parser = ArgumentParser(prog="t1 replay", description=line_of("replay"), allow_abbrev=False,
                            epilog="Further options change the run's own: --parallel.tensor 2")  # fmt: skip
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--step", type=int, required=True, help="the step, counted from 1 as in metrics.jsonl")
    parser.add_argument("--profile", action="store_true", help="write torch's profile of the step to RUN/replay/")
    asked, rest = parser.parse_known_args(arguments)
    kept = asked.run_dir / "config.yaml"
    if not kept.is_file():
        raise ValueError(f"{kept} is not there: give the folder of a run whose RL has begun, before all options")
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


def _grade(arguments: list[str]) -> int:
    from megatron_t1.config import GradeConfig

    if len(arguments) >= 2 and not any(argument.startswith("-") for argument in arguments[:2]):
        arguments = ["--input", arguments[0], "--output", arguments[1], *arguments[2:]]
    cfg = _read("grade", arguments, GradeConfig)
    from megatron_t1.grade import grade

    grade(cfg)
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


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _trainer_job("run"),
    "sft": _trainer_job("sft"),
    "rl": _trainer_job("rl"),
    "rollout": _single_job("rollout"),
    "replay": _replay,
    "curate": _single_job("curate"),
    "evaluate": _labelled_job("evaluate"),
    "scaling": _labelled_job("scaling"),
    "sync-check": _sync_check,
    "synthesize": _synthesize,
    "serve": _serve,
    "grade": _grade,
    "logprobs": _logprobs,
    "quickstart-data": _quickstart_data,
    **TOOLS,
}
