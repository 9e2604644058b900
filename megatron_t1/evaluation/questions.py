"""Which questions a job asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_t1.config import Config
from megatron_t1.data.config import set_name
from megatron_t1.data.prompts import Question
from megatron_t1.data.sets import load_set


def question_sets(cfg: Config, named: Sequence[str]) -> dict[str, list[Question]]:
    """The questions of the sets and files in `named` (empty names count as none) or of `data.heldout`, by set name.

    Raises:
        ValueError: as `load_set` does, or there is neither, or two would have the same name.
    """
    names = [name for name in named if name] or [str(cfg.data.need("heldout"))]
    if twice := [name for name, count in Counter(map(set_name, names)).items() if count > 1]:
        raise ValueError(f"several of {names} would be called {', '.join(twice)}: give the files other names")
    sets_dir = Path(cfg.evaluate.sets_dir) if cfg.evaluate.sets_dir else None
    return {
        set_name(name): load_set(
            name,
            sets_dir=sets_dir,
            seed=cfg.seed,
            instruction=cfg.evaluate.instruction,
            system_prompt=cfg.data.system_prompt,
        )
        for name in names
    }
