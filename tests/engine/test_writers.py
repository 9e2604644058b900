"""The processes that write a checkpoint: beside the training, never longer than their trainer, and missed when lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_t1.convert import to_hf
from tests.forks import WORKERS, Forks


def until(what: str, found: Callable[[], object], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_a_trainer_killed_in_a_save_takes_its_writers_with_it(forks: Forks, tiny_dir: Path, tmp_path: Path) -> None:
    (trainer,) = forks.start(WORKERS / "saving_worker.py", tiny_dir, tmp_path, "sleep", stderr=tmp_path / "errors")
    process = psutil.Process(trainer.pid)
    # Two writers, whatever else: Python's keeper of semaphores, for one.
    until("the writers", lambda: trainer.poll() is not None or len(process.children(recursive=True)) >= 2)
    assert trainer.poll() is None, (tmp_path / "errors").read_text()
    time.sleep(0.5)  # a writer is a fork: it says that it will die a moment later
    started = process.children(recursive=True)
    trainer.send_signal(signal.SIGKILL)
    until("the trainer's end", lambda: trainer.poll() is not None)
    until(f"the end of {started}", lambda: not alive(started), timeout_s=10.0)


def test_a_step_taken_meanwhile_is_not_in_the_checkpoint_which_a_full_disk_leaves(
    forks: Forks, tiny_dir: Path, tmp_path: Path
) -> None:
    done = forks.run(WORKERS / "saving_worker.py", tiny_dir, tmp_path, "step", num_ranks=1, timeout_s=200)
    assert done.returncode == 0, done.stderr[-3000:]
    # Nor is it lost for want of the model's folder, or because an older one stays.
    last = tmp_path / "step_00000003"
    assert f"{last} has its weights and lacks config or tokenizer" in done.stderr
    assert f"t1 convert to-hf {last} OUT --hf FOLDER" in done.stderr
    assert f"{last} is written, but an older checkpoint beside it could not be moved away: Stale" in done.stderr
    to_hf(last, tmp_path / "hf", hf_dir=tiny_dir)


def test_a_writer_that_is_lost_is_said(forks: Forks, tiny_dir: Path, tmp_path: Path) -> None:
    done = forks.run(WORKERS / "saving_worker.py", tiny_dir, tmp_path, "die", num_ranks=1, timeout_s=200)
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert "a writer ended with exit code -9" in done.stderr, done.stderr[-3000:]
    assert not list(tmp_path.iterdir())
