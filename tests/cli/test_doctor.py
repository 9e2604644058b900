"""`t1 doctor` says what can be used, not what was installed: imports in other processes, a compiler that compiles."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest

from megatron_t1.cli import doctor
from megatron_t1.platform import gpus, te
from tests.forks import ROOT

TE_FILE = ROOT / "requirements" / "te.txt"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import json", None),
        ("import ctypes; ctypes.CDLL('libnothing.so')", "OSError: libnothing.so: cannot open shared object file"),
        ("import os; os.abort()", "its import was ended by signal 6"),
        ("import time; time.sleep(60)", "its import did not end within 1 s"),
    ],
)
def test_an_import_fails_with_its_reason(code: str, reason: str | None) -> None:
    said = doctor.import_failure(code, timeout_s=1.0 if "sleep" in code else 60.0)
    assert said == reason or (reason and said and said.startswith(reason))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Transformer Engine is installed, and both imports work."""
    installed = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: "2.11.0" if name == "transformer-engine" else installed(name))
    monkeypatch.setattr(doctor, "import_failure", lambda code: None)
    return monkeypatch


def row(table: str, name: str) -> str:
    return next(line for line in table.splitlines() if line.split()[1:2] == [name])


def test_all_that_is_there_is_ok(found: pytest.MonkeyPatch) -> None:
    table, complete = doctor.diagnose()
    assert complete, table
    assert row(table, "transformer-engine").startswith("ok       transformer-engine 2.11.0")
    assert table.count("transformer-engine") == 1
    assert "with Python.h" in table


def test_what_does_not_import_is_broken(found: pytest.MonkeyPatch) -> None:
    found.setattr(doctor, "import_failure", lambda code: "ImportError: undefined symbol: _ZN3c10")
    table, complete = doctor.diagnose()
    assert not complete
    for name in ("vllm", "transformer-engine"):
        assert row(table, name).startswith("BROKEN")
        assert "it can't be imported: ImportError: undefined symbol: _ZN3c10" in row(table, name)
    assert "requirements/te.txt" in row(table, "transformer-engine")


def test_a_transformer_engine_that_megatron_was_not_made_for_is_said(found: pytest.MonkeyPatch) -> None:
    found.setattr(doctor, "installed", lambda name: "2.20.2")
    assert "asks for one from 2.9 on and below 2.12" in row(doctor.diagnose()[0], "transformer-engine")


def test_the_release_that_is_compiled_is_one_that_megatron_asks_for() -> None:
    pinned = next(line for line in TE_FILE.read_text().splitlines() if line.startswith("transformer-engine"))
    asked = [line for line in requires("megatron-core") or [] if line.startswith("transformer-engine")]
    first, beyond = doctor._TE_RELEASES
    assert asked
    assert all(f"<{beyond}.0" in line and f">={first}.0" in line for line in asked)
    release = doctor._numbers(pinned.partition("==")[2])
    assert doctor._numbers(first) <= release < doctor._numbers(beyond)


def test_a_compiler_without_pythons_header_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    state, _, why = doctor._compiler(needed=True)
    assert state == "MISSING"
    assert "Python.h" in why.partition("every node")[2]
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    state, what, why = doctor._compiler(needed=False)
    assert (state, what) == ("absent", "C compiler")
    assert why.endswith("on every node; install gcc, or name one in CC")


def test_the_batch_scripts_keep_every_cache_on_its_node() -> None:
    script = f". slurm/lib.sh; printf '%s\\n' {' '.join(f'${name}' for name in doctor._CACHES)}"
    own = {"USER": "me", "VLLM_CACHE_ROOT": "/scratch/vllm"}
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=own, check=True).stdout
    assert said.splitlines() == ["/tmp/t1_me/triton", "/tmp/t1_me/torchinductor", "/scratch/vllm"]


def test_a_cache_on_a_network_file_system_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert doctor._cache("TRITON_CACHE_DIR")[:2] == ("ok", str(tmp_path))
    monkeypatch.setattr(doctor, "file_system_of", lambda path: "nfs4")
    state, folder, why = doctor._cache("TRITON_CACHE_DIR")
    assert (state, folder) == ("warn", str(tmp_path))
    assert "set TRITON_CACHE_DIR to a folder of each node" in why


def test_the_kind_of_file_system() -> None:
    assert doctor.file_system_of(Path("/proc/self/nothing")) == "proc"


@pytest.fixture
def broken_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A Transformer Engine whose extension is of another torch, on a host with GPUs."""
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text("try:\n    from . import pytorch\nexcept ImportError:\n    pass\n")
    (package / "pytorch" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gpus, "usable", lambda: True)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(te.sys.modules, name, raising=False)
    te.failure.cache_clear()
    yield
    te.failure.cache_clear()
    te.sys.modules.pop("transformer_engine", None)


def test_layers_that_can_not_be_imported_are_refused(broken_engine: None) -> None:
    with pytest.raises(
        ValueError, match=r"model.layers = 'auto' takes .*ImportError: undefined symbol: _ZN3c10.*te.txt"
    ):
        te.check_layers("auto")
    te.check_layers("local")
    assert te.version() is None
    with pytest.raises(ImportError):  # what Megatron-Core expects of one that is not there
        import transformer_engine  # noqa: F401
