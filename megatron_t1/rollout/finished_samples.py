"""Finished samples of the last steps, on the disk: a trainer that died need not ask again, and a step can be replayed.

A line is the graded samples of one request. It is found again only for the same weights, prompt, seed, sampling and
grading: the key is a digest of all of them, and the weights enter by the digest of their numbers, not by their version.
So a run that resumes bit-equal finds its steps here, and one that resumes with other rounding asks anew. Samples of a
request that was not finished are lost.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from megatron_t1.files import append_jsonl, iter_jsonl, read_jsonl
from megatron_t1.types import FinishReason, Reward, Sample

_STEP = re.compile(r"^step_(\d{8})\.jsonl$")


class _Sample(TypedDict):
    token_ids: str
    logprobs: str
    text: str
    finish_reason: FinishReason
    weight_versions: list[tuple[int, int, int]]
    server: str
    reward: Reward | None


class _Row(TypedDict):
    key: str
    samples: list[_Sample]


class _Weights(TypedDict):
    weights: NotRequired[str]


class Bank:
    """The samples of a run's last steps: a file a step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self, step: int, weights: str, *same: Any) -> StepBank:
        """The samples of one step.

        Args:
            weights: digest of the numbers that the servers held when the step was asked.
            same: JSON values, what else has to be the same for a sample to be used again.
        """
        return StepBank(self._path(step), weights, json.dumps([step, weights, *same], sort_keys=True))

    def weights_of(self, step: int) -> str | None:
        """Digest of the weights of which a step was asked last; None when nothing of it is here."""
        weights = None
        for row in iter_jsonl(self._path(step), _Weights):
            weights = row.get("weights")
        return weights

    def drop_from(self, step: int) -> None:
        """Forget the samples of `step` and of later ones: they must not be used again."""
        self._drop(lambda other: other >= step)

    def drop_before(self, step: int) -> None:
        """Forget the samples of steps below `step`: a checkpoint holds what was learned from them."""
        self._drop(lambda other: other < step)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.jsonl"

    def steps(self) -> list[int]:
        """Those of which samples are here, in order."""
        return sorted(int(match[1]) for path in self.folder.glob("step_*") if (match := _STEP.match(path.name)))

    def _drop(self, which: Callable[[int], bool]) -> None:
        for step in filter(which, self.steps()):
            self._path(step).unlink()


class StepBank:
    """The finished requests of one step. `add` may be called from several threads."""

    def __init__(self, path: Path, weights: str, same: str) -> None:
        self._path, self._weights, self._same = path, weights, same
        self._lock = threading.Lock()
        self.num_tokens_added = 0
        """Of responses, by this object."""
        self._rows = {row["key"]: row for row in read_jsonl(path, _Row)}

    def find(self, token_ids: Sequence[int], seed: int, count: int) -> list[Sample] | None:
        """The `count` samples from seed `seed` on, or None when they were not finished.

        Raises:
            ValueError: they are there and damaged; it names the file.
        """
        row = self._rows.get(self._key(token_ids, seed, count))
        if row is None:
            return None
        try:
            if len(row["samples"]) != count:
                raise ValueError(f"{len(row['samples'])} of {count}")
            return [_sample(fields) for fields in row["samples"]]
        except ValueError as error:
            raise ValueError(
                f"{self._path} holds damaged samples ({error}): remove it, and they are asked for again"
            ) from None

    def add(self, prompt_id: str, token_ids: Sequence[int], seed: int, samples: list[Sample]) -> None:
        """Brings the samples to the disk before it returns."""
        key = self._key(token_ids, seed, len(samples))
        row = {
            "key": key,
            "weights": self._weights,
            "prompt": prompt_id,
            "seed": seed,
            "samples": [_fields(sample) for sample in samples],
        }
        with self._lock:
            append_jsonl(self._path, [row])
            self.num_tokens_added += sum(len(sample.token_ids) for sample in samples)

    def _key(self, token_ids: Sequence[int], seed: int, count: int) -> str:
        what = json.dumps([self._same, list(token_ids), seed, count])
        return hashlib.blake2b(what.encode(), digest_size=16).hexdigest()


def _fields(sample: Sample) -> dict[str, Any]:
    return {
        "token_ids": base64.b64encode(sample.token_ids.astype("<i8").tobytes()).decode(),
        "logprobs": base64.b64encode(sample.logprobs.astype("<f4").tobytes()).decode(),
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "weight_versions": sample.weight_versions,
        "server": sample.server,
        "reward": asdict(sample.reward) if sample.reward else None,
    }


def _sample(fields: dict[str, Any]) -> Sample:
    try:
        token_ids = np.frombuffer(base64.b64decode(fields["token_ids"], validate=True), "<i8").astype(np.int64)
        logprobs = np.frombuffer(base64.b64decode(fields["logprobs"], validate=True), "<f4").astype(np.float32)
    except ValueError as error:
        raise ValueError(f"token ids or logprobs are no numbers: {error}") from None
    if not 0 < len(token_ids) == len(logprobs) or token_ids.min() < 0 or not np.isfinite(logprobs).all():
        raise ValueError(f"{len(token_ids)} token ids and {len(logprobs)} logprobs, or one that can't be")
    return Sample(
        token_ids=token_ids,
        logprobs=logprobs,
        text=fields["text"],
        finish_reason=fields["finish_reason"],
        weight_versions=tuple(tuple(span) for span in fields["weight_versions"]),
        server=fields["server"],
        reward=Reward(**fields["reward"]) if fields["reward"] else None,
    )
