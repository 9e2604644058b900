"""Megatron ranks that load a folder, export it and push it into running servers.

argv: JSON of `folder`, the checkpoint (trained in float32); `fields` of ParallelConfig, what is left of the ranks is
data parallel; `rollout`, fields of RolloutConfig; `version`; `export`, the folder for the trainer's weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_t1.platform.detect import setup


def main() -> None:
    push = json.loads(sys.argv[1])
    platform = setup()
    from megatron_t1.engine.config import ModelConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize, is_main
    from megatron_t1.engine.step import ForwardEngine
    from megatron_t1.push.sync import WeightSync
    from megatron_t1.servers.config import RolloutConfig
    from megatron_t1.servers.servers import Servers

    parallel, rollout = ParallelConfig(**push["fields"]), RolloutConfig(**push["rollout"])
    initialize(parallel, platform, 0)
    model = ModelConfig(hf_path=push["folder"], dtype="float32")
    engine = ForwardEngine(model, parallel, platform, temperature=1.0)
    engine.load_weights(Path(push["folder"]))
    engine.save_hf(Path(push["export"]))
    servers = Servers(rollout, "", "").start().wait_ready() if is_main() else None
    with WeightSync(engine.pieces(), rollout, servers) as sync:
        assert sync.push(push["version"]).failed == {}


if __name__ == "__main__":
    main()
