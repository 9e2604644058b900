"""One HTML file that shows a run: curves, accuracy before and after, scaling, responses and rewards, time, config.

It reads files in the run's folder and nothing else, and leaves out the parts that are not there:

    config.yaml summary.json                          sft/metrics.jsonl rl/metrics.jsonl rl/samples.jsonl
    evaluate/<label>/{summary.json,responses.jsonl}   scaling/<label>/points.json

What a model wrote is hostile: the template escapes everything, the only script is ours and allowed by its hash, and the
page asks no other host for anything. Left out: interactive plots (TensorBoard has the same numbers).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from megatron_t1 import plots, stats
from megatron_t1.files import read_jsonl, write_text

MAX_QUESTIONS = 12
"""Questions whose responses are shown for every evaluation, the first ones of the file."""
MAX_STEPS = 6
"""RL steps whose responses are shown, evenly spread, the first and the last among them."""
MAX_SAMPLES = 4
"""Responses shown of one question from one source."""
MAX_CHARS = 8000
"""Of one response; the files have all of it."""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path."""
    environment = Environment(
        loader=PackageLoader("megatron_t1"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "seconds": _seconds}
    script, style = (_asset(environment, name) for name in ("report.js", "report.css"))
    evals, responses = _evaluations(run_dir / "evaluate")
    curves = {path.parent.name: _read_json(path) for path in sorted(run_dir.glob("scaling/*/points.json"))}
    metrics = {stage: read_jsonl(run_dir / stage / "metrics.jsonl") for stage in ("sft", "rl")}
    summary = _read_json(run_dir / "summary.json") or {}
    html = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        evals=evals,
        comparison=_comparison(responses),
        accuracy_plot=plots.accuracy(evals) if evals else None,
        curves=curves,
        scaling_plot=plots.scaling(curves) if curves else None,
        stages={stage: plots.learning_curves(rows) for stage, rows in metrics.items() if rows},
        samples=[*_eval_samples(responses), *_rl_samples(run_dir)],
        seconds=summary.get("seconds", {}),
        summary={name: value for name, value in summary.items() if not isinstance(value, (dict, list))},
        config=_read_text(run_dir / "config.yaml"),
        versions=summary.get("versions", {}),
    )
    path = run_dir / "report.html"
    write_text(path, html.encode("utf-8", "replace").decode())  # a lone surrogate in a data file has no UTF-8
    return path


def _evaluations(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Summaries and responses by label, those of earlier weights first."""
    found = [(path.parent.name, _read_json(path)) for path in folder.glob("*/summary.json")]
    rows = {label: read_jsonl(folder / label / "responses.jsonl") for label, _ in found}
    found.sort(key=lambda item: (max((row["weight_versions"][-1][0] for row in rows[item[0]]), default=0), item[0]))
    return dict(found), {label: rows[label] for label, _ in found}


def _comparison(responses: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """The first evaluation against the last, paired by question; None when they do not share questions."""
    labels = list(responses)
    correct: dict[str, dict[str, list[bool]]] = {label: {} for label in labels}
    for label, rows in responses.items():
        for row in rows:
            correct[label].setdefault(row["id"], []).append(row["reward"]["correct"])
    before, after = (correct[labels[i]] for i in (0, -1)) if labels else ({}, {})
    shared = [identity for identity in before if identity in after]
    if len(labels) < 2 or len(shared) < 2:
        return None
    result = stats.paired_difference([before[i] for i in shared], [after[i] for i in shared])
    return {"before": labels[0], "after": labels[-1], "num_questions": len(shared), "result": result}


def _eval_samples(responses: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The same questions from every evaluation, one question after the other."""
    ids = list(dict.fromkeys(row["id"] for rows in responses.values() for row in rows))[:MAX_QUESTIONS]
    for identity in ids:
        for label, rows in responses.items():
            for row in [row for row in rows if row["id"] == identity][:MAX_SAMPLES]:
                yield _shown(row, label)


def _rl_samples(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The first question of some steps."""
    rows = read_jsonl(run_dir / "rl" / "samples.jsonl")
    steps = sorted({row["step"] for row in rows})
    count = min(MAX_STEPS, len(steps))
    for step in dict.fromkeys(steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)):
        of_step = [row for row in rows if row["step"] == step]
        for row in [row for row in of_step if row["id"] == of_step[0]["id"]][:MAX_SAMPLES]:
            yield _shown(row, f"RL step {step}")


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
    text = _read_text(path)
    return json.loads(text) if text else None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _asset(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _seconds(value: float) -> str:
    minutes, seconds = divmod(value, 60)
    return f"{minutes:.0f} min {seconds:02.0f} s" if minutes else f"{seconds:.1f} s"
