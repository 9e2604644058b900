"""How trainer and servers on other hosts find each other, and whose turn it is on GPUs that they share: a folder of a
shared file system.

One small file a server, which its `t1 serve` writes before it starts it and once it is healthy, and takes away when it
has ended; the trainer looks for servers there. One file of the trainer's, which every `t1 serve` keeps to.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_t1.files import read_json, write_json
from megatron_t1.servers.server import ServerError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One announced server, or the start of one."""

    url: str
    """Empty: it is being started."""
    start: str
    """Different for every start, so that a server that died and came back is seen to be another one."""
    log: str
    """Path of its log."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What the trainer says to every `t1 serve`."""

    trainers_turn: bool = False
    """The trainer has the memory of the GPUs: no start may begin."""
    given_up: Sequence[str] = ()
    """`Entry.start` of servers, and of starts, that must end. When they are started again is the turn's matter."""


class Registry:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._orders = folder / "orders"

    def begin_starts(self, names: list[str]) -> bool:
        """Says that these servers are being started; False, and nothing is said, when it is the trainer's turn.

        A name is unique over all hosts. Who begins looks at the turn once more after it was said, and the trainer says
        that it is its turn before it looks for starts: one of them sees the other.
        """
        if self.orders().trainers_turn:
            return False
        for name in names:
            self.announce(name, "", None)
        if self.orders().trainers_turn:
            for name in names:
                self.withdraw(name)
            return False
        return True

    def announce(self, name: str, url: str, log: Path | None) -> None:
        """Write or replace the entry of the server `name`; a start of it is over."""
        write_json(self.folder / f"{name}.json", asdict(Entry(url=url, start=secrets.token_hex(8), log=str(log))))

    def withdraw(self, name: str) -> None:
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def entries(self) -> dict[str, Entry]:
        """Every server by name that is announced or being started; a file that is no entry is an error that names it.

        Raises:
            ServerError: a file that we did not write.
        """
        entries = {}
        for path in sorted(self.folder.glob("*.json")):
            if path.name.startswith("."):
                continue  # being written
            try:
                entry = Entry(**read_json(path, dict[str, str]))
                if entry.url and not entry.url.startswith("http://"):
                    raise ValueError(f"url = {entry.url!r:.80} must start with http://")
            except FileNotFoundError:
                continue  # withdrawn while we looked
            except (ValueError, TypeError) as error:
                raise ServerError(f"{path} does not announce a server ({error}); remove it") from None
            entries[path.stem] = entry
        return entries

    def order(self, orders: Orders | None) -> None:
        """Replace what the trainer says; None: there is no trainer."""
        if orders is None:
            self._orders.unlink(missing_ok=True)
        else:
            write_json(self._orders, asdict(orders))

    def orders(self) -> Orders:
        """
        Raises:
            ServerError: a file that we did not write.
        """
        try:
            return Orders(**read_json(self._orders, Orders))
        except FileNotFoundError:
            return Orders()
        except (ValueError, TypeError) as error:
            raise ServerError(f"{self._orders} is not the trainer's ({error}); remove it") from None

    def given_up(self) -> set[str]:
        """Names of the servers that the trainer wants to end."""
        starts = self.orders().given_up
        return {name for name, entry in self.entries().items() if entry.start in starts}
