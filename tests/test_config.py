"""What a run keeps of its settings."""

from __future__ import annotations

from pathlib import Path

from megatron_t1.cli.options import read
from megatron_t1.config import Config, keep
from megatron_t1.servers.launch import begins_random
from tests.tiny import make_tiny_qwen2


def test_the_kept_settings_of_a_batch_job_serve_the_model_that_it_ended_with(tmp_path: Path) -> None:
    """Its own servers began with random weights, for the trainer to push into."""
    model = make_tiny_qwen2(tmp_path / "rl/hf")
    options = ["--resume", "--rollout.load_weights", "false", "--rollout.await_servers", "4", "--rollout.tp", "2"]
    keep(read(Config, ["--run_dir", str(tmp_path), *options]))
    kept = read(Config, ["--config", str(tmp_path / "config.yaml")])
    assert not begins_random(kept.rollout, model)
    assert (kept.resume, kept.rollout.await_servers, kept.rollout.tp) == (False, 4, 2)
