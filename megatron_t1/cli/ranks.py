"""Start a command on several trainer processes of this machine, through torch's own elastic launcher.

Under torchrun or srun the processes are there already (RANK is set) and nothing is started. Left out: restarts. A rank
that fails ends the run with its exit code; `--resume` goes on from the last checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable
from types import FrameType

import psutil
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_t1.engine.config import ParallelConfig


def num_processes(cfg: ParallelConfig) -> int:
    """What nproc_per_node says; 0: one a GPU, or without GPUs as few as the layout takes."""
    return cfg.nproc_per_node or torch.cuda.device_count() or cfg.num_ranks


def config_of(count: int) -> LaunchConfig:
    """Of `count` ranks on this machine, which meet on its loopback address: its name need not resolve."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # which end the ranks; `start` hands on the others
    )


def start(count: int, arguments: list[str], *, alone: Callable[[list[str]], int]) -> int:
    """Run `t1 <arguments>` on `count` ranks (a single one is this process: `alone`); returns the exit code."""
    if count == 1:
        os.environ["RANK"] = "0"
        return alone(arguments)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # A failed rank has said why; the launcher's own traceback would push that off the screen.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["PYTHONSAFEPATH"] = "1"  # `python -m` would put the current folder before the installed modules
    os.environ.setdefault("OMP_NUM_THREADS", "4" if torch.cuda.is_available() else "1")
    for number in (signal.SIGUSR1, signal.SIGTERM):  # `stop.py`
        signal.signal(number, _hand_on)
    try:
        elastic_launch(config_of(count), sys.executable)("-m", "megatron_t1", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode or 1
        return code if code > 0 else 128 - code  # of a rank that a signal ended: what a shell makes of it
    except SignalException:  # Ctrl-C, after the ranks were ended
        raise KeyboardInterrupt from None
    return 0


def _hand_on(number: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        child.send_signal(number)
