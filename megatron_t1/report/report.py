"""One HTML file that shows a run: curves, accuracy before and after, scaling, responses and rewards, time, config.

It reads files in the run's folder and nothing else, and leaves out the parts that are not there:

    config.yaml summary.json                                sft/metrics.jsonl rl/metrics.jsonl rl/samples.jsonl
    evaluate/<label>/<set>/{summary.json,responses.jsonl}   scaling/<label>/{points,summary_points,majority}.json

What a model wrote is hostile: the template escapes everything, the only script is ours and allowed by its hash, and the
page asks no other host for anything. Left out: interactive plots (TensorBoard has the same numbers).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from megatron_t1.evaluation.results import compare, grid, published, read_summaries
from megatron_t1.files import iter_jsonl, read_json, read_jsonl, write_text
from megatron_t1.report import plots
from megatron_t1.report.html import render

MAX_QUESTIONS = 12
"""Questions whose responses are shown for every evaluation, the first ones of the file."""
MAX_STEPS = 6
"""RL steps whose responses are shown, evenly spread, the first and the last among them."""
MAX_SAMPLES = 4
"""Responses shown of one question from one source."""
MAX_CHARS = 8000
"""Of one response; the files have all of it."""


class _Shown(TypedDict):
    id: str
    response: str
    reward: dict[str, Any] | None


class _Step(TypedDict):
    step: int


class _ShownStep(_Shown, _Step):
    pass


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    Raises:
        ValueError: nothing that a report is made of is there.
    """
    along, evals = _evaluations(run_dir)
    responses = {name: run_dir / "evaluate" / s["label"] / s["set"] / "responses.jsonl" for name, s in evals.items()}
    scaling = {path.parent.name: _scaling(path.parent) for path in sorted(run_dir.glob("scaling/*/points.json"))}
    metrics = {stage: read_jsonl(run_dir / stage / "metrics.jsonl", _Step) for stage in ("sft", "rl")}
    if not (evals or scaling or any(metrics.values())):
        raise ValueError(
            f"{run_dir} holds no results of a run: none of sft/metrics.jsonl, rl/metrics.jsonl, "
            "evaluate/*/*/summary.json, scaling/*/points.json is there; give a run's run_dir"
        )
    summary = _read_json(run_dir / "summary.json") or {}
    samples = [*_eval_samples(responses), *_rl_samples(run_dir)]
    html = render(
        "report.html.j2",
        name=run_dir.resolve().name,
        evals=evals,
        comparisons=_comparisons(evals, run_dir / "evaluate"),
        accuracy_plots=[*plots.along_training(along), *([plots.accuracy(evals)] if evals else [])],
        group_plots=[
            plots.groups(name, kind, s["by"][kind])
            for name, s in evals.items()
            for kind in s["by"]
            if len(s["by"][kind]) > 1
        ],
        scaling=scaling,
        scaling_plot=plots.scaling(scaling) if scaling else None,
        grid=grid(list(evals.values())),
        published=published(list(evals.values())),
        stages={stage: plots.learning_curves(rows) for stage, rows in metrics.items() if rows},
        kl_plot=plots.reward_against_kl({"": metrics["rl"]}),
        samples=samples,
        penalties=sorted({name for row in samples for name in row["reward"].get("penalties") or ()}),
        seconds=summary.get("seconds", {}),
        idle=_idle(metrics["rl"]),
        wasted=_wasted(metrics["rl"]),
        summary={name: value for name, value in summary.items() if not isinstance(value, (dict, list))},
        config=_read_text(run_dir / "config.yaml"),
        versions=summary.get("versions", {}),
    )
    path = run_dir / "report.html"
    write_text(path, html)
    return path


def _scaling(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Instrument -> its points (`plots.scaling`)."""
    files = {"forced": "points.json", "summary": "summary_points.json", "majority": "majority.json"}
    return {name: points for name, file in files.items() if (points := _read_json(folder / file))}


def _idle(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Who -> mean share of an RL step in which it computed nothing."""
    shares = {name: [row[name] for row in rows if name in row] for name in ("idle/trainer", "idle/servers")}
    return {name.removeprefix("idle/"): sum(each) / len(each) for name, each in shares.items() if each}


def _wasted(rows: list[dict[str, Any]]) -> float | None:
    """Share of all tokens of RL that went into groups whose samples all got one reward, or that refilling left out."""
    known = [row for row in rows if "tokens_all_equal" in row]
    if not known:
        return None
    left_out = sum(row.get("refill/tokens", 0) for row in known)
    equal, trained = (sum(row[name] for row in known) for name in ("tokens_all_equal", "num_response_tokens"))
    return float((equal + left_out) / (trained + left_out))


def _evaluations(run_dir: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Those along the training, by set, in its order; and all but those between its first and its last, by name (the
    set is in it when there are several)."""
    found = read_summaries(run_dir)
    along: dict[str, list[dict[str, Any]]] = {}
    for summary in found:
        if "step" in summary["settings"]:
            along.setdefault(summary["set"], []).append(summary)
    between = [summary for of_set in along.values() for summary in of_set[1:-1]]
    several = len({summary["set"] for summary in found}) > 1
    return along, {f"{s['label']} · {s['set']}" if several else s["label"]: s for s in found if s not in between}


def _comparisons(evals: dict[str, dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Of every set, the first evaluation against the last, paired by question: of those along the training, where there
    are two."""
    found = []
    for name in dict.fromkeys(summary["set"] for summary in evals.values()):
        of_set = [summary for summary in evals.values() if summary["set"] == name]
        along = [summary for summary in of_set if "step" in summary["settings"]]
        labels = [summary["label"] for summary in (along if len(along) > 1 else of_set)]
        if len(labels) < 2:
            continue
        with contextlib.suppress(ValueError):  # they share no questions
            (row,) = compare(folder / labels[0] / name, folder / labels[-1] / name)
            found.append({"before": labels[0], "after": labels[-1], **row})
    return found


def _eval_samples(responses: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """The first questions of every set from every evaluation, one question after the other."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for name, path in responses.items():
        ids: dict[str, int] = {}
        for row in iter_jsonl(path, _Shown):
            if len(ids) == MAX_QUESTIONS and row["id"] not in ids:
                break
            ids[row["id"]] = ids.get(row["id"], 0) + 1
            if ids[row["id"]] <= MAX_SAMPLES:
                shown.setdefault(row["id"], []).append(_shown(row, name))
    for rows in shown.values():
        yield from rows


def _rl_samples(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The first question of some steps."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in iter_jsonl(run_dir / "rl" / "samples.jsonl", _ShownStep):
        shown = by_step.setdefault(row["step"], [])
        if not shown or (row["id"] == shown[0]["id"] and len(shown) < MAX_SAMPLES):
            shown.append(_shown(row, f"RL step {row['step']}"))
    steps = sorted(by_step)
    count = min(MAX_STEPS, len(steps))
    for step in dict.fromkeys(steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)):
        yield from by_step[step]


def _shown(row: dict[str, Any], source: str) -> dict[str, Any]:
    reward = row["reward"] or {}
    hidden = len(row["response"]) - MAX_CHARS
    return {
        **row,
        "source": source,
        "reward": reward,
        "verdict": "penalized" if reward.get("penalties") else reward.get("outcome", "not graded"),
        "response": row["response"][:MAX_CHARS] + (f" … ({hidden} more characters)" if hidden > 0 else ""),
    }


def _read_json(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
