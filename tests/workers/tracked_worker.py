"""A run's log with both trackers, that ends after its last step: killed (-9), by an error, stopped as asked, or well.

argv: folder that the trackers are installed in, run_dir, `resume` or `new`, first step, last step, `kill`, `fail`,
`stop` or `close`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

sys.path.append(sys.argv[1])  # last: what the environment has of their requirements stays
from megatron_t1.config import Config, LogConfig
from megatron_t1.stop import Stopped
from megatron_t1.trackers import open_log
from tests.test_metrics import group, sample

if __name__ == "__main__":
    run_dir, how, first, last, end = sys.argv[2:]
    log_to = LogConfig(wandb="t1-tests", mlflow="t1-tests")
    cfg = Config(run_dir=run_dir, resume=how == "resume", seed=7, log=log_to)
    with suppress(Stopped), open_log(cfg, "rl", int(first) - 1) as log:
        for step in range(int(first), int(last) + 1):
            log.samples(step, [group("a", sample(1, 4))])
            log.log(step, {"reward": step / 10, "kl_loss": 0.5})
        if end == "kill":
            time.sleep(3)  # wandb writes once a second
            os.kill(os.getpid(), signal.SIGKILL)
        if end == "fail":
            raise RuntimeError("as a test wants it")
        if end == "stop":
            raise Stopped
