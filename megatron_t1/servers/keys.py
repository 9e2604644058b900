"""Keys of servers and endpoints in files that their owner alone may read."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from pathlib import Path

from megatron_t1.servers.server import ServerError

KEY_FILE = "server_key"
"""Where a run keeps its servers' key, in its folder."""
REMOTE_KEY_ENV = "T1_SERVER_KEY"
"""Environment variable with the key of servers that were started elsewhere."""


_KEY = re.compile(r"[!-~]+")


class KeyFileError(ServerError, ValueError):
    """A key file that is not there, that others may read, or that holds no key."""


def read_key(path: Path) -> str:
    """
    Raises:
        KeyFileError: no such file, others may read it, or what it holds is no key.
    """
    if not path.is_file():
        raise KeyFileError(f"key file {path} is not there; `t1 serve` prints where it keeps its own")
    if path.stat().st_mode & 0o077:
        raise KeyFileError(f"key file {path} is readable by others; chmod 600 it")
    key = path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip().decode("latin-1")
    if not _KEY.fullmatch(key):  # it goes into a header of HTTP; and it is not shown
        raise KeyFileError(f"key file {path} must hold a key alone: letters, digits and signs of ASCII on one line")
    return key


def shared_key(path: Path) -> str:
    """The key in `path`, made when there is none: hosts that start together agree on the first one's, and jobs that
    share a folder do not take it from each other's servers."""
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
