"""`t1 rl` that is asked to stop (USR1) while its second step asks the anchor.

argv: the command's options.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from megatron_t1.cli.main import main
from megatron_t1.engine.anchor import Anchor

fill = Anchor.fill
calls: list[int] = []


def fill_and_ask(self: Anchor, *arguments: Any, **options: Any) -> dict[str, float]:
    filled = fill(self, *arguments, **options)
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
    return filled


if __name__ == "__main__":
    Anchor.fill = fill_and_ask  # type: ignore[method-assign]
    sys.exit(main(["rl", *sys.argv[1:]]))
