"""Files people bring and files that are made: marks, masks, links, read-only sources."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
from pathlib import Path

import pytest

from megatron_t1.config import Config, ModelConfig
from megatron_t1.files import dump_yaml, new_folder, parse_yaml, read_json, read_text, write_text
from megatron_t1.rank0 import open_rank0
from megatron_t1.weights.hf_folder import copy_beside


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbf" + "ü".encode())
    assert read_text(path) == "ü"
    path.write_bytes("ü".encode("utf-16"))
    with pytest.raises(ValueError, match="text is not UTF-8 text"):
        read_text(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-7", -7), ("0", 0), ("1:30", "1:30"), ("1_000", "1_000"), ("0x10", "0x10"), ("1e-6", 1e-6),
        ("1.5E+3", 1500.0), (".5", 0.5), ("5.", 5.0), (".inf", float("inf")), ("-.Inf", float("-inf")),
        ("1.2.3", "1.2.3"), ("{a: &x {p: 1, q: 2}, b: {<<: *x, q: 3}}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
    ],
)  # fmt: skip
def test_yaml_is_read_as_people_read_it_and_written_so(text: str, value: object) -> None:
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)
    assert parse_yaml(dump_yaml([value, text])) == [value, text]


def test_a_key_that_is_written_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'q' is there twice"):
        parse_yaml("{a: &x {p: 1}, b: {<<: *x, q: 1, q: 2}}")


@pytest.mark.parametrize("mask", [0o077, 0o002, 0o022])
def test_files_have_the_mode_that_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("there", [True, False])
def test_a_new_folder_behind_a_link_is_made_where_the_link_leads(tmp_path: Path, there: bool) -> None:
    target, link = tmp_path / "disk" / "target", tmp_path / "out"
    (target if there else target.parent).mkdir(parents=True)
    link.symlink_to(target)
    with new_folder(link, 1) as building:
        assert building.parent == target.parent
        (building / "file").touch()
    assert link.is_symlink()
    assert (target / "file").exists()


def test_a_folder_that_can_not_be_renamed_to_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("."), tmp_path, Path("/proc")):
        with pytest.raises(OSError, match="name a folder inside it"), new_folder(path, 1):
            raise AssertionError("the work had begun")


def test_what_a_killed_process_left_is_removed_also_where_it_had_our_number(tmp_path: Path) -> None:
    attempt = f".out.{socket.gethostname()}."
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid in (os.getpid(), gone.pid, os.getppid()):
        (tmp_path / f"{attempt}{pid}").mkdir()
        (tmp_path / f"{attempt}{pid}" / "half").touch()
    kept = {"out", f"{attempt}{os.getppid()}", f"{attempt}bak", f"{attempt}notes"}
    (tmp_path / f"{attempt}bak").mkdir()
    (tmp_path / f"{attempt}notes").touch()
    with new_folder(tmp_path / "out", 1) as building:
        assert list(building.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_what_was_made_stays_when_it_can_not_be_renamed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match=r"all of it is in .*, which can't be renamed") as caught:  # noqa: PT012
        with new_folder(out, 1) as building:
            (building / "file").touch()
            (out / "of somebody else").mkdir(parents=True)
    assert str(building) in str(caught.value)
    assert (building / "file").exists()


def test_copies_of_read_only_files_can_be_written(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    for path in (source / "config.json", source / "additional_chat_templates" / "rag.jinja"):
        path.touch()
        path.chmod(0o444)
    (source / "additional_chat_templates").chmod(0o555)
    copy_beside(source, target)
    for path in ("config.json", "additional_chat_templates", "additional_chat_templates/rag.jinja"):
        assert (target / path).stat().st_mode & 0o200


def test_rank_0_may_have_as_many_sockets_as_the_system_allows(tmp_path: Path) -> None:
    before = _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for soft in (256, hard):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            no_model = Config(model=ModelConfig(hf_path=str(tmp_path)))
            with pytest.raises(ValueError, match="has no config"), open_rank0(no_model, None):  # type: ignore[arg-type]
                pass
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_file_that_another_host_replaces_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What NFS answers then: the file that was opened is no more."""
    (tmp_path / "a.json").write_text('{"n": 2}')
    read, failures = Path.read_text, [errno.ESTALE]

    def stale(path: Path, **options: str) -> str:
        if failures:
            raise OSError(failures.pop(), "Stale file handle", str(path))
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", stale)
    assert read_json(tmp_path / "a.json") == {"n": 2}
    failures.extend([errno.ESTALE, errno.ESTALE])
    with pytest.raises(OSError, match="Stale"):
        read_json(tmp_path / "a.json")
