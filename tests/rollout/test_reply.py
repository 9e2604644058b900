"""A server's reply becomes samples whose text is the whole response."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_t1.data.template import Template
from megatron_t1.reward.answers.verify import verify
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.rollout.reply import Request, samples_of
from megatron_t1.servers.server import UNPUSHED, Server
from tests.tiny import make_tiny_tokenizer


@pytest.mark.parametrize(
    ("opening", "response", "outcome"),
    [
        ("<think>\n", r"so \boxed{4} ", "no_answer"),
        ("<think>\n", r"so \boxed{5}</think>\boxed{4}", "correct"),
        ("", r"so \boxed{4} ", "correct"),
    ],
)
def test_the_text_of_a_sample_begins_with_the_thinking_that_the_prompt_opened(
    tmp_path: Path, opening: str, response: str, outcome: str
) -> None:
    make_tiny_tokenizer(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\n{% endif %}", f"assistant\n{opening}{{% endif %}}"))
    template = Template(tmp_path)
    prompt_ids = template.prompt_ids([{"role": "user", "content": "2+2?"}]).tolist()
    ids = template.ids(response).tolist()
    reply = {
        "choices": [
            {
                "index": 0,
                "finish_reason": "repetition",
                "token_ids": ids,
                "logprobs": {"content": [{"token_id": token, "logprob": -1.0} for token in ids]},
                "weight_versions": [{"version": "default", "start": 0, "end": len(ids)}],
            }
        ]
    }
    request = Request("q", prompt_ids, 1, 0, SamplingConfig(max_new_tokens=99))
    server = Server(url="http://x", key="")
    (sample,) = samples_of(json.dumps(reply).encode(), server, request, UNPUSHED, template.tokenizer, 320)
    assert sample.text == opening + response
    assert len(sample.token_ids) == len(ids)
    assert sample.finish_reason == "repetition"  # of vLLM's own detector, where it is switched on
    assert verify("4", sample.text).outcome == outcome
