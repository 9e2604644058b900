"""`t1 rl` that is asked to stop (USR1) while its second step trains.

argv: the command's options.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from megatron_t1.cli.main import main


def ask_in_step(number: int) -> None:
    """The signal comes to this process in the first microbatch of its training step `number`, counted from 1."""
    from megatron_t1.engine.model import T1GPTModel
    from megatron_t1.engine.step import Engine

    step, forward, microbatches = Engine.step, T1GPTModel.forward, []

    def counted(*args: Any, **kwargs: Any) -> dict[str, float]:
        microbatches.append(len(args[1]))
        return step(*args, **kwargs)

    def asked(*args: Any, **kwargs: Any) -> Any:
        if len(microbatches) == number:
            assert microbatches[-1] > 1, "none is left to be dropped"
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(*args, **kwargs)

    Engine.step, T1GPTModel.forward = counted, asked


if __name__ == "__main__":
    ask_in_step(2)
    sys.exit(main(["rl", *sys.argv[1:]]))
