"""What evaluation and scaling share: settings that must agree on resume, and rows written down as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_t1.files import Journal, write_json


def open_folder(folder: Path, settings: dict[str, Any], *, resume: bool, replace_other: bool) -> None:
    """Make `folder` ready for results of `settings`: what it holds of the same settings stays when `resume` is given.

    Args:
        settings: all that decides the results, as JSON values; kept as settings.json.
        replace_other: remove results of other settings; otherwise they are an error.

    Raises:
        ValueError: the folder holds other results, or these and `resume` is not given.
    """
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if path.exists():
        stored = json.loads(path.read_text())
        different = sorted(name for name in stored.keys() | settings.keys() if stored.get(name) != settings.get(name))
        if different and not replace_other:
            raise ValueError(
                f"{folder} holds results with other {', '.join(different)}: give another --label, or remove it"
            )
        if not different and not (resume or replace_other):
            raise ValueError(f"{folder} holds these results: --resume completes them, another --label starts anew")
        if different or not resume:
            for file in [*folder.glob("*.jsonl"), *folder.glob("*.json")]:
                file.unlink()
    write_json(path, settings)


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
