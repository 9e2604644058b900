"""`t1 report A B ...`: runs beside each other: curves in one figure, tables with intervals, settings that differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from megatron_t1.evaluation.results import compare, read_summaries
from megatron_t1.files import parse_yaml, read_jsonl, read_text, write_text
from megatron_t1.report import plots
from megatron_t1.report.html import render
from megatron_t1.trackers import flat

LAST_STEPS = 50
"""Of a run, over which its means in the table are taken."""
_FEWEST = 10
"""Steps from which on a mean has an interval."""
_MEANS = ("reward", "pass_rate", "entropy", "logprob_diff", "response_tokens_mean", "share_cut", "penalized", "nll")
_OWN = {"run_dir", "label", "resume", "resume_with_changes"}
"""Settings that are no difference between runs."""


def write_comparison(run_dirs: list[Path]) -> Path:
    """Write compare.html in the first run's folder and return its path.

    Raises:
        ValueError: a folder is named twice, or holds nothing of a run.
    """
    names = _names(run_dirs)
    differ = _differences({name: _settings(folder) for name, folder in names.items()})
    steps = {
        stage: {n: rows for n, d in names.items() if (rows := read_jsonl(d / stage / "metrics.jsonl"))}
        for stage in ("sft", "rl")
    }
    summaries = {name: read_summaries(folder) for name, folder in names.items()}
    for name, folder in names.items():
        if not summaries[name] and not any(name in runs for runs in steps.values()):
            raise ValueError(f"{folder} holds no results of a run: neither metrics nor evaluations")
    html = render(
        "compare.html.j2",
        names=list(names),
        folders=[str(folder) for folder in names.values()],
        stages={stage: _overlaid(runs) for stage, runs in steps.items() if runs},
        means={stage: _means(runs) for stage, runs in steps.items() if runs},
        evaluations=_evaluations(summaries),
        pairs=list(_pairs(names, summaries)),
        settings={"": list(names), **differ} if differ else {},
    )
    path = run_dirs[0] / "compare.html"
    write_text(path, html)
    return path


def _names(run_dirs: list[Path]) -> dict[str, Path]:
    """The end of each path from where on it is unlike the others."""
    whole = [folder.resolve() for folder in run_dirs]
    if missing := [folder for folder in run_dirs if not folder.is_dir()]:
        raise ValueError(f"{missing[0]} is not there: give folders of runs")
    if len(set(whole)) < len(whole):
        raise ValueError(f"of {', '.join(map(str, run_dirs))} two are the same folder")
    length = next(n for n in range(1, 100) if len({path.parts[-n:] for path in whole}) == len(whole))
    return {"/".join(path.parts[-length:]): path for path in whole}


def _overlaid(runs: dict[str, list[dict[str, Any]]]) -> list[plots.Plot]:
    """A figure a metric, a line a run: the mean of the last twentieth of its steps. What is measured along the training
    comes first, then what is in the table."""
    names = dict.fromkeys(key for rows in runs.values() for row in rows for key in row if key != "step")
    ordered = [name for name in names if name.startswith("heldout/")]
    ordered += [name for name in _MEANS if name in names]
    ordered += [name for name in names if name not in ordered and "/" not in name]
    figures = [
        _figure(name, {label: rows for label, rows in runs.items() if any(name in row for row in rows)})
        for name in ordered
    ]
    kl_plot = plots.reward_against_kl(runs)
    return [kl_plot, *figures] if kl_plot else figures


@matplotlib.rc_context(plots._STYLE)
def _figure(name: str, runs: dict[str, list[dict[str, Any]]]) -> plots.Plot:
    figure, axes = plots._figure(name)
    for label, rows in runs.items():
        values = np.array([plots._number(row.get(name)) for row in rows])
        plots.smoothed(axes, np.array([row["step"] for row in rows]), values, label)
    plots._legend(figure)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    return plots._plot(name, figure)


def _means(runs: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """Row title -> a cell a run: steps, then means of the last steps with 95% intervals."""
    table = {"steps": [str(rows[-1]["step"]) for rows in runs.values()]}
    for name in _MEANS:
        cells = []
        for rows in runs.values():
            values = np.array([row[name] for row in rows[-LAST_STEPS:] if isinstance(row.get(name), (int, float))])
            values = values[np.isfinite(values)]
            cells.append(_interval(values) if len(values) else "")
        if any(cells):
            table[name] = cells
    return {"run": list(runs), **table}


def _interval(values: np.ndarray) -> str:
    """Mean ± Student's t, 95%, of the means of five blocks: neighbouring steps are alike, and would make it too
    narrow. Both with the decimals that two digits of the second take."""
    mean = values.mean()
    if len(values) < _FEWEST:
        return f"{mean:.4g}"
    blocks = [block.mean() for block in np.array_split(values, 5)]
    half = float(stats.t.ppf(0.975, 4) * stats.sem(blocks))
    decimals = 1 - math.floor(math.log10(half)) if half else 4
    if decimals > 6:
        return f"{mean:.3g} ±\N{NO-BREAK SPACE}{half:.2g}"
    return f"{mean:.{max(0, decimals)}f} ±\N{NO-BREAK SPACE}{half:.{max(0, decimals)}f}"


def _evaluations(summaries: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"run": run, **summary} for run, found in summaries.items() for summary in found]


def _pairs(names: dict[str, Path], summaries: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Of every label that both have, each run against the first, paired by question."""
    first, *others = names
    for other in others:
        labels = [s["label"] for s in summaries[first]], [s["label"] for s in summaries[other]]
        for label in dict.fromkeys(label for label in labels[0] if label in labels[1]):
            try:
                rows = compare(names[first] / "evaluate" / label, names[other] / "evaluate" / label)
            except ValueError:  # they share no question
                continue
            for row in rows:
                yield {"before": first, "after": other, "label": label, **row}


def _settings(folder: Path) -> dict[str, str]:
    path = folder / "config.yaml"
    settings = flat(parse_yaml(read_text(path)) or {}) if path.exists() else ()
    return {name: "null" if value is None else str(value) for name, value in settings}


def _differences(settings: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for each in settings.values() for name in each if name not in _OWN)
    rows = {name: [each.get(name, "(none)") for each in settings.values()] for name in names}
    return {name: cells for name, cells in rows.items() if len(set(cells)) > 1}
