"""`t1 grade IN.jsonl OUT.jsonl`: the reward's grader on its own, for answers from anywhere.

One JSON object a line; `t1 grade --help` (the fields of GradeConfig) says which keys. Nothing is graded before every
line is known to be readable.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from megatron_t1.config import GradeConfig
from megatron_t1.data.prompts import gold_of, parse_rows
from megatron_t1.reward.score import Scorer
from megatron_t1.types import AnswerMode, Prompt, Reward, Sample, text_sample


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
    mode, finish_reason = row.get("mode", "response"), row.get("finish_reason", "stop")
    if mode not in get_args(AnswerMode):
        raise ValueError(f"mode={mode!r} is not one of {', '.join(get_args(AnswerMode))}")
    if finish_reason not in ("stop", "length"):
        raise ValueError(f"finish_reason={finish_reason!r} is neither stop nor length")
    prompt = Prompt(
        id=str(row["id"]),
        text=str(row.get("question") or ""),
        token_ids=np.zeros(0, np.int64),
        gold=gold,
        mode=mode,
        choices=tuple(choices),
    )
    return prompt, text_sample("" if row["prediction"] is None else str(row["prediction"]), finish_reason)


def _read(path: Path) -> list[tuple[Any, Prompt, Sample]]:
    return parse_rows(path, lambda row, number: (row.get("id"), *pair_from_row(row)), halves=True)


def as_row(identifier: Any, reward: Reward) -> dict[str, Any]:
    """A line of the output."""
    return {
        "id": identifier,
        "correct": reward.correct,
        "outcome": reward.outcome,
        "extracted": reward.extracted,
        "reason": reward.reason,
        "penalties": reward.penalties,
        "seconds": round(reward.seconds, 4),
    }


def grade(cfg: GradeConfig) -> None:
    """Grade a file with a progress bar, and print how many ended how.

    Raises:
        ValueError: a line of the input is not readable; the message names it.
    """
    rows = _read(Path(cfg.input))
    outcomes: Counter[str] = Counter()
    with Scorer(cfg.reward) as scorer, Path(cfg.output).open("w", encoding="utf-8", errors="backslashreplace") as out:
        rewards = scorer.score_iter((prompt, sample) for _, prompt, sample in rows)
        for (identifier, _, _), reward in zip(rows, tqdm(rewards, total=len(rows), unit="answer"), strict=True):
            out.write(json.dumps(as_row(identifier, reward), ensure_ascii=False) + "\n")
            outcomes[reward.outcome] += 1
    print(f"{len(rows)} answers: " + ", ".join(f"{count} {name}" for name, count in outcomes.most_common()))
