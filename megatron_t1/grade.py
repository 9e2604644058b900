"""`t1 grade IN.jsonl OUT.jsonl`: the reward's grader on its own, for answers from anywhere.

One JSON object a line; `t1 grade --help` (the fields of GradeConfig) says which keys. Nothing is graded before every
line is known to be readable.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from megatron_t1.config import GradeConfig
from megatron_t1.data.prompts import given, gold_of, parse_rows
from megatron_t1.files import atomic_path
from megatron_t1.reward.config import check_mode
from megatron_t1.reward.score import Scorer
from megatron_t1.types import FinishReason, Prompt, Reward, Sample, text_sample


def pair_from_row(row: dict[str, Any]) -> tuple[Prompt, Sample]:
    """The prompt and sample that a line of the input describes.

    Raises:
        ValueError: a key is missing or has a value that is not known.
    """
    names = {"id": "id", "gold": "answer", "prediction": "response"}  # in evaluations and question files
    row = {**{name: row[other] for name, other in names.items() if other in row}, **row}
    missing = [name if name == other else f"{name} (or {other})" for name, other in names.items() if name not in row]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    if type(row["id"]) not in (str, int):
        raise ValueError(f"id={row['id']!r:.60} must be text or a whole number")
    for key in ("prediction", "question"):
        if isinstance(row.get(key), (list, dict, bool)):
            raise ValueError(f"{key}={str(row[key])[:60]} must be text or a number")
    gold = gold_of(row["gold"], "gold")
    choices = row.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"choices={choices!r:.60} must be a list of option texts")
    mode, finish_reason = check_mode(given(row, "mode", "response")), given(row, "finish_reason", "stop")
    if finish_reason not in get_args(FinishReason):
        raise ValueError(f"finish_reason={finish_reason!r} is none of {', '.join(get_args(FinishReason))}")
    prompt = Prompt(
        id=str(row["id"]),
        text=str(row.get("question") or ""),
        token_ids=np.zeros(0, np.int64),
        gold=gold,
        mode=mode,
        choices=tuple(choices),
    )
    return prompt, text_sample("" if row["prediction"] is None else str(row["prediction"]), finish_reason)


@dataclass(frozen=True)
class Row:
    """A line of the input."""

    id: Any
    prompt: Prompt
    sample: Sample
    label: bool | None
    """The user's own verdict."""
    kind: str


def _label(row: dict[str, Any], key: str | None) -> bool | None:
    if key is None:
        return None
    if not isinstance(row.get(key), bool):
        raise ValueError(f"{key}={row.get(key)!r} must be true or false: it is the key that `labels` names")
    return bool(row[key])


def _read(path: Path, labels: str | None) -> list[Row]:
    def parse(row: dict[str, Any], number: int) -> Row:
        prompt, sample = pair_from_row(row)
        return Row(row.get("id"), prompt, sample, _label(row, labels), str(row.get("kind", "all")))

    return parse_rows(path, parse, halves=True)


class Agreement:
    """The grader's verdicts against the user's own, by kind."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._disagreed: list[str] = []

    def add(self, row: Row, correct: bool) -> None:
        """One verdict; nothing for a row without a label."""
        if row.label is None:
            return
        found = "agreed" if correct == row.label else "false positive" if correct else "false negative"
        for kind in {row.kind, "all"}:
            self._counts[kind][found] += 1
        if found != "agreed":
            self._disagreed.append(f"{found}: {row.id} ({row.kind})")

    def table(self) -> str:
        """A line a kind, the worst first, all at the end; then every disagreement."""
        lines = ["| kind | answers | accuracy | false positives | false negatives |", "|---|---|---|---|---|"]
        for kind, counts in sorted(
            self._counts.items(), key=lambda pair: (pair[0] == "all", _accuracy(pair[1]), pair[0])
        ):
            wrong = f"{counts['false positive']} | {counts['false negative']}"
            lines.append(f"| {kind} | {counts.total()} | {_accuracy(counts):.1%} | {wrong} |")
        return "\n".join([*lines, *self._disagreed])


def _accuracy(counts: Counter[str]) -> float:
    return counts["agreed"] / counts.total()


def as_row(identifier: Any, reward: Reward) -> dict[str, Any]:
    """A line of the output."""
    return {
        "id": identifier,
        "correct": reward.correct,
        "reward": reward.value,
        "outcome": reward.outcome,
        "extracted": reward.extracted,
        "reason": reward.reason,
        "penalties": reward.penalties,
        "seconds": round(reward.seconds, 4),
    }


def grade(cfg: GradeConfig) -> None:
    """Grade a file with a progress bar, and print how many ended how.

    An earlier output stays until all is graded; but a link or a pipe is written to as the answers come.

    Raises:
        ValueError: a line of the input is not readable; the message names it.
    """
    rows = _read(Path(cfg.input), cfg.labels)
    outcomes: Counter[str] = Counter()
    agreement = Agreement()
    output = Path(cfg.output)
    # A pipe, or a link as /dev/stdout is, stays what it is.
    in_place = output.is_symlink() or (output.exists() and not output.is_file())
    with (
        Scorer(cfg.reward, explain=cfg.explain) as scorer,
        nullcontext(output) if in_place else atomic_path(output) as path,
        path.open("w", encoding="utf-8", errors="backslashreplace") as out,
    ):
        rewards = scorer.score_iter((row.prompt, row.sample) for row in rows)
        for row, reward in zip(rows, tqdm(rewards, total=len(rows), unit="answer"), strict=True):
            out.write(json.dumps(as_row(row.id, reward), ensure_ascii=False) + "\n")
            outcomes[reward.outcome] += 1
            agreement.add(row, reward.correct)
    print(f"{len(rows)} answers: " + ", ".join(f"{count} {name}" for name, count in outcomes.most_common()))
    if cfg.labels is not None:
        print(agreement.table())
