"""`t1 rl` that loses all its servers while its third step trains, with the next batch under way.

argv: the command's options.
"""

from __future__ import annotations

import contextlib
import sys

import psutil

from megatron_t1 import learner
from megatron_t1.cli.main import main

prescore = learner.prescore
calls: list[int] = []


def prescore_and_kill(*arguments: object) -> dict[str, float]:
    calls.append(1)
    if len(calls) == 3:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # as a checkpoint's writers, which come and go
                if "vllm" in " ".join(process.cmdline()) and "--port" in process.cmdline():
                    process.kill()
    return prescore(*arguments)


if __name__ == "__main__":
    learner.prescore = prescore_and_kill
    sys.exit(main(["rl", *sys.argv[1:]]))
