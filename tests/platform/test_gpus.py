"""Which GPU a rank takes, and GPUs that torch can't use: an error, never a run on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_t1.platform import gpus
from megatron_t1.platform.detect import setup
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.servers import Servers


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A torch for CUDA that finds no GPU, on a host without any."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpus, "_DRIVER", tmp_path / "nvidiactl")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old.")

    monkeypatch.setattr(torch.cuda, "init", init)
    return monkeypatch


def test_no_gpus_are_a_cpu(host: pytest.MonkeyPatch) -> None:
    assert not gpus.usable()


def test_broken_gpus_are_an_error(host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    said = r"this host has GPUs \(.*nvidiactl exists\) that torch .* can't use: The NVIDIA driver .* is too old"
    with pytest.raises(ValueError, match=said):
        gpus.usable()
    setup.cache_clear()
    with pytest.raises(ValueError, match=said):
        setup()
    with pytest.raises(ValueError, match=said):
        Servers(RolloutConfig(), tmp_path, tmp_path)


def test_gpus_that_slurm_gave_but_torch_does_not_see_are_an_error(host: pytest.MonkeyPatch) -> None:
    host.setenv("SLURM_GPUS_ON_NODE", "8")
    host.setattr(torch.cuda, "init", lambda: None)
    with pytest.raises(ValueError, match=r"SLURM_GPUS_ON_NODE=8.* none is visible to it"):
        gpus.usable()


@pytest.mark.parametrize("intended", ["hidden", "torch for the CPU"])
def test_a_cpu_run_beside_gpus_can_be_meant(host: pytest.MonkeyPatch, tmp_path: Path, intended: str) -> None:
    (tmp_path / "nvidiactl").touch()
    if intended == "hidden":
        host.setenv("CUDA_VISIBLE_DEVICES", "")
    else:
        host.setattr(torch.version, "cuda", None)
    assert not gpus.usable()


@pytest.mark.parametrize(("count", "local_rank", "index"), [(8, 0, 0), (8, 7, 7), (1, 0, 0), (1, 7, 0)])
def test_a_rank_takes_its_own_gpu(monkeypatch: Any, count: int, local_rank: int, index: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert gpus.index_of(local_rank) == index


def test_a_rank_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"rank 5 of this host .* 4 are visible"):
        gpus.index_of(5)
