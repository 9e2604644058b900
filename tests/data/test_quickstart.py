"""The quickstart's task: exact round trips, honest labels, same seed same bytes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_t1.data.quickstart import QuickstartDataConfig, problems, trace, write


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    write(QuickstartDataConfig(out=folder, num_sft_samples=3000, seed=3))
    return folder


def test_split_is_disjoint_and_answers_are_right() -> None:
    train, held_out = problems(0)
    assert (len(train), len(held_out), len(set(train) | set(held_out))) == (641, 169, 810)
    assert all((p.a * p.answer + p.b) % p.p == 0 for p in train + held_out)


def test_sft_traces_have_no_slips_and_come_from_train_problems_only(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "sft.jsonl").open()]
    questions = {row["prompt"]: row["answer"] for row in map(json.loads, (out / "rl.jsonl").open())}
    held_out = {json.loads(line)["prompt"] for line in (out / "heldout.jsonl").open()}
    assert not held_out & questions.keys()
    correct = 0
    for row in rows:
        a, b, p = map(int, re.findall(r"\d+", row["prompt"].replace("=0", "")))
        for x, ax, b_, total, p_, rest, verdict in re.findall(
            r"Try (\d+): (\d+)\+(\d+)=(\d+) mod (\d+)=(\d+), (no|yes)\. ", row["response"]
        ):
            x = int(x)
            assert [a * x, b, a * x + b, p, (a * x + b) % p] == [int(ax), int(b_), int(total), int(p_), int(rest)]
            assert (verdict == "yes") == (int(rest) == 0)
        answer = re.fullmatch(r"<think>.*</think>\\boxed\{(\d+)\}", row["response"])
        assert answer is not None
        correct += answer[1] == questions[row["prompt"]]
    assert 0.52 < correct / len(rows) < 0.60


def test_tokenizer_round_trip_in_one_piece_and_streamed(out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    rng = random.Random(0)
    for problem in problems(0)[0][:100]:
        text = trace(problem, rng)
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        stream = DecodeStream(skip_special_tokens=True)  # what vLLM detokenises with
        assert "".join(stream.step(tokenizer._tokenizer, i) or "" for i in ids) == text
        assert tokenizer.convert_ids_to_tokens(ids)[-3] == str(re.findall(r"\d+", text)[-1])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Find x: 9x+9=0 mod 8"}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.convert_ids_to_tokens(chat) == [
        "<|user|>", "Find x: ", "9", "x+", "9", "=", "0", " mod ", "8", "<|assistant|>",
    ]  # fmt: skip


def test_model_loads_and_stops_at_the_end_token(out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert 150_000 < model.num_parameters() < 160_000


def test_same_seed_same_bytes(out: Path, tmp_path: Path) -> None:
    write(QuickstartDataConfig(out=tmp_path, num_sft_samples=3000, seed=3))
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert all((tmp_path / f).read_bytes() == (out / f).read_bytes() for f in files)
    write(QuickstartDataConfig(out=tmp_path, num_sft_samples=10, seed=4))  # a rerun replaces
    assert (tmp_path / "model/model.safetensors").read_bytes() != (out / "model/model.safetensors").read_bytes()
