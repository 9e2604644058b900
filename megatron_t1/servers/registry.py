"""How servers on other hosts are found: a folder of a shared file system with one small file a server.

`t1 serve` announces a server here once it is healthy, says when it starts it anew, announces it again, and takes the
files away when it ends; the trainer reads the folder whenever it looks for servers.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_t1.files import read_json, write_json
from megatron_t1.servers.server import ServerError


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
        """Write or replace the entry of the server `name` (unique over all hosts); a start of it is over."""
        write_json(self.folder / f"{name}.json", asdict(Entry(url=url, start=secrets.token_hex(8), log=str(log))))
        (self.folder / f"{name}.starting").unlink(missing_ok=True)  # after it: who waits for this looks for that

    def withdraw(self, name: str) -> None:
        (self.folder / f"{name}.json").unlink(missing_ok=True)
        (self.folder / f"{name}.starting").unlink(missing_ok=True)

    def withdraw_to_restart(self, name: str) -> None:
        self.withdraw(name)
        write_json(self.folder / f"{name}.starting", secrets.token_hex(8))

    def restarts(self) -> set[str]:
        """A word for each start that is under way of a lost server, no two alike."""
        found = set()
        for path in self.folder.glob("*.starting"):
            with contextlib.suppress(FileNotFoundError):  # over while we looked
                found.add(path.read_text(encoding="utf-8"))
        return found

    def entries(self) -> dict[str, Entry]:
        """Every announced server by name; a file that is no entry is an error that names it.

        Raises:
            ServerError: a file that we did not write.
        """
        entries = {}
        for path in sorted(self.folder.glob("*.json")):
            if path.name.startswith("."):
                continue  # being written
            try:
                entry = Entry(**read_json(path, dict[str, str]))
                if not entry.url.startswith("http://"):
                    raise ValueError(f"url = {entry.url!r:.80} must start with http://")
            except FileNotFoundError:
                continue  # withdrawn while we looked
            except (ValueError, TypeError) as error:
                raise ServerError(f"{path} does not announce a server ({error}); remove it") from None
            entries[path.stem] = entry
        return entries
