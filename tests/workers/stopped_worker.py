"""`t1 rl` that is asked to stop (USR1) while its second step asks the anchor.

argv: the command's options.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from megatron_t1 import learner
from megatron_t1.cli.main import main

prescore = learner.prescore
calls: list[int] = []


def prescore_and_ask(*arguments: Any) -> dict[str, float]:
    scored = prescore(*arguments)
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
    return scored


if __name__ == "__main__":
    learner.prescore = prescore_and_ask
    sys.exit(main(["rl", *sys.argv[1:]]))
