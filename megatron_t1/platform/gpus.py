"""Whether there are GPUs, without taking broken ones for none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

_GIVEN_BY_SLURM = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")
_DRIVER = Path("/dev/nvidiactl")


def usable() -> bool:
    """Whether torch can use a GPU. With a torch for the CPU, or CUDA_VISIBLE_DEVICES set to nothing, False is intended.

    Raises:
        ValueError: there are GPUs and torch was built for them, but can't use them.
    """
    if torch.cuda.is_available():
        return True
    if torch.version.cuda is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    signs = [f"{name}={os.environ[name]}" for name in _GIVEN_BY_SLURM if os.environ.get(name)]
    signs += [f"{_DRIVER} exists"] * _DRIVER.exists()
    if not signs:
        return False
    try:
        torch.cuda.init()
        reason = "none is visible to it; was the job given GPUs (sbatch --gres)?"
    except (RuntimeError, AssertionError) as error:
        reason = str(error)
    raise ValueError(
        f"this host has GPUs ({', '.join(signs)}) that torch {torch.__version__} can't use: {reason} "
        f"Its CUDA {torch.version.cuda} needs a driver as new; to run on the CPU, set CUDA_VISIBLE_DEVICES to nothing"
    )


def known(names: Iterable[str]) -> str | None:
    """Which of `names` ("H100") this host's first GPU is called by, or None."""
    called = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return next((name for name in names if name in called), None)


def of_trainer() -> int:
    """How many GPUs of this host its trainer ranks use: the first ones, one each."""
    return min(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def index_of(local_rank: int) -> int:
    """The GPU of this host's rank number `local_rank`. Sites that bind one GPU to each task show every rank only its
    own, as number 0.

    Raises:
        ValueError: there is none for it.
    """
    count = torch.cuda.device_count()
    if count == 1:
        return 0
    if local_rank >= count:
        raise ValueError(
            f"rank {local_rank} of this host (LOCAL_RANK) has no GPU of its own: {count} are visible; start as many "
            "ranks a node, or show every rank exactly one"
        )
    return local_rank
