"""vLLM serves what we export of every family, and says the logprobs that our engine computes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.engine.batch import make_sequences
from tests.forks import WORKERS
from tests.models.families import FAMILIES, VOCAB

WORKER = WORKERS / "vllm_worker.py"
SERVED = [family for family in FAMILIES if not family.endswith((" tied", " dense layer", " bias"))]
SERVED += ["qwen2 yarn", "glm4 yarn"]


@pytest.fixture(scope="module")
def served(results, vllm_forks, tmp_path_factory):
    """Family -> for each text, the logprobs of its tokens but the first."""
    out = tmp_path_factory.mktemp("vllm") / "logprobs"
    folders = {family: str(results(1) / "TP1" / family) for family in SERVED}
    done = vllm_forks.run(WORKER, json.dumps(folders), out, timeout_s=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(out.read_text())


@pytest.mark.timeout(4000)
@pytest.mark.parametrize("family", SERVED)
def test_vllm_agrees_on_given_texts(family, served, results):
    logits = load_file(results(1) / "TP1" / family / "results")
    for number, sequence in enumerate(make_sequences(VOCAB)):
        ours = logits[f"logits/{number}"].double().log_softmax(-1)
        expected = ours.gather(1, torch.from_numpy(sequence.response_ids)[:, None])[:, 0]
        found = served[family][number][len(sequence.prompt_ids) - 1 :]
        np.testing.assert_allclose(found, expected, atol=1e-3)
