"""Files that are either whole or absent: what a crash, a full disk or Ctrl-C may not leave half-written."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import resource
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil
import yaml

_SYNC_INTERVAL_S = 2.0
ENCODING = "utf-8-sig"
"""Of text that people bring: UTF-8 whatever the locale says, without the mark that Excel puts before it."""


def read_text(path: Path) -> str:
    """The text of a file that somebody else wrote.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        try:
            return path.read_text(encoding=ENCODING)
        except OSError as error:
            if error.errno != errno.ESTALE:  # another host replaced it on NFS while it was being read
                raise
            return path.read_text(encoding=ENCODING)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def parse_json(text: str | bytes, *, halves: bool = False) -> Any:
    """The value of a JSON text. NaN and Infinity, which Python writes, are read; each key of an object comes once.

    Args:
        halves: take half of a surrogate pair, which no UTF-8 can say, as what a model may have written.

    Raises:
        ValueError: it is no such text, or holds half of a surrogate pair. It says where, and leaves to the caller which
            file.
    """
    try:
        text = text if isinstance(text, str) else text.decode(ENCODING)
        value = json.loads(text, object_pairs_hook=each_once)
        if "\\u" in text and not halves:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not valid JSON ({error.msg} at {line}column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    return value


def raise_open_files_limit() -> None:
    """As many files and sockets as the system allows: a request in flight is a socket, and the usual limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # more than the kernel allows by now
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def storable(text: str) -> str:
    """With a question mark for each half of a surrogate pair, which no file takes."""
    return text.encode("utf-8", "replace").decode()


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its entries, for `json`. Raises ValueError for a key that is there twice: which one counts?"""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.80} is there twice")
    return entries


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # As it is written: its construction would first put in what `<<` names.
        node = super().compose_mapping_node(anchor)
        each_once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return node


class _Dumper(yaml.SafeDumper):
    pass


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
for _each in (_Loader, _Dumper):  # numbers as YAML 1.2 and people read them: 010 is no 8, 1:30 no 90, and 1e-6 no text
    _each.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _each.add_implicit_resolver(_INT, re.compile(r"[-+]?\d+$", re.A), list("-+0123456789"))
    _each.add_implicit_resolver(
        _FLOAT,
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|[-+]?\.inf$|\.nan$", re.A | re.I),
        list("-+.0123456789"),
    )
_Loader.add_constructor(_INT, lambda _, node: int(node.value))


def parse_yaml(text: str) -> Any:
    """The plain value of a YAML text; each key of a mapping comes once.

    Raises:
        ValueError: it is no such text. It leaves to the caller which file.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("lists or mappings are nested too deeply") from None


def dump_yaml(value: Any, **style: Any) -> str:
    """What `parse_yaml` reads back; `style` is `yaml.dump`'s."""
    return str(yaml.dump(value, Dumper=_Dumper, **style))


def read_json(path: Path, shape: Any = Any) -> Any:
    """The value in a JSON file, `shape` being the type that it must have.

    What the shape does not name is kept, and is not looked at.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or of another shape; the message names the file.
    """
    text = read_text(path)
    try:
        return of_shape(parse_json(text), shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error!s:.500}") from None


def of_shape(value: Any, shape: Any) -> Any:
    """`value`, which must be of the type `shape` (TypedDict, list and their like).

    Raises:
        ValueError: it is not; the message says where.
    """
    try:
        msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    return value


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to `path` when the block succeeds and removed when it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    tmp.touch(exist_ok=False)  # with the mode that the umask says
    try:
        yield tmp
        with tmp.open("rb+") as file:
            os.fsync(file.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk: a rename survives a power cut only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def need_space(path: Path, num_bytes: int) -> None:
    """Raises OSError when the disk on which `path` will be made has less left."""
    if (free := shutil.disk_usage(path.parent).free) < num_bytes:
        raise OSError(
            f"{path} needs {num_bytes / 1e9:.2f} GB and {path.parent} has {free / 1e9:.2f} GB free: free some space"
        )


@contextmanager
def new_folder(path: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to `path` when the block succeeds and removed when it raises.

    Where `path` is a link, that is beside what it leads to. What a killed process of this host left of an earlier
    attempt is removed first.

    Args:
        num_bytes: about what will be written.

    Raises:
        OSError: `path` exists, or can't be renamed to, or the disk has too little space left.
    """
    path = path.resolve()
    if path == Path.cwd() or path.is_mount():
        raise OSError(f"{path} is where a disk is mounted, or the current folder: name a folder inside it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OSError(f"{path} exists already: remove it, or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = f".{path.name}.{socket.gethostname()}."
    for left in path.parent.glob(f"{glob.escape(attempt)}*"):
        pid = left.name.removeprefix(attempt)
        # Our own number is an earlier process's: a container that is started again counts from 1 again.
        if left.is_dir() and pid.isdecimal() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(left)
    need_space(path, num_bytes)
    building = path.parent / f"{attempt}{os.getpid()}"
    building.mkdir()
    try:
        yield building
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    try:
        os.rename(building, path)
    except OSError as error:
        raise OSError(f"all of it is in {building}, which can't be renamed to {path}: {error.strerror}") from None
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically and without holding all rows."""
    with atomic_path(path) as tmp, tmp.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path, shape: Any = dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a JSONL file this package wrote; [] when there is none. A last line cut by a kill is left out.

    Raises:
        ValueError: a line is not JSON, or of another shape (as `read_json` takes it); it is named by file and number.
    """
    return list(iter_jsonl(path, shape))


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a JSONL file, in place of a last line cut by a kill, and bring them to the disk before returning."""
    with Journal(path) as journal:
        journal.append(rows)


def _line_start(file: IO[bytes], end: int) -> int:
    """Where the line begins whose bytes end at `end`."""
    start = end
    while start > 0:
        step = min(start, 1 << 16)
        file.seek(start - step)
        newline = file.read(step).rfind(b"\n")
        if newline >= 0:
            return start - step + newline + 1
        start -= step
    return start


def _cut_torn_line(file: IO[bytes]) -> None:
    end = file.seek(0, os.SEEK_END)
    start = _line_start(file, end)
    if start < end:
        file.truncate(start)
    file.seek(0, os.SEEK_END)


def cut_jsonl(path: Path, dropped: Callable[[dict[str, Any]], bool], shape: Any = dict[str, Any]) -> None:
    """Cut off the last rows of a JSONL file as long as they are `dropped`, and a last line cut by a kill. What is kept
    is not read, but for its last row; a file that is not there is made.

    Raises:
        ValueError: a row that was read is not JSON, or of another shape; the message names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _cut_torn_line(file)
        end = file.tell()
        while end > 0:
            start = _line_start(file, end - 1)
            file.seek(start)
            try:
                row = of_shape(parse_json(file.read(end - start)), shape)
            except ValueError as error:
                raise ValueError(f"{path}: {error!s:.500}; the line at byte {start} is not what was written") from None
            if not dropped(row):
                break
            end = start
        file.truncate(end)
        os.fsync(file.fileno())


class Journal:
    """Rows of a job in the order in which they finish; what a kill leaves is read again by the next process.

    A row is handed to the kernel before `append` returns (a kill of the process loses nothing) and reaches the disk
    within seconds. `append` may be called from any one thread.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab+")
        _cut_torn_line(self._file)
        self._synced = time.monotonic()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_INTERVAL_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def iter_jsonl(path: Path, shape: Any = dict[str, Any]) -> Iterator[dict[str, Any]]:
    """As `read_jsonl`, one row at a time."""
    if path.exists():
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    try:
                        row = of_shape(parse_json(line), shape)
                    except ValueError as error:
                        raise ValueError(
                            f"{path}:{number}: {error!s:.500}; this line is not what was written"
                        ) from None
                    yield row


def sort_jsonl(source: Path, target: Path, key: Callable[[dict[str, Any]], Any]) -> None:
    """Write the lines of `source` to `target` in the order of `key`, each key once; only keys are held in memory."""
    places: dict[Any, int] = {}
    with source.open("rb") as file:
        position = 0
        for line in file:
            places.setdefault(key(json.loads(line)), position)
            position += len(line)
        with atomic_path(target) as tmp, tmp.open("wb") as out:
            for _, position in sorted(places.items()):
                file.seek(position)
                out.write(file.readline())
