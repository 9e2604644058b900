"""`t1 watch RUN`: a run on one page of a terminal, from its files alone.

It may be read from any machine that sees the run's folder, and costs the run nothing. What servers or models said is
shown without its control characters.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_t1.files import parse_json, parse_yaml, read_json

RECENT = 20
"""Steps that means, times and small curves are of."""
SILENT_S = 60.0
"""Without a sign of life for so long, a run is taken for ended."""
_SHOWN = {
    "reward": "reward", "pass_rate": "pass rate", "nll": "nll", "entropy": "entropy", "logprob_diff": "mismatch",
    "kl_sample": "KL of a sample", "grad_norm": "gradient norm", "response_tokens_mean": "response tokens",
    "share_cut": "cut off", "penalized": "penalized", "groups_all_equal": "groups all equal",
    "idle/trainer": "trainer idle", "idle/servers": "servers idle",
}  # fmt: skip
_BARS = "▁▂▃▄▅▆▇█"


class Lines:
    """The JSON lines of a growing file; `new` gives those that came since it was last asked."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def new(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._at:  # a resumed run writes it anew, without the steps that it repeats
                    self._at = 0
                file.seek(self._at)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._at += len(whole) + len(newline)
        rows = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # a damaged line hides no other
                row = parse_json(line)
                if isinstance(row, dict):
                    rows.append(row)
        return rows


@dataclass
class Run:
    """What is known of a run. `look` again and again."""

    folder: Path
    stage: str = ""
    """`sft` or `rl`: the one that wrote last."""
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=RECENT))
    warnings: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=5))
    status: dict[str, Any] = field(default_factory=dict)
    total: int | None = None
    """Steps of the whole stage, when known."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: the folder is not there.
        """
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not there: give the folder of a run")
        self._lines = {stage: Lines(self.folder / stage / "metrics.jsonl") for stage in ("sft", "rl")}
        self._warned = Lines(self.folder / "rl/warnings.jsonl")

    def look(self) -> list[dict[str, Any]]:
        """Reads what is new; returns the new steps."""
        found = []
        for stage, lines in self._lines.items():
            if rows := [row for row in lines.new() if isinstance(row.get("step"), int)]:
                if stage != self.stage:
                    self.stage, self.total = stage, self._steps(stage)
                    self.recent.clear()
                if self.recent and rows[0]["step"] <= self.recent[-1]["step"]:
                    self.recent.clear()
                self.recent.extend(rows)
                found += rows
        self.warnings.extend(self._warned.new())
        try:
            self.status = read_json(self.folder / "rl/status.json", dict[str, Any])
        except (OSError, ValueError):
            self.status = {}
        return found

    def _steps(self, stage: str) -> int | None:
        try:
            config = parse_yaml((self.folder / "config.yaml").read_text(encoding="utf-8"))
            return config["rl"]["steps"] if stage == "rl" else config["sft"]["max_steps"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def finished(self) -> bool:
        """The model is there, of the last step; after fine-tuning only when nothing goes on (RL may be starting)."""
        if not (self.folder / (self.stage or "rl") / "hf").is_dir():
            return False
        if self.stage == "sft":
            return self.silent_s > SILENT_S
        return not self.recent or self.total is None or self.recent[-1]["step"] >= self.total

    @property
    def silent_s(self) -> float:
        """Seconds since its last sign of life."""
        paths = [self.folder / self.stage / "metrics.jsonl", self.folder / "rl/status.json"]
        return time.time() - max((path.stat().st_mtime for path in paths if path.exists()), default=time.time())

    def step_s(self) -> float | None:
        """Median seconds of a recent step."""
        times = [sum(_stages(row).values()) for row in self.recent]
        return statistics.median(times) if times and any(times) else None

    def says(self) -> str:
        """How it stands, in one line."""
        if not self.recent:
            return "no step yet" + (f"; silent for {_time(self.silent_s)}" if self.silent_s > SILENT_S else "")
        step, each = self.recent[-1]["step"], self.step_s()
        text = f"{self.stage} step {step}" + (f" of {self.total}" if self.total else "")
        if each:
            text += f", {_time(each)} a step"
        if self.finished:
            return f"{text}; finished"
        # RL says something every few seconds, whatever its steps take.
        if self.silent_s > max(SILENT_S, 0 if self.stage == "rl" else 5 * (each or 0)):
            return f"{text}; SILENT for {_time(self.silent_s)}: it ended, was killed, or hangs"
        if each and self.total:
            text += f"; {_time(each * (self.total - step))} to the end"
        return text

    def page(self) -> Group:
        """All of it."""
        parts: list[Any] = [Text(f"{self.folder.resolve().name}: {self.says()}", style="bold")]
        if self.recent:
            parts += [Text(), self._numbers(), Text(), self._seconds()]
        if self.status:
            parts += [Text(), self._servers(), Text(), Text(self._rest())]
        for row in self.warnings:
            age = _time(max(0.0, time.time() - float(row.get("time", 0))))
            parts.append(Text(f"{age} ago: {_plain(row.get('text', ''))[:300]}", style="yellow"))
        return Group(*parts)

    def _numbers(self) -> Table:
        table = Table("", "last", f"mean of {len(self.recent)}", "", box=None, pad_edge=False)
        for name, title in _SHOWN.items():
            values = [row[name] for row in self.recent if isinstance(row.get(name), (int, float))]
            if values:
                table.add_row(title, f"{values[-1]:.4g}", f"{statistics.fmean(values):.4g}", _curve(values))
        return table

    def _seconds(self) -> Table:
        stages = _stages(self.recent[-1])
        table = Table("last step by stage", "s", "", box=None, pad_edge=False)
        for stage, seconds in sorted(stages.items(), key=lambda pair: -pair[1]):
            share = seconds / (sum(stages.values()) or 1.0)
            table.add_row(stage, f"{seconds:.3g}", "█" * round(30 * share) + f" {100 * share:.0f}%")
        return table

    def _servers(self) -> Table:
        table = Table("server", "", "weights", "in flight", "cache", box=None, pad_edge=False)
        for server in self.status.get("servers", []):
            cache = server.get("cache")
            table.add_row(
                Text(_plain(server["name"])),
                Text("alive", "green") if server["alive"] else Text("NOT THERE", "bold red"),
                "asleep" if server["version"] < 0 else f"{server['version']}",
                f"{server['in_flight']}",
                "" if cache is None else f"{100 * cache:.0f}%",
            )
        return table

    def _rest(self) -> str:
        graders, gpus = self.status.get("graders", {}), self.status.get("gpus", [])
        counts = ", ".join(f"{n} {_plain(name)}" for name, n in graders.get("outcomes", {}).items())
        processes, kills = graders.get("processes", 0), graders.get("kills", 0)
        lines = [f"graders: {processes} processes, {kills} killed; {counts or 'nothing graded yet'}"]
        if gpus:
            used = ", ".join(f"{taken / 1024:.0f} of {there / 1024:.0f}" for taken, there in gpus)
            lines.append(f"GPU memory on {_plain(self.status.get('host', '?'))} (GiB): {used}")
        return "\n".join(lines)


def watch(folder: Path, *, every_s: float = 2.0, once: bool = False) -> None:
    """Shows the run until it is finished or Ctrl-C; without a terminal, a page and then a line a step.

    Raises:
        ValueError: the folder is not there.
    """
    run, console = Run(folder), Console()
    run.look()
    if once or not console.is_terminal:
        console.print(run.page())
        while not once and not run.finished:
            time.sleep(every_s)
            for row in run.look():
                values = ", ".join(f"{title} {row[name]:.4g}" for name, title in _SHOWN.items() if name in row)
                print(f"{run.stage} step {row['step']}: {values}", flush=True)
        return
    with Live(run.page(), console=console, auto_refresh=False, screen=True) as live:
        while not run.finished:
            time.sleep(every_s)
            run.look()
            live.update(run.page(), refresh=True)
    console.print(run.page())


def _stages(row: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("seconds/"): value for name, value in row.items() if name.startswith("seconds/")}


def _curve(values: list[float]) -> str:
    values = [value for value in values if math.isfinite(value)] or [0.0]
    low, span = min(values), (max(values) - min(values)) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in values)


def _plain(text: Any) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def _time(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.3g} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
