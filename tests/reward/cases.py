"""The shipped grader cases as (Prompt, Sample) pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_t1.grade import pair_from_row
from megatron_t1.types import Prompt, Sample

DATA = Path(__file__).parents[1] / "data" / "grader"


def rows(name: str) -> list[dict[str, Any]]:
    """Lines of a data file, generated predictions written out."""
    found = [json.loads(line) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]
    for row in found:
        if generator := row.get("gen"):
            row["prediction"] = generator["pre"] + generator["rep"] * generator["n"] + generator["post"]
    return found


def pair(gold: str, prediction: str, mode: str = "response", **more: Any) -> tuple[Prompt, Sample]:
    """One case."""
    return pair_from_row({"id": "case", "gold": gold, "prediction": prediction, "mode": mode, **more})
