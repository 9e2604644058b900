"""A push that a host's workers share: fetched once, whoever is killed meanwhile, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_t1.push.shm import HostCopy

SIZE = 1 << 16
spawn = multiprocessing.get_context("fork")


@pytest.fixture
def name() -> Iterator[str]:
    name = secrets.token_hex(16)
    yield name
    assert not Path(f"/dev/shm/t1-weights-{name}").exists(), "somebody left it behind"


def work(name: str, push: str, fetched: Path, value: int, seen, *, forever: bool = False) -> None:
    """One worker's part of a push; with `forever` it hangs in its fetch."""
    copy = HostCopy(name, SIZE)

    def fetch(buffer: torch.Tensor) -> None:
        with fetched.open("a") as file:
            file.write(f"{os.getpid()}\n")
        buffer[: SIZE // 2] = value
        while forever:
            time.sleep(1)
        time.sleep(0.05)  # the others come meanwhile
        buffer.fill_(value)

    copy.fill(push, fetch)
    seen.put(int(copy.buffer.sum(dtype=torch.int64)))
    copy.close()


def test_one_worker_fetches_and_all_have_it(name: str, tmp_path: Path) -> None:
    for number, push in enumerate(("first", "second"), start=1):
        seen, fetched = spawn.Queue(), tmp_path / push
        workers = [spawn.Process(target=work, args=(name, push, fetched, number, seen)) for _ in range(6)]
        kept = HostCopy(name, SIZE)  # stays between the two pushes, as a server does
        for worker in workers:
            worker.start()
        assert [seen.get(timeout=60) for _ in workers] == [number * SIZE] * 6
        for worker in workers:
            worker.join()
        assert len(fetched.read_text().splitlines()) == 1
        assert kept.buffer.unique().tolist() == [number]
        kept.close()


def test_what_a_killed_worker_left_half_done_is_fetched_anew(name: str, tmp_path: Path) -> None:
    seen, fetched = spawn.Queue(), tmp_path / "fetched"
    hangs = spawn.Process(target=work, args=(name, "push", fetched, 1, seen), kwargs={"forever": True})
    hangs.start()
    while not fetched.exists():
        time.sleep(0.01)
    waits = spawn.Process(target=work, args=(name, "push", fetched, 2, seen))
    waits.start()
    assert hangs.pid is not None
    os.kill(hangs.pid, signal.SIGKILL)
    assert seen.get(timeout=60) == 2 * SIZE
    waits.join()
    hangs.join()


def test_a_fetch_that_fails_leaves_nothing_that_looks_done(name: str) -> None:
    copy = HostCopy(name, SIZE)

    def fails(buffer: torch.Tensor) -> None:
        raise ConnectionError("trainer rank 0")

    copy.fill("old", lambda buffer: buffer.fill_(1))
    with pytest.raises(ConnectionError):
        copy.fill("new", fails)
    copy.fill("old", lambda buffer: buffer.fill_(3))
    assert copy.buffer.unique().tolist() == [3], "it may hold a part of the new one"
    copy.close()


def test_files_that_nobody_has_are_removed_by_the_next(name: str) -> None:
    left = Path(f"/dev/shm/t1-weights-{secrets.token_hex(16)}")
    left.write_bytes(bytes(64))
    left.chmod(0o600)
    used = HostCopy(name, SIZE)
    assert not left.exists()
    other = HostCopy(secrets.token_hex(16), SIZE)
    assert used.path.exists(), "it is in use"
    other.close()
    used.close()


def test_no_room_and_no_name_are_refused_and_leave_nothing(name: str) -> None:
    with pytest.raises(OSError, match="No space"):
        HostCopy(name, 1 << 60)
    for bad in ("", "../../etc/passwd", "a/b" * 8):
        with pytest.raises(ValueError, match="no name"):
            HostCopy(bad, SIZE)
    link = Path(f"/dev/shm/t1-weights-{name}")
    link.symlink_to("/tmp/elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        HostCopy(name, SIZE)
    link.unlink()
