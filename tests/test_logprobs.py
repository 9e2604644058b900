"""`t1 logprobs`: what it writes is what transformers computes in float64, on any layout; a wrong weight is found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_t1.config import LogprobsConfig
from megatron_t1.convert import to_megatron
from megatron_t1.data.prompts import load_texts
from megatron_t1.data.template import Template
from megatron_t1.logprobs import _by_server, check_finite, compare
from megatron_t1.push.sync import WeightSync, folder_pieces
from megatron_t1.servers.server import Server
from megatron_t1.types import TrainSequence
from tests.hostile import serving
from tests.push import reference
from tests.tiny import make_tiny_tokenizer

ROWS = [
    {"prompt": "1+1?", "response": "2, of course"},
    {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "naïve \\boxed{7}"}]},
    {"text": "Just a text, from its second token on."},
    {"token_ids": [5, 250, 17, 260, 3, 3, 90], "num_prompt_tokens": 3},
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def expected(tiny_dir, texts) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64)
    sequences = load_texts(texts, tiny_dir)
    return [reference.logprobs(model, s.prompt_ids, s.response_ids, 1.0).numpy() for s in sequences]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def largest_difference(output: str) -> float:
    found = re.search(r"differences (\S+) at most", output)
    assert found
    return float(found[1])


def test_a_megatron_checkpoint_under_tp2_pp2_against_transformers(t1, tiny_dir, texts, expected, tmp_path):
    to_megatron(tiny_dir, tmp_path / "megatron")
    out = tmp_path / "out.jsonl"
    layout = ("--parallel.tensor", 2, "--parallel.sequence_parallel", "true", "--parallel.pipeline", 2)
    given = ("--dtype", "float32", "--input", texts, "--output", out, "--against", "transformers")
    output = t1("logprobs", tmp_path / "megatron", *given, *layout, num_ranks=4)
    assert largest_difference(output) <= 1e-4
    for row, values in zip(rows_of(out), expected, strict=True):
        assert row["logprobs"] == pytest.approx(values, abs=1e-4)
        assert row["against"] == pytest.approx(values, abs=1e-4)


def test_cp2_against_a_running_server_and_a_wrong_weight_found(t1, tiny_dir, texts, expected, server, tmp_path):
    with WeightSync(folder_pieces(tiny_dir), server.cfg, server) as sync:
        sync.push(version=sync.next_version())
    key_file = tmp_path / "key"
    key_file.write_text(server.all[0].key)
    key_file.chmod(0o600)
    out = tmp_path / "out.jsonl"
    against = ("--dtype", "float32", "--input", texts, "--against", server.all[0].url, "--key_file", key_file)
    output = t1("logprobs", tiny_dir, *against, "--output", out, "--parallel.context", 2, num_ranks=2)
    assert largest_difference(output) <= 1e-3
    for row, values in zip(rows_of(out), expected, strict=True):
        assert row["logprobs"] == pytest.approx(values, abs=1e-4)
        assert row["against"] == pytest.approx(values, abs=1e-3)

    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_dir.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][260] += 3.0  # of one token, which stands in the last text alone
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    output = t1("logprobs", other, *against, "--num_shown", 1)
    assert largest_difference(output) > 0.1
    assert re.search(r"^  3, \d: .*after", output, re.MULTILINE), output


def test_the_texts_are_not_overwritten(texts):
    with pytest.raises(ValueError, match=r"output = .* must be another file than"):
        LogprobsConfig(model="model", input=str(texts), output=str(texts))


def test_the_worst_tokens_come_first_and_nan_is_the_worst():
    ours = [np.array([-1.0, -2.0], np.float32), np.array([-3.0, np.nan, -5.0], np.float32)]
    theirs = [np.array([-1.0, -2.5], np.float32), np.array([-3.25, -4.0, -5.0], np.float32)]
    found = compare(ours, theirs, 3)
    assert found.worst == [(1, 1), (0, 1), (1, 0)]
    assert found.largest == np.inf
    found = compare(ours[:1], theirs[:1], 1)
    assert (found.largest, found.mean, found.num_tokens) == (0.5, 0.25, 2)


def test_texts_are_read_as_training_reads_them(tiny_dir, texts):
    template = Template(tiny_dir)
    first, second, third, fourth = load_texts(texts, tiny_dir)
    assert first.prompt_ids.tolist() == template.prompt_ids([{"role": "user", "content": "1+1?"}]).tolist()
    assert first.response_ids.tolist() == template.response_ids(["2, of course"])[0].tolist()
    assert second.response_ids.tolist() == template.response_ids(["naïve \\boxed{7}"])[0].tolist()
    assert len(third.prompt_ids) == 1
    assert fourth.response_ids.tolist() == [260, 3, 3, 90]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "nothing is left to score"),
        ({"token_ids": [1, 2], "num_prompt_tokens": 2}, "nothing is left to score"),
        ({"token_ids": [1, 999]}, '"token_ids" must be a list of numbers from 0 to 319'),
        ({"prompt": "x"}, '"response" is missing or empty'),
        ({"messages": [{"role": "user", "content": "x"}]}, "must end with the assistant"),
        ({"response": "x"}, 'give either "prompt" or "messages"'),
    ],
)
def test_a_malformed_text_is_named_by_line(row, message, tmp_path):
    make_tiny_tokenizer(tmp_path)
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"texts\.jsonl:2") as error:
        load_texts(path, tmp_path)
    assert message in str(error.value)


def test_null_is_what_a_text_lacks(tmp_path):
    """As tables write rows of several kinds into one file."""
    make_tiny_tokenizer(tmp_path)
    names = ("text", "token_ids", "num_prompt_tokens", "messages", "prompt", "response")
    given = [{"text": "abc"}, {"token_ids": [97, 98, 99]}, {"prompt": "q", "response": "r"}]
    loaded = []
    for rows in (given, [dict.fromkeys(names) | row for row in given]):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        loaded.append([(t.prompt_ids.tolist(), t.response_ids.tolist()) for t in load_texts(path, tmp_path)])
    assert loaded[0] == loaded[1]
    assert loaded[0][1] == ([97], [98, 99])


@pytest.mark.parametrize("odd", [np.nan, -np.inf, np.inf])
def test_a_logprob_that_is_no_number_is_an_error(odd):
    good, bad = [np.array([-1.0, -2.0])], [np.array([-1.0, odd])]
    check_finite(compare(good, good, 1))
    for ours, theirs in ((good, bad), (bad, good), (bad, bad)):
        with pytest.raises(FloatingPointError, match="no finite number"):
            check_finite(compare(ours, theirs, 1))


def test_a_servers_word_for_minus_infinity_is_read_as_that():
    text = TrainSequence(prompt_ids=np.array([5]), response_ids=np.array([7, 8]))
    entries = [None, {"7": {"logprob": -9999.0}}, {"8": {"logprob": -9998.0}}]
    with serving(lambda request: {"choices": [{"prompt_logprobs": entries}]}) as url:
        assert _by_server(Server(url=url, key="k"), text).tolist() == [-np.inf, -9998.0]
