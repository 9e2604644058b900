"""Tokens that a model has no row for are refused by name; Megatron's tensor-parallel embedding would make 0 of them."""

from __future__ import annotations

import json

from tests.forks import WORKERS
from tests.tiny import make_tiny_qwen2


def test_a_token_beyond_the_models_vocabulary_is_refused_before_a_step(run_ranks, tmp_path):
    model_dir = make_tiny_qwen2(tmp_path / "hf", vocab_size=321)
    output = run_ranks(WORKERS / "tokens_worker.py", 2, model_dir, tmp_path / "run", 321)  # a padded row
    for way, said in json.loads(output.splitlines()[-1]).items():
        assert said.startswith("ValueError: a text has token 321, and the model has the vocab_size = 321 of"), way
    output = run_ranks(WORKERS / "tokens_worker.py", 2, model_dir, tmp_path / "run", 320)
    assert set(json.loads(output.splitlines()[-1]).values()) == {"nothing"}
