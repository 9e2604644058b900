"""Writing a checkpoint beside the training.

`begin` copies what the GPUs hold and forks the writers; `Saving.finish`, steps later, makes the folder a checkpoint.
What a run does in between is lost with it: it resumes from the checkpoint before.
"""

from __future__ import annotations

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_t1.engine import checkpoint
from megatron_t1.engine.anchor import Anchor
from megatron_t1.engine.config import CheckpointConfig
from megatron_t1.engine.parallel import from_main, is_main
from megatron_t1.engine.step import Engine
from megatron_t1.engine.writers import Writers, digest, results_in_this_process
from megatron_t1.files import sync_folder, write_json
from megatron_t1.warn import warn
from megatron_t1.weights.hf_folder import copied_beside

_REMOVER = ThreadPoolExecutor(1, thread_name_prefix="old checkpoints")
"""Hundreds of gigabytes take a file system a while, and the training need not wait for it. The process's end does."""


def begin(
    folder: Path,
    step: int,
    engine: Engine,
    anchor: Anchor | None,
    state: dict[str, Any],
    cfg: CheckpointConfig,
    *,
    score: float,
) -> Saving:
    """Collective. Begins to write `folder/step_<step>`; no other save may be under way.

    Args:
        score: how good this one is, for `keep_best`; higher is better.

    Raises:
        OSError: the disk is too full for it: not a byte is written.
    """
    building = folder / f"step_{step:08d}.tmp"
    needed = num_bytes(engine, anchor)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        _REMOVER.submit(lambda: None).result()  # what it still has to remove counts as free below
        for stale in folder.glob("*.tmp"):
            _remove(stale)
        building.mkdir(exist_ok=True)
    free = from_main(shutil.disk_usage(folder).free if is_main() else None)
    if free < needed:
        if is_main():
            _remove(building)
        raise OSError(
            f"a checkpoint needs about {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; free some "
            f"space or lower checkpoint.keep (now {cfg.keep})"
        )
    results_in_this_process()
    tensors = checkpoint.sharded_state(engine, anchor, is_loading=False)
    apply_factories(tensors)
    for entry in nested_values(tensors):
        if isinstance(entry, ShardedTensor):
            entry.data = _uncut(entry.data)
    request = dist_checkpointing.save(tensors, str(building), async_sharded_save=True)
    assert request is not None
    kept = {
        "experts_apart": engine.parallel.expert > 1,
        "distributed_optimizer": engine.parallel.distributed_optimizer,
        "anchor": anchor is not None,
    }
    contents = {**state, "step": step, "score": score, **kept}
    return Saving(building, request, contents, cfg, model=Path(engine.model_config.hf_path))


def _uncut(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own: of a view into a larger one (a weight in DDP's buffer) Megatron takes a
    copy, lest the whole be pickled, which held the training up for longer than all else here."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor
    as_bytes = tensor.detach().flatten().view(torch.uint8).numpy()  # numpy has no bfloat16
    return torch.from_numpy(as_bytes).view(tensor.dtype).view(tensor.shape)


class Saving:
    """A checkpoint that is being written."""

    def __init__(
        self, building: Path, request: AsyncRequest, contents: dict[str, Any], cfg: CheckpointConfig, *, model: Path
    ) -> None:
        """In the main thread."""
        self._building, self._request, self._contents, self._cfg, self._model = building, request, contents, cfg, model
        self._writers = Writers(request)

    def is_written(self) -> bool:
        """Collective. Whether `finish` would wait for no rank's writers."""
        done: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(done, self._writers.done)
        return all(done)

    def finish(self) -> Path:
        """Collective. Waits for the writers; drops all but the newest and best.

        Raises:
            OSError: writing failed.
        """
        final = self._building.with_suffix("")
        self._writers.wait()
        try:
            for finalize in self._request.finalize_fns:
                finalize()
            digests = checkpoint.merged(self._writers.digests)
            failure = from_main(self._named(final, digests) if is_main() else None)
            if failure:
                raise OSError(failure)
        except CheckpointException as error:  # a BaseException: it would pass by every handler above
            reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise self._failed(final, reasons or "rank 0 says why") from error
        except OSError as error:
            raise self._failed(final, str(error)) from error
        return final

    def _failed(self, final: Path, reasons: str) -> OSError:
        if is_main():
            shutil.rmtree(self._building, ignore_errors=True)
        return OSError(f"checkpoint {final} could not be written ({reasons}); the one before it stays")

    def _named(self, final: Path, digests: dict[str, tuple[int, str]]) -> str | None:
        """Rank 0: makes what was written the checkpoint `final`; returns why it could not."""
        building = self._building
        try:
            written = [path for path in building.iterdir() if not path.name.startswith(".nfs")]  # removed, but open
            digests |= {path.name: digest(path) for path in written if path.name not in digests}
            if lacking := copied_beside(self._model, building):  # config and tokenizer make it a model on its own
                warn(
                    f"{final} has its weights and lacks config or tokenizer, which could not be copied ({lacking}); to "
                    f"use it, name another copy of the model's folder: t1 convert to-hf {final} OUT --hf FOLDER"
                )
            write_json(building / "state.json", {**self._contents, "files": digests})
            sync_folder(building)
            if final.exists():  # a run that resumed from an older checkpoint comes by here again
                os.rename(final, final.with_suffix(".replaced.tmp"))
            os.rename(building, final)
            sync_folder(final.parent)
        except OSError as error:
            return str(error)
        try:
            _rotate(final.parent, final, self._cfg)
        except OSError as error:  # the next one tries again
            warn(f"{final} is written, but an older checkpoint beside it could not be moved away: {error}")
        return None


class Saver:
    """The saves of a run, one at a time. Every method is collective, in the main thread."""

    def __init__(self, folder: Path, cfg: CheckpointConfig) -> None:
        self._folder, self._cfg = folder, cfg
        self._saving: Saving | None = None

    def begin(self, step: int, engine: Engine, anchor: Anchor | None, state: dict[str, Any], *, score: float) -> None:
        """Finishes the save before, and begins the next; raises as both do."""
        self.finish()
        self._saving = begin(self._folder, step, engine, anchor, state, self._cfg, score=score)

    def finish(self, *, wait: bool = True) -> bool:
        """Finishes the save that is under way, if there is one, and without `wait` only if its files are written.
        Returns whether it was finished now."""
        if self._saving is None or not (wait or self._saving.is_written()):
            return False
        saving, self._saving = self._saving, None
        saving.finish()
        return True


def _rotate(folder: Path, newest: Path, cfg: CheckpointConfig) -> None:
    checkpoints = checkpoint.finished(folder, until=checkpoint.step_of(newest))
    scores = {path: checkpoint.state_of(path).get("score", -math.inf) for path in checkpoints}
    by_score = sorted(checkpoints, key=lambda path: (scores[path], path), reverse=True)
    staying = {*checkpoints[-cfg.keep :], *by_score[: cfg.keep_best]}
    for path in checkpoints:
        if path not in staying:
            # Renamed first: what a kill leaves of it must not look finished.
            os.rename(path, path.with_suffix(".tmp"))
            _REMOVER.submit(_remove, path.with_suffix(".tmp"))
    for replaced in folder.glob("*.replaced.tmp"):
        _REMOVER.submit(_remove, replaced)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:  # on NFS somebody has a file of it open; the next save tries again
        warn(f"{folder} could not be removed: {error}")


def num_bytes(engine: Engine, anchor: Anchor | None) -> int:
    """Of the whole checkpoint: weights, float32 master weights and two moments, and the anchor's average."""
    groups = mpu.get_data_parallel_group(with_context_parallel=True), mpu.get_expert_data_parallel_group()
    weights = 0
    for param in (param for chunk in engine.chunks for param in chunk.parameters()):
        # Megatron marks the parameters of experts so: they have other replicas than the rest.
        is_expert = not getattr(param, "allreduce", True)
        weights += param.numel() if groups[is_expert].rank() == 0 else 0
    total = torch.tensor(weights)
    dist.all_reduce(total)
    element_size = engine.config.params_dtype.itemsize
    of_anchor = anchor.average[0].element_size() if anchor else 0
    return int(total) * (element_size + (12 if element_size < 4 else 8) + of_anchor)
