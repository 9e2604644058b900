"""What evaluation, scaling and curation share: settings that must agree on resume, and rows kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from tqdm import tqdm

from megatron_t1 import lock
from megatron_t1.engine.resume_check import changes, data_identity
from megatron_t1.files import Journal, read_json, write_json
from megatron_t1.types import FinishReason, Prompt


class Verdict(TypedDict):
    correct: bool
    outcome: str
    extracted: str | None
    reason: str
    penalties: dict[str, str]


class ResponseRow(TypedDict):
    """A graded response, as evaluation and scaling store it; what else is in the line is for people."""

    id: str
    sample: int
    response: str
    num_tokens: int
    finish_reason: FinishReason
    reward: Verdict


def prompts_identity(prompts: Iterable[Prompt]) -> str:
    """Of what a model is asked, token by token: questions as system prompt, chat template and tokenizer make them."""
    return data_identity((prompt.id, prompt.token_ids.tobytes()) for prompt in prompts)


def check_settings(path: Path, settings: dict[str, Any], *, resume: bool, elsewhere: str) -> bool:
    """Keeps `settings`, all that decides the results beside them, in `path`; returns whether they were there already.

    Args:
        settings: as JSON values.
        resume: results of the same settings may be gone on with.
        elsewhere: the remedy for other results: where else these may go.

    Raises:
        ValueError: results of other settings are there, or of these and `resume` is not given.
    """
    stored = read_json(path, dict[str, Any]) if path.exists() else None
    if stored is None:
        write_json(path, settings)
        return False
    if different := changes(stored, settings, shared_only=False):
        raise ValueError(f"{path.parent} holds results with other {', '.join(different):.500}: give {elsewhere}")
    if not resume:
        raise ValueError(f"{path.parent} holds these results: --resume completes them; or give {elsewhere}")
    return True


def open_folder(folder: Path, settings: dict[str, Any], *, resume: bool, replace_other: bool) -> None:
    """Make `folder` ready for results of `settings`: what it holds of the same settings stays when `resume` is given.

    Args:
        replace_other: remove results of other settings (and of these without `resume`); otherwise they are an error.

    Raises:
        ValueError: as `check_settings`.
    """
    path = folder / "settings.json"
    kept = resume and path.exists() and not changes(read_json(path, dict[str, Any]), settings, shared_only=False)
    if replace_other and path.exists() and not kept:
        for file in [*folder.glob("*.jsonl"), *folder.glob("*.json")]:
            if file.name != lock.FILE:
                file.unlink()
    check_settings(path, settings, resume=resume, elsewhere="another --label, or remove it")


@contextmanager
def collecting(
    path: Path, name: str, *, unit: str, num_kept: int, num_missing: int
) -> Iterator[Callable[[Iterable[dict[str, Any]], int], None]]:
    """`add(rows, num_tokens)` appends rows to `path` and moves a progress bar; Ctrl-C says what is kept."""
    total, tokens = num_kept + num_missing, 0
    with Journal(path) as journal, tqdm(total=total, initial=num_kept, desc=name, unit=f" {unit}") as bar:

        def add(rows: Iterable[dict[str, Any]], num_tokens: int) -> None:
            nonlocal tokens
            rows = list(rows)
            journal.append(rows)
            tokens += num_tokens
            bar.set_postfix_str(f"{tokens / max(1e-9, bar.format_dict['elapsed']):,.0f} tokens/s", refresh=False)
            bar.update(len(rows))

        try:
            yield add
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{bar.n:,} of {total:,} {unit}s are kept in {path}; the same command with --resume asks for the others"
            ) from None
