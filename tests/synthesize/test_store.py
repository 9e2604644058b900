"""The store of replies where it can't be opened or written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_t1.synthesize.store import Store
from tests.forks import environment


def test_a_store_that_cannot_be_used_names_itself_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with (
        Store(path),
        pytest.raises(ValueError, match=r"store.sqlite is used by another .*: wait for it, or name another out"),
    ):
        Store(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder: unable to open database file"):
        Store(tmp_path / "folder")
    for damaged in (b"no database " * 999, path.read_bytes()[:5000]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"store.sqlite: .*damaged: move it away, and all is asked again"):
            Store(path)


def test_a_full_disk_is_said_and_keeps_what_came(tmp_path: Path) -> None:
    """A limit of the size of files in place of the disk's."""
    program = (
        "import resource, signal, sys; from pathlib import Path; from megatron_t1.synthesize.store import Store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, -1))\n"
        "with Store(Path(sys.argv[1])) as store:\n"
        "    for number in range(9999):\n"
        "        store.put(b'%d' % number, {'text': 'x' * 500}); print(number, flush=True)\n"
    )
    path = tmp_path / "store.sqlite"
    ended = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, env=environment())
    assert f"OSError: {path}: " in ended.stderr
    assert "what came is kept: the same command goes on" in ended.stderr
    last = int(ended.stdout.split()[-1])
    with Store(path) as store:
        assert store.get(b"%d" % last) == {"text": "x" * 500}
