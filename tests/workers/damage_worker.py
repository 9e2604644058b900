"""Prints what is wrong with each of the given checkpoints, as a JSON list."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

if __name__ == "__main__":
    from megatron_t1.engine.checkpoint import damage

    dist.init_process_group("gloo")
    found = [damage(Path(path)) for path in sys.argv[1:]]
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
