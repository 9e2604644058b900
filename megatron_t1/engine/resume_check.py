"""What decides a training beside the weights it has reached; a run that resumes with other values of it is another run.
The settings themselves are listed by who trains: `learner._settings`, `sft._settings`. Here they are compared.

The order of the data is a function of seed, batch size and the number of lines: with others, what was learned comes
again and other lines never come. The layout is left out: a checkpoint resumes at any.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_t1.engine.config import ModelConfig
from megatron_t1.files import append_jsonl
from megatron_t1.warn import warn
from megatron_t1.weights.folder_digest import weights_digest
from megatron_t1.weights.hf_folder import is_torch_dist


def named(**sections: Any) -> dict[str, Any]:
    """Configs (and plain values) by section, as `section.field` -> JSON value."""
    settings: dict[str, Any] = {}
    for section, value in sections.items():
        if hasattr(value, "__dataclass_fields__"):
            settings |= {f"{section}.{name}": each for name, each in asdict(value).items()}
        else:
            settings[section] = value
    return json.loads(json.dumps(settings))


def data_identity(rows: Iterable[Iterable[Any]]) -> str:
    """How many rows there are, and a digest of them."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(b"\0".join(each if isinstance(each, bytes) else str(each).encode() for each in row) + b"\1")
        count += 1
    return f"{count} lines, digest {digest.hexdigest()[:12]}"


def model_identity(cfg: ModelConfig) -> str:
    """A digest of the weights and config.json; of config.json alone where the weights are a Megatron checkpoint's."""
    folder = Path(cfg.hf_path)
    if is_torch_dist(folder):
        return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:12]
    return weights_digest(folder)[:12]


def changes(stored: dict[str, Any], now: dict[str, Any], *, shared_only: bool = True) -> dict[str, list[Any]]:
    """Setting -> [what was stored, what it is now], where these differ as JSON values; None is not there.

    Args:
        shared_only: what only one of them names is of another release of this package, and no change.
    """
    now = json.loads(json.dumps(now))
    names = sorted(stored.keys() & now.keys() if shared_only else stored.keys() | now.keys())
    return {name: [stored.get(name), now.get(name)] for name in names if stored.get(name) != now.get(name)}


def check_changes(checkpoint: Path, step: int, changed: dict[str, list[Any]], *, allowed: bool) -> None:
    """Says what changed and keeps it in `changes.jsonl` beside the checkpoints' folder.

    Raises:
        ValueError: something did, and that is not allowed.
    """
    if not changed:
        return
    listed = "; ".join(f"{name} = {now!r} (was {before!r})" for name, (before, now) in changed.items())
    if not allowed:
        raise ValueError(
            f"{checkpoint} was made with other settings: {listed}. Take these back, or go on with them by --resume "
            "--resume_with_changes, or name another run_dir"
        )
    warn(f"goes on from {checkpoint} with other settings: {listed}")
    append_jsonl(checkpoint.parent.parent / "changes.jsonl", [{"step": step, "changed": changed}])
