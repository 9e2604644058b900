"""How servers on other hosts are found: a folder of a shared file system with one small file a server, and the key.

`t1 serve` announces a server here once it is healthy, again when it was started anew, and takes the file away when it
ends; the trainer reads the folder whenever it looks for servers. The key is made by whoever comes first.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_t1.files import write_json
from megatron_t1.servers.server import ServerError

KEY_FILE = "server_key"
REMOTE_KEY_ENV = "T1_SERVER_KEY"
"""Holds the key of servers that were started elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One announced server."""

    url: str
    start: str
    """Different for every start, so that a server that died and came back is seen to be another one."""
    log: str
    """Path of its log."""


class Registry:
    """The announced servers in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def announce(self, name: str, url: str, log: Path | None) -> None:
        """Write or replace the entry of the server `name` (unique over all hosts)."""
        write_json(self.folder / f"{name}.json", asdict(Entry(url=url, start=secrets.token_hex(8), log=str(log))))

    def withdraw(self, name: str) -> None:
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def entries(self) -> dict[str, Entry]:
        """Every announced server by name; a file that is no entry is an error that names it.

        Raises:
            ServerError: a file that we did not write.
        """
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            if path.name.startswith("."):
                continue  # being written
            try:
                found[path.stem] = Entry(**json.loads(path.read_text()))
            except FileNotFoundError:
                continue  # withdrawn while we looked
            except (ValueError, TypeError) as error:
                raise ServerError(f"{path} does not announce a server ({error}); remove it") from None
        return found


def read_key(path: Path) -> str:
    """
    Raises:
        ServerError: no such file, or others may read it.
    """
    if not path.is_file():
        raise ServerError(f"the servers' key {path} is not there; `t1 serve` prints where it keeps it")
    if path.stat().st_mode & 0o077:
        raise ServerError(f"the servers' key {path} is readable by others; chmod 600 it")
    return path.read_text().strip()


def new_key(path: Path) -> str:
    """A fresh key, which replaces that in `path` (mode 0600)."""
    path.unlink(missing_ok=True)
    return shared_key(path)


def shared_key(path: Path) -> str:
    """The key in `path`, made when there is none: hosts that start together agree on the first one's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_urlsafe(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, path)  # whole or not there, and never over another host's; also on NFS
        os.unlink(name)
    return read_key(path)
