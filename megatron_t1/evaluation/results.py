"""Reading stored evaluations: the table of labels by sets, and two runs compared on the same questions.

run_dir/evaluate/<label>/<set>/{summary.json,responses.jsonl}
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from megatron_t1.evaluation import stats
from megatron_t1.files import iter_jsonl, read_json

PAPER_NAMES = {
    "math500": "MATH500",
    "aime2024": "AIME 2024",
    "omni_math_500": "Omni-MATH-500",
    "gpqa": "GPQA",
    "gsm8k": "GSM8K",
    "aime2025": "AIME 2025",
}

PUBLISHED = {
    "T1-SFT (GLM-4-9B)": (60.2, 4.1, 20.0, 37.2),
    "T1 (GLM-4-9B)": (65.8, 9.2, 24.4, 38.1),
    "T1-SFT (Qwen2.5-14B)": (77.2, 10.3, 28.5, 42.3),
    "T1 (Qwen2.5-14B)": (87.4, 30.5, 38.6, 48.3),
    "T1-SFT (Qwen2.5-32B)": (83.4, 24.9, 34.6, 49.5),
    "T1 (Qwen2.5-32B)": (92.4, 50.6, 49.6, 56.1),
}
"""The paper's models on the first four of its sets, percent: README of github.com/THUDM/T1."""


class _Settings(TypedDict):
    step: NotRequired[int]


class _Summary(TypedDict):
    settings: _Settings
    label: str
    set: str
    num_samples: int
    pass_at_1: float
    interval: tuple[float, float]


class _Verdict(TypedDict):
    correct: bool


class _Response(TypedDict):
    id: str
    gold: str
    reward: _Verdict


def read_summaries(run_dir: Path) -> list[dict[str, Any]]:
    """Summaries of all finished evaluations: those of earlier training steps first and those of unknown ones last, then
    by label and set."""
    found = [read_json(path, _Summary) for path in run_dir.glob("evaluate/*/*/summary.json")]
    return sorted(found, key=lambda s: (s["settings"].get("step", math.inf), s["label"], s["set"]))


def table(summaries: list[dict[str, Any]]) -> str:
    """The grid as Markdown."""
    titles, rows = grid(summaries)
    lines = ["| model | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    return "\n".join([*lines, *(f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows.items())])


def published(summaries: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Rows of the paper beside those of `grid`; {} where none of its sets was measured."""
    sets = _in_order(summaries)
    if not any(name in list(PAPER_NAMES)[:4] for name in sets):
        return {}
    return {
        label: [str(dict(zip(PAPER_NAMES, figures, strict=False)).get(name, "")) for name in sets]
        for label, figures in PUBLISHED.items()
    }


def _in_order(summaries: list[dict[str, Any]]) -> list[str]:
    return sorted(
        {s["set"] for s in summaries}, key=lambda name: (name not in PAPER_NAMES, [*PAPER_NAMES, name].index(name))
    )


def grid(summaries: list[dict[str, Any]]) -> tuple[list[str], dict[str, list[str]]]:
    """As in the paper: titles of the sets; label -> pass@1 in percent, with half the width of its 95% interval."""
    sets = _in_order(summaries)
    titles = []
    for name in sets:
        counts = sorted({s["num_samples"] for s in summaries if s["set"] == name})
        of = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        titles.append(PAPER_NAMES.get(name, name) + (f" (average of {of})" if counts[-1] > 1 else ""))
    rows = {}
    for label in dict.fromkeys(s["label"] for s in summaries):
        cells = []
        for name in sets:
            result = next((s for s in summaries if (s["label"], s["set"]) == (label, name)), None)
            if result is None:
                cells.append("")
                continue
            low, high = result["interval"]
            cells.append(f"{100 * result['pass_at_1']:.1f} ± {50 * (high - low):.1f}")
        rows[label] = cells
    return titles, rows


def compare(before: Path, after: Path) -> list[dict[str, Any]]:
    """Paired by question: one row a set that both folders have (`evaluate/<label>` or one of its sets).

    Raises:
        ValueError: a folder without responses, or runs that share no question.
    """
    first, second = _by_set(before), _by_set(after)
    if len(first) == len(second) == 1:  # two single sets are compared whatever they are called
        second = dict(zip(first, second.values(), strict=True))
    rows = []
    for name in [name for name in first if name in second]:
        one, other = first[name], second[name]
        shared = [identity for identity in one if identity in other]
        if len(shared) < 2:
            continue
        result = stats.paired_difference([one[i] for i in shared], [other[i] for i in shared])
        accuracy = [sum(sum(run[i]) / len(run[i]) for i in shared) / len(shared) for run in (one, other)]
        left_out = len(one) + len(other) - 2 * len(shared)
        rows.append(
            {
                "set": name,
                "num_questions": len(shared),
                "left_out": left_out,
                "accuracy": accuracy,
                "result": result,
            }
        )
    if not rows:
        raise ValueError(f"{before} and {after} have no set with the same questions")
    return rows


def describe(rows: list[dict[str, Any]]) -> str:
    """The comparison as lines for a terminal."""
    lines = []
    for row in rows:
        result, (one, other) = row["result"], row["accuracy"]
        lines.append(
            f"{row['set']}: {100 * one:.1f}% -> {100 * other:.1f}%, difference {100 * result.difference:+.1f} points "
            f"(95%: {100 * result.low:+.1f} to {100 * result.high:+.1f}), p = {result.p_value:.2g} ({result.test}), "
            f"{row['num_questions']} shared questions"
            + (f", {row['left_out']} of one run alone left out" if row["left_out"] else "")
        )
    return "\n".join(lines)


def _by_set(folder: Path) -> dict[str, dict[str, list[bool]]]:
    """set -> question (its id and answer: another file's may have the same ids) -> verdicts of its samples."""
    paths = [folder / "responses.jsonl"] if (folder / "responses.jsonl").exists() else []
    paths = paths or sorted(folder.glob("*/responses.jsonl"))
    if not paths:
        raise ValueError(f"{folder} has no responses.jsonl: give run_dir/evaluate/LABEL, or one of its sets")
    return {path.parent.name: dict(_verdicts(path)) for path in paths}


def _verdicts(path: Path) -> Iterator[tuple[str, list[bool]]]:
    correct: dict[str, list[bool]] = {}
    for row in iter_jsonl(path, _Response):
        correct.setdefault(f"{row['id']}: {row['gold']}", []).append(row["reward"]["correct"])
    yield from correct.items()
