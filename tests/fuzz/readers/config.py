"""The reader of configs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from megatron_t1.cli import options
from megatron_t1.config import Config
from tests.fuzz.damage import spoil_bytes
from tests.fuzz.reader import Reader, from_file, json_damage, must

CONFIG: dict[str, Any] = {
    "run_dir": "runs/x",
    "seed": 3,
    "model": {"hf_path": "/models/x", "dtype": "bfloat16"},
    "data": {"train": "a.jsonl", "heldout": "b.jsonl", "system_prompt": None},
    "parallel": {"tensor": 2, "max_tokens_per_microbatch": 4096},
    "sft": {"epochs": 3, "batch_size": 8, "optim": {"lr": 1e-5, "min_lr_ratio": 0.1}},
    "rl": {"steps": 10, "optim": {"lr": 1.5e-6}},
    "rollout": {"num_servers": 2, "urls": []},
    "evaluate": {"sets": ["math500"], "num_samples": {"aime2024": 32}},
}


def floats_in(value: Any) -> list[float]:
    if isinstance(value, float):
        return [value]
    if dataclasses.is_dataclass(value):
        return [x for field in dataclasses.fields(value) for x in floats_in(getattr(value, field.name))]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [number for each in inner for number in floats_in(each)]


def config_reader(tmp: Path) -> Reader:
    import yaml

    block = yaml.safe_dump(CONFIG).encode()
    flow = json_damage(CONFIG)

    def check(config: Config) -> None:
        assert type(config) is Config
        must(type(config.seed) is int and type(config.rl.steps) is int, config)
        assert type(config.data.system_prompt) in (str, type(None))
        assert all(map(math.isfinite, floats_in(config))), floats_in(config)

    return Reader(
        name="yaml",
        damaged=lambda rng: spoil_bytes(block, rng) if rng.random() < 0.5 else flow(rng),
        read=from_file(tmp / "config.yaml", lambda path: options.read(Config, ["--config", str(path)])),
        check=check,
        # A setting, or the file where there are no settings to name.
        says=r"config\.yaml|\w+ = |is not a setting|is not set",
        seeds=[block],
    )
