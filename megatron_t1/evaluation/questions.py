"""Which questions a job asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_t1.config import Config
from megatron_t1.data.config import set_name
from megatron_t1.data.prompts import Question
from megatron_t1.data.sets import load_set
from megatron_t1.reward.answers import extract
from megatron_t1.reward.answers.choices import gold_letter
from megatron_t1.reward.answers.numbers import answer_key
from megatron_t1.types import Prompt
from megatron_t1.warn import warn


def question_sets(cfg: Config, named: Sequence[str]) -> dict[str, list[Question]]:
    """The questions of the sets and files in `named` (empty names count as none) or of `data.heldout`, by set name.

    Says which of them nobody can answer right.

    Raises:
        ValueError: as `load_set` does, or there is neither, or two would have the same name.
    """
    names = [name for name in named if name] or [str(cfg.data.need("heldout"))]
    if twice := [name for name, count in Counter(map(set_name, names)).items() if count > 1]:
        raise ValueError(f"several of {names} would be called {', '.join(twice)}: give the files other names")
    sets_dir = Path(cfg.evaluate.sets_dir) if cfg.evaluate.sets_dir else None
    sets = {
        set_name(name): load_set(
            name,
            sets_dir=sets_dir,
            seed=cfg.seed,
            instruction=cfg.evaluate.instruction,
            system_prompt=cfg.data.system_prompt,
        )
        for name in names
    }
    for name, questions in sets.items():
        if told := unanswerable(f"set {name}", questions):
            warn(told)
    return sets


def unanswerable(where: str, questions: Sequence[Question | Prompt]) -> str | None:
    """What is to be said of those that nobody can answer right."""
    if not (lost := [question for question in questions if not _has_answer(question)]):
        return None
    told = ", ".join(f"{question.id} ({question.gold:.40})" for question in lost[:5])
    return (
        f"{where}: no response to {len(lost)} of its {len(questions)} questions can be right, whose answers are cut "
        f"off, too long or none of the options: {told}; mend or remove them"
    )


def _has_answer(question: Question | Prompt) -> bool:
    """Whether the gold, given as an answer, is read as what it is."""
    if question.mode == "mc":
        letter, choices = gold_letter(question.gold, question.choices), question.choices
        return letter is not None and (not choices or ord(letter) - ord("A") < len(choices))
    if question.mode != "response":
        return True
    gold = extract.last_box(question.gold) if extract.BOX.search(question.gold) else question.gold
    answer, _ = extract.response_answer(f"\\boxed{{{gold}}}")
    if not gold or not answer or len(answer) > extract.MAX_ANSWER_CHARS:
        return False
    return answer_key(answer) == answer_key(gold)
