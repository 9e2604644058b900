"""Every reader of what others wrote: valid inputs, how it is called, what may come of a damaged one."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import datetime
import hashlib
import io
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_t1 import curate, grade, lock, logprobs
from megatron_t1.cli import options
from megatron_t1.config import Config, CurateConfig
from megatron_t1.data.config import DataConfig
from megatron_t1.data.prompts import Question, load_prompts, load_questions, load_sft, load_texts
from megatron_t1.data.sets import load_set
from megatron_t1.data.template import Template
from megatron_t1.evaluation import results
from megatron_t1.evaluation.resume import check_settings
from megatron_t1.evaluation.samplers import StoredSampler
from megatron_t1.files import read_jsonl
from megatron_t1.models import spec_of
from megatron_t1.rollout import chat_endpoint, reply
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.rollout.finished_samples import Bank
from megatron_t1.servers import server as servers
from megatron_t1.servers.keys import read_key
from megatron_t1.servers.registry import Entry, Registry
from megatron_t1.servers.server import Server, ServerError
from megatron_t1.types import Prompt, Sample, TrainSequence
from megatron_t1.weights.hf_folder import HFFolder
from megatron_t1.weights.torch_dist import TorchDistReader
from tests.fuzz.damage import spoil, spoil_bytes, text_of
from tests.hostile import good_reply
from tests.tiny import ARCHITECTURES, CHAT_TEMPLATE, make_tiny_tokenizer


class ToldError(Exception):
    """Raised by a check: the reader says in its result, not by an error, that the input is damaged."""


Damage = Callable[[random.Random], tuple[bytes, str]]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One reader, ready to be asked."""

    name: str
    damaged: Damage
    """A damaged input and how it was damaged."""
    read: Callable[[bytes], Any]
    check: Callable[[Any], None]
    """Raises AssertionError for a result that is not what the reader promises."""
    errors: tuple[type[Exception], ...] = (ValueError,)
    says: str = ""
    """A pattern that an error's message must match: the file, with its line where it has lines."""
    seeds: Sequence[bytes] = ()
    """Undamaged inputs, which must be accepted."""


def json_damage(*seeds: Any) -> Damage:
    def damaged(rng: random.Random) -> tuple[bytes, str]:
        seed = rng.choice(seeds)
        if rng.random() < 0.35:
            return spoil_bytes(json.dumps(seed, ensure_ascii=False).encode(), rng)
        value, what = spoil(seed, rng)
        return text_of(value, rng), what

    return damaged


def jsonl_damage(rows: Sequence[dict[str, Any]]) -> Damage:
    def damaged(rng: random.Random) -> tuple[bytes, str]:
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        if rng.random() < 0.35:
            return spoil_bytes(b"\n".join(lines) + b"\n", rng)
        number = rng.randrange(len(rows))
        value, what = spoil(rows[number], rng)
        lines[number] = text_of(value, rng)
        return b"\n".join(lines) + b"\n", what

    return damaged


def jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def bytes_damage(*seeds: bytes) -> Damage:
    return lambda rng: spoil_bytes(rng.choice(seeds), rng)


def from_file(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    def read_bytes(data: bytes) -> Any:
        path.write_bytes(data)
        path.chmod(0o600)
        return read(path)

    return read_bytes


def must(true: object, shown: Any) -> None:
    assert true, shown


def is_text(value: Any) -> None:
    assert type(value) is str, value
    value.encode()


def _lines_of(name: str) -> str:
    return rf"{re.escape(name)}(:\d+: | has no lines|: \d+ ids)"


QUESTIONS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Was ist 2 + 2? ü", "answer": "4", "level": 3, "subject": "Algebra"},
    {"id": 7, "messages": [{"role": "user", "content": "x?"}], "answer": 0.5, "mode": "answer"},
    {"id": "c", "prompt": "Which?", "answer": "B", "mode": "mc", "choices": ["one", "two"]},
    {"id": "d", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "y"}], "answer": 12},
]


_NO_TEXT = ("nan", "inf", "-inf", "none")  # what `str` makes of values that are no answers


def check_questions(found: list[Question]) -> None:
    assert type(found) is list
    assert found
    for question in found:
        assert type(question) is Question
        for text in (question.id, question.gold, question.text, *question.choices):
            is_text(text)
        must(question.gold.strip() and question.gold.lower() not in _NO_TEXT, question.gold)
        assert question.mode in ("answer", "response", "text", "mc")
        assert type(question.meta) is dict
        assert type(question.choices) is tuple
        for message in question.messages:
            assert set(message) >= {"role", "content"}
            is_text(message["content"])
    assert len({question.id for question in found}) == len(found)


def check_ids(ids: Any, least: int = 1) -> None:
    must(isinstance(ids, np.ndarray) and ids.dtype == np.int64 and ids.ndim == 1 and len(ids) >= least, ids)


def check_prompts(found: list[Prompt]) -> None:
    for prompt in found:
        assert type(prompt) is Prompt
        check_ids(prompt.token_ids)
        is_text(prompt.id), is_text(prompt.gold)


def check_sequences(found: list[TrainSequence]) -> None:
    assert found
    for sequence in found:
        check_ids(sequence.prompt_ids)
        check_ids(sequence.response_ids)


def question_readers(tmp: Path, model: Path) -> list[Reader]:
    template = Template(model)
    sft = [
        {"prompt": "2 + 2? ü", "response": "<think>x</think>4"},
        {"messages": [{"role": "user", "content": "q"}], "response": "r"},
    ]
    texts = [
        {"text": "some text"},
        {"token_ids": [1, 2, 3, 4], "num_prompt_tokens": 2},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "q", "response": "r"},
    ]
    pairs = [
        {"id": "a", "gold": "4", "prediction": "\\boxed{4}", "mode": "answer", "finish_reason": "stop"},
        {"id": 2, "answer": 0.5, "response": "0.5", "question": "?", "choices": ["x", "y"]},
        {"id": 3, "gold": 12, "prediction": 12},
    ]
    stored = [
        {"id": "a", "response": "x", "num_tokens": 3, "finish_reason": "stop"},
        {"id": 2, "response": "", "num_tokens": None},
    ]
    raw = [
        {"id": "a", "problem": "2 + 2?", "answer": "4", "source": "s"},
        {"problem": "3 + 3?", "solution": "so \\boxed{6}"},
        {"prompt": "4 + 4?", "answer": 8},
    ]

    def check_pairs(found: list[grade.Row]) -> None:
        for row in found:
            prompt, sample = row.prompt, row.sample
            assert type(row.id) in (str, int), row.id
            for text in (prompt.id, prompt.gold, prompt.text, sample.text, *prompt.choices):
                assert type(text) is str  # with halves of surrogate pairs as a model writes them
            assert prompt.gold.lower() not in _NO_TEXT, prompt.gold

    def check_stored(found: StoredSampler) -> None:
        for name, rows in found._stored.items():
            is_text(name)
            for row in rows:
                is_text(row["response"])
                assert type(row["num_tokens"]) is int
                assert row["num_tokens"] >= 0
                assert row["finish_reason"] in ("stop", "length")

    def raw_questions(path: Path) -> Any:
        cfg = CurateConfig()
        return [
            (curate._question_of(cfg, row), curate._answer_of(cfg, row), curate._name_of(cfg, row, path, number))
            for number, row in curate._rows(path)
        ]

    def check_raw(found: list[tuple[str, str, str]]) -> None:
        for question, answer, name in found:
            is_text(question), is_text(answer), is_text(name)
            assert answer.lower() not in _NO_TEXT, answer

    def lines(name: str, rows: list[dict[str, Any]], read: Callable[[Path], Any], check: Any, **more: Any) -> Reader:
        file = f"{name}.jsonl"
        return Reader(
            name=name,
            damaged=jsonl_damage(rows),
            read=from_file(tmp / file, read),
            check=check,
            says=_lines_of(file),
            seeds=[jsonl(rows)],
            **more,
        )

    return [
        lines("prompts", QUESTIONS, lambda path: load_prompts(path, template, DataConfig()), check_prompts),
        lines("questions", QUESTIONS, load_questions, check_questions),
        lines("sft", sft, lambda path: load_sft(path, template, DataConfig()), check_sequences),
        lines("texts", texts, lambda path: load_texts(path, model), check_sequences),
        lines("set_jsonl", SET, lambda path: load_set(str(path)), check_questions),
        lines("grade", pairs, lambda path: grade._read(path, None), check_pairs),
        lines("stored", stored, lambda path: StoredSampler(path, None), check_stored),  # type: ignore[arg-type]
        lines("curate", raw, raw_questions, check_raw),
    ]


SET: list[dict[str, Any]] = [
    {"problem": "2 + 2? ü", "answer": "4", "level": 3, "subject": "Algebra", "unique_id": "test/1"},
    {"Problem": "3 + 3?", "Answer": 6, "ID": "2024-I-1"},
    {"problem": "x", "answer": "\\frac{1}{2}", "difficulty": 4.5, "domain": ["Mathematics -> Algebra -> Other"]},
    {"question": "how many?", "answer": "so many\n#### 1,800"},
    {"Question": "which?", "Correct Answer": "a", "Incorrect Answer 1": "b", "Incorrect Answer 2": "c"},
]


def set_readers(tmp: Path) -> list[Reader]:
    import pyarrow as pa
    from pyarrow import parquet

    columns = ["id", "problem", "answer", "level"]
    rows = [["a", "2 + 2? ü", "4", "3"], ["b", 'say "x",\nplease', "x", ""], ["c", "3?", "3.5", "1"]]

    def as_csv(table: list[list[str]]) -> bytes:
        out = io.StringIO()
        csv.writer(out).writerows(table)
        return out.getvalue().encode("utf-8", "surrogatepass")

    def csv_damage(rng: random.Random) -> tuple[bytes, str]:
        table = [columns, *rows]
        if rng.random() < 0.6:
            return spoil_bytes(as_csv(table), rng)
        value, what = spoil(table, rng)
        if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
            value = [columns, ["a", str(value)]]
        return as_csv([["" if cell is None else str(cell) for cell in row] for row in value]), what

    def as_parquet(table: list[dict[str, Any]], **more: Any) -> bytes:
        out = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(table), out, **more)
        return out.getvalue().to_pybytes()

    plain = [dict(zip(columns, row, strict=True)) for row in rows]
    sound = as_parquet(plain, write_page_checksum=True), as_parquet(plain * 1, compression="gzip"), as_parquet(plain)
    odd = [b"x", 1.5, float("nan"), None, True, [1], {"a": 1}, 10**18, datetime.date(2024, 1, 1)]

    def parquet_damage(rng: random.Random) -> tuple[bytes, str]:
        if rng.random() < 0.8:
            data = rng.choice(sound)
            if rng.random() < 0.5:  # the index at the end says where everything is and how large
                at = len(data) - rng.randrange(1, 600)
                return data[:at] + rng.randbytes(1) + data[at + 1 :], "byte of the footer"
            return spoil_bytes(data, rng)
        name, value = rng.choice(columns), rng.choice(odd)
        return as_parquet([{**row, name: value} for row in plain]), "other type"

    def reader(kind: str, damaged: Damage, seeds: Sequence[bytes]) -> Reader:
        path = tmp / f"set.{kind}"
        return Reader(
            name=kind,
            damaged=damaged,
            read=from_file(path, lambda path: load_set(str(path))),
            check=check_questions,
            says=re.escape(path.name) + r"(: |:\d+: | has no lines| can't be read as| is not UTF-8)",
            seeds=seeds,
        )

    return [
        reader("csv", csv_damage, [as_csv([columns, *rows])]),
        reader("json", json_damage(SET, {"data": SET}), [json.dumps(SET).encode()]),
        reader("parquet", parquet_damage, sound),
    ]


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


def model_readers(tmp: Path, model: Path) -> list[Reader]:
    import torch
    import transformers
    from safetensors.torch import save

    configs = []
    for name, fields in ARCHITECTURES.items():
        made = getattr(transformers, name).config_class(hidden_size=128, num_attention_heads=4, **fields)
        configs.append({**json.loads(made.to_json_string()), "architectures": [name], "vocab_size": 320})
    own = tmp / "model"
    own.mkdir()

    def check_spec(spec: Any) -> None:
        whole = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        for name in (*whole, "kv_channels"):
            must(type(spec.transformer[name]) is int and 0 < spec.transformer[name] < 1 << 31, name)
        for name, value in spec.transformer.items():
            if "experts" in name or "topk" in name or "ffn_hidden" in name or "intermediate" in name:
                assert value is None or type(value) in (int, float), (name, value)
        for number in (spec.vocab_size, spec.max_position_embeddings):
            assert type(number) is int
            assert number > 0
        for number in (spec.rotary_base, spec.rotary_fraction, spec.transformer["layernorm_epsilon"]):
            must(type(number) is float and math.isfinite(number) and number > 0, number)
        assert type(spec.tied_embeddings) is bool

    tensors = {"a": torch.ones(2, 3), "b": torch.arange(4), "c": torch.zeros(5, dtype=torch.bfloat16)}
    single = save(tensors)
    length = int.from_bytes(single[:8], "little")
    header, body = json.loads(single[8 : 8 + length]), single[8 + length :]

    def safetensors_damage(rng: random.Random) -> tuple[bytes, str]:
        if rng.random() < 0.4:
            return spoil_bytes(single, rng)
        if rng.random() < 0.15:
            size = rng.choice((0, 1, length - 1, length + 8, 2**31, 2**63, 2**64 - 1))
            return size.to_bytes(8, "little") + single[8:], "size of the header"
        value, what = spoil(header, rng)
        text = text_of(value, rng)
        return len(text).to_bytes(8, "little") + text + body, what

    def read_folder(folder: Path) -> Any:
        opened = HFFolder(folder)
        return {name: opened.read(name) for name in opened.tensors}

    def check_tensors(found: dict[str, Any]) -> None:
        assert sum(tensor.nbytes for tensor in found.values()) <= len(body)
        for name in found:
            is_text(name)

    def folder(name: str, files: dict[str, bytes]) -> Path:
        made = tmp / name
        made.mkdir()
        for file, data in files.items():
            (made / file).write_bytes(data)
        return made

    index = {"metadata": {"total_size": 50}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    sharded = folder(
        "sharded", {"x.safetensors": save({"a": tensors["a"]}), "y.safetensors": save({"b": tensors["b"]})}
    )
    one = folder("single", {})
    torch_dist = folder("torch_dist", {})
    tokens = folder("tokens", {path.name: path.read_bytes() for path in model.iterdir() if "token" in path.name})
    (tokens / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    as_json = json.loads((tokens / "tokenizer.json").read_text())
    named = json.loads((tokens / "tokenizer_config.json").read_text())

    def template(path: Path) -> Any:
        found = Template(path.parent)
        return found, found.prompt_ids([{"role": "user", "content": "Why <|im_end|>? ü"}]), found.response_ids(["x"])

    def check_template(found: Any) -> None:
        made, prompt, (response,) = found
        check_ids(prompt, 0)
        check_ids(response)
        assert type(made.eos_token_id) is int
        assert 0 <= made.eos_token_id < len(made.tokenizer)
        assert all(0 <= token < len(made.tokenizer) for token in [*prompt, *response])

    def tokenizer_file(name: str, damaged: Damage, path: Path, seeds: Sequence[bytes]) -> Reader:
        sound = path.read_bytes() if path.exists() else None

        def read(data: bytes) -> Any:
            try:
                return from_file(path, template)(data)
            finally:
                path.unlink() if sound is None else path.write_bytes(sound)

        return Reader(name=name, damaged=damaged, read=read, check=check_template, says=str(tokens), seeds=seeds)

    def check_named(found: dict[str, Any]) -> None:
        assert found.keys() <= tensors.keys()  # that none is missing is checked against config.json

    def read_index(path: Path) -> TorchDistReader:
        return TorchDistReader(path.parent)

    def check_index(found: TorchDistReader) -> None:
        for key in sorted(found.keys()):
            is_text(key)
            assert all(type(size) is int and size >= 0 for size in found.shape(key))
            assert isinstance(found.dtype(key), torch.dtype)

    from megatron_t1.weights.torch_dist import Box, TorchDistWriter

    writer = TorchDistWriter(torch_dist)
    writer.write(Box("a", (0, 0), (2, 3)), tensors["a"], full_shape=(2, 3), file_name="f")
    writer.write(Box("b", (0,), (4,)), tensors["b"], full_shape=(4,), file_name="f")
    writer.finish()
    metadata = (torch_dist / ".metadata").read_bytes()
    stored = (torch_dist / "f.distcp").read_bytes()

    def read_stored(path: Path) -> Any:
        reader = TorchDistReader(path.parent)
        a, b = torch.empty(2, 3), torch.empty(4, dtype=torch.int64)
        reader.read(Box("a", (0, 0), (2, 3)), a)
        reader.read(Box("b", (0,), (4,)), b)
        return {"a": a, "b": b}

    return [
        Reader(
            name="config.json",
            damaged=json_damage(*configs),
            read=from_file(own / "config.json", lambda path: spec_of(path.parent)),
            check=check_spec,
            says=r"config\.json",
            seeds=[json.dumps(config).encode() for config in configs],
        ),
        Reader(
            name="safetensors",
            damaged=safetensors_damage,
            read=from_file(one / "model.safetensors", lambda path: read_folder(path.parent)),
            check=check_tensors,
            says=r"model\.safetensors",
            seeds=[single],
        ),
        Reader(
            name="index.json",
            damaged=json_damage(index),
            read=from_file(sharded / "model.safetensors.index.json", lambda path: read_folder(path.parent)),
            check=check_named,
            says=r"sharded",
            seeds=[json.dumps(index).encode()],
        ),
        tokenizer_file("tokenizer.json", json_damage(as_json), tokens / "tokenizer.json", []),
        tokenizer_file("tokenizer_config.json", json_damage(named), tokens / "tokenizer_config.json", []),
        tokenizer_file(
            "chat_template",
            bytes_damage(CHAT_TEMPLATE.encode()),
            tokens / "chat_template.jinja",
            [CHAT_TEMPLATE.encode()],
        ),
        Reader(
            name="torch_dist",
            damaged=bytes_damage(metadata),
            read=from_file(torch_dist / ".metadata", read_index),
            check=check_index,
            says=r"torch_dist/\.metadata",
            seeds=[metadata],
        ),
        Reader(
            name="distcp",
            damaged=bytes_damage(stored),
            read=lambda data: (
                (torch_dist / ".metadata").write_bytes(metadata),
                from_file(torch_dist / "f.distcp", read_stored)(data),
            )[1],
            check=lambda found: None,
            says=r"torch_dist",
            seeds=[stored],
        ),
    ]


def state_readers(tmp: Path) -> list[Reader]:
    from megatron_t1.engine import checkpoint

    folder = tmp / "rl" / "step_00000003"
    folder.mkdir(parents=True)
    (folder / "a.distcp").write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    state = {"step": 3, "score": -1.5, "files": {"a.distcp": [3, digest]}, "experts_apart": False, "seed": 1}
    state |= {"settings": {"seed": 1, "rl.optim": {"lr": 1e-6}}}
    metrics = [{"step": 1, "loss": 1.5}, {"step": 2, "loss": float("nan")}]
    responses = [
        {"id": "a", "sample": 0, "response": "x", "reward": {"correct": True, "outcome": "correct"}},
        {"id": "a", "sample": 1, "response": "y", "reward": {"correct": False, "outcome": "wrong"}},
    ]
    settings = {"weights": "ab", "sampling": {"temperature": 1.2}, "seed": 1}
    summary = {
        "settings": {"step": 3}, "label": "rl", "set": "x", "num_samples": 4, "pass_at_1": 0.5, "interval": [0.4, 0.6],
    }  # fmt: skip
    entry = {"url": "http://host:8000", "start": "ab", "log": "/logs/x"}
    key = b"abcdefghijklmnopqrstuvwxyz_-012345"
    owner = {
        "host": "h",
        "boot": "b",
        "processes": "pid:[1]",
        "process": 1,
        "started": 2,
        "job": "",
        "turn": "",
        "id": "ab",
    }
    (tmp / "registry").mkdir()
    (tmp / "eval").mkdir()
    set_folder = tmp / "evaluate" / "rl" / "x"
    set_folder.mkdir(parents=True)

    def read_state(path: Path) -> Any:
        state = checkpoint._state(path.parent)
        return state, checkpoint._spoiled(path.parent, state.get("files", {}), 0, 1)

    def check_state(found: tuple[dict[str, Any], dict[str, str]]) -> None:
        state, problems = found
        if not state or problems:
            raise ToldError
        must(type(state["step"]) is int and state["files"], state)
        assert type(state.get("settings", {})) is dict
        assert type(state.get("experts_apart", False)) is bool
        assert type(state.get("score", 0)) in (int, float)

    def check_rows(found: list[dict[str, Any]]) -> None:
        assert type(found) is list
        assert all(type(row) is dict for row in found)

    def check_verdicts(found: dict[str, dict[str, list[bool]]]) -> None:
        for name, verdicts in found["eval"].items():
            is_text(name)
            assert all(type(verdict) is bool for verdict in verdicts)

    def check_entries(found: dict[str, Entry]) -> None:
        for entry in found.values():
            must(type(entry) is Entry and entry.url.startswith("http://"), entry)
            is_text(entry.url), is_text(entry.log), is_text(entry.start)

    def check_key(found: str) -> None:
        assert re.fullmatch(r"[!-~]+", found), found

    def read_lock(path: Path) -> Any:
        other = lock._read(path)
        return other, lock._describe(other), lock._why_gone(path, other, lock._me())

    def check_lock(found: Any) -> None:
        if found[0] is None:
            raise ToldError
        is_text(found[1])

    bank = Bank(tmp / "bank")
    sample = Sample(
        token_ids=np.array([1, 2]),
        logprobs=np.array([-1.0, -2.0], np.float32),
        text="x",
        finish_reason="stop",
        weight_versions=((0, 0, 2),),
        server="http://x",
    )
    bank.step(1, "same").add("p", [5], 0, [sample])
    banked = (tmp / "bank" / "step_00000001.jsonl").read_bytes()
    banked_rows = [json.loads(banked)]

    def check_banked(found: list[Sample] | None) -> None:
        for sample in found or ():
            check_ids(sample.token_ids)
            assert sample.logprobs.dtype == np.float32
            assert len(sample.logprobs) == len(sample.token_ids)
            assert np.isfinite(sample.logprobs).all()
            is_text(sample.text)
            assert sample.finish_reason in ("stop", "length")

    def reader(name: str, damaged: Damage, path: Path, read: Any, check: Any, seed: bytes, **more: Any) -> Reader:
        return Reader(
            name=name,
            damaged=damaged,
            read=from_file(path, read),
            check=check,
            seeds=[seed],
            **{"says": path.name, **more},
        )

    def dumped(value: Any) -> bytes:
        return json.dumps(value).encode()

    return [
        reader("state.json", json_damage(state), folder / "state.json", read_state, check_state, dumped(state)),
        reader("metrics", jsonl_damage(metrics), tmp / "metrics.jsonl", read_jsonl, check_rows, jsonl(metrics),
               says=r"metrics\.jsonl:\d+: "),
        reader("responses", jsonl_damage(responses), tmp / "eval" / "responses.jsonl",
               lambda path: results._by_set(path.parent), check_verdicts, jsonl(responses),
               says=r"responses\.jsonl:\d+: "),
        reader("settings.json", json_damage(settings), tmp / "settings.json",
               lambda path: check_settings(path, settings, resume=True, elsewhere="another"),
               lambda found: None, dumped(settings), says=re.escape(str(tmp))),
        reader("summary.json", json_damage(summary), set_folder / "summary.json",
               lambda path: results.table(results.read_summaries(tmp)), is_text, dumped(summary)),
        reader("bank", jsonl_damage(banked_rows), tmp / "bank" / "step_00000001.jsonl",
               lambda path: bank.step(1, "same").find([5], 0, 1), check_banked, banked,
               says=r"step_00000001\.jsonl(:\d+: | holds damaged samples)"),
        reader("registry", json_damage(entry), tmp / "registry" / "s.json",
               lambda path: Registry(path.parent).entries(), check_entries, dumped(entry), errors=(ServerError,)),
        reader("key", bytes_damage(key), tmp / "server_key", read_key, check_key, key, errors=(ServerError,)),
        reader("lock", json_damage(owner), tmp / "lock.json", read_lock, check_lock, dumped(owner)),
    ]  # fmt: skip


class Words:
    """A tokenizer that is quick."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, token_ids))


def reply_readers(tmp: Path) -> list[Reader]:
    server = Server(url="http://host:1", key="k")
    request = reply.Request("question a", [1, 2], 2, 0, SamplingConfig(max_new_tokens=4, num_samples=2))
    generated = good_reply({"sampling_params": {"n": 2}})
    chat = {
        "choices": [
            {"message": {"role": "assistant", "content": "4", "reasoning_content": "x"}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    }
    parts = {
        "choices": [
            {
                "message": {"content": [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "4"}]},
                "finish_reason": None,
            }
        ]
    }
    scored = {"choices": [{"prompt_logprobs": [None, {"2": {"logprob": -1.0}}, {"3": {"logprob": -2.5}}]}]}
    text = TrainSequence(prompt_ids=np.array([1]), response_ids=np.array([2, 3]))
    models = {"data": [{"id": "m", "max_model_len": 512}]}

    def check_samples(samples: list[Sample]) -> None:
        assert len(samples) == 2
        for sample in samples:
            check_ids(sample.token_ids)
            assert len(sample.logprobs) == len(sample.token_ids)
            assert np.isfinite(sample.logprobs).all()
            assert sample.finish_reason in ("stop", "length")
            spans = sample.weight_versions
            must(spans and all(start < end for _, start, end in spans), spans)

    def check_reply(found: chat_endpoint.Reply) -> None:
        is_text(found.text)
        assert found.finish_reason in ("stop", "length")
        assert type(found.num_tokens) is int
        assert type(found.num_prompt_tokens) is int

    def by_server(data: bytes) -> np.ndarray:
        with _answering({"/v1/models": json.dumps(models).encode(), "/v1/completions": data}):
            return logprobs._by_server(server, text)

    def introduce(data: bytes) -> Server:
        about: dict[str, bytes] = {
            "/resume": b"",
            "/is_paused": b'{"is_paused": false}',
            "/weight_info": b'{"weight_version": "3"}',
        }
        about["/v1/models"] = json.dumps(models).encode()
        path, _, body = data.partition(b" ")
        with _answering({**about, path.decode(): body}):
            fresh = Server(url="http://host:1", key="k")
            fresh.introduce()
            return fresh

    def introduced(rng: random.Random) -> tuple[bytes, str]:
        path, value = rng.choice([
            ("/is_paused", {"is_paused": False}), ("/weight_info", {"weight_version": "3"}), ("/v1/models", models),
        ])  # fmt: skip
        body, what = json_damage(value)(rng)
        return path.encode() + b" " + body, what

    def check_server(found: Server) -> None:
        assert type(found.max_model_len) is int
        assert found.max_model_len > 0
        assert type(found.version) is int
        assert found.version >= 0

    def check_logprobs(found: np.ndarray) -> None:
        assert found.dtype == np.float32
        assert found.shape == (2,)

    return [
        Reader(
            name="reply",
            damaged=json_damage(generated),
            read=lambda data: reply.samples_of(data, server, request, 0, Words(), 320),
            check=check_samples,
            errors=(ServerError, reply.AbortedError, reply.RestartedError),
            says=r"server host:1|^$|lost version",
            seeds=[json.dumps(generated).encode()],
        ),
        Reader(
            name="endpoint",
            damaged=json_damage(chat, parts),
            read=lambda data: asyncio.run(_asked(data)),
            check=check_reply,
            errors=(chat_endpoint.RefusedError, chat_endpoint.NoAnswerError),
            says=r"finish_reason|m at http://host:1",
            seeds=[json.dumps(chat).encode(), json.dumps(parts).encode()],
        ),
        Reader(
            name="server_logprobs",
            damaged=json_damage(scored),
            read=by_server,
            check=check_logprobs,
            errors=(ServerError,),
            says=r"server host:1",
            seeds=[json.dumps(scored).encode()],
        ),
        Reader(
            name="introduce",
            damaged=introduced,
            read=introduce,
            check=check_server,
            errors=(ServerError,),
            says=r"server host:1",
            seeds=[b"/v1/models " + json.dumps(models).encode()],
        ),
    ]


def _answering(answers: dict[str, bytes]) -> Any:
    """Servers' HTTP connections end here."""

    class Opener:
        def open(self, request: Any, timeout: float) -> Any:
            return io.BytesIO(answers[request.selector])

    patched = pytest.MonkeyPatch()
    patched.setattr(servers, "_OPENER", Opener())

    class Undone:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            patched.undo()

    return Undone()


async def _asked(data: bytes) -> chat_endpoint.Reply:
    """What `ask` makes of a reply with status 200."""

    class Content:
        async def iter_any(self) -> Any:
            yield data

    class Response:
        status = 200
        content = Content()

        async def __aenter__(self) -> Response:
            return self

        async def __aexit__(self, *_: object) -> None: ...

    class Session:
        def post(self, *_: object, **__: object) -> Response:
            return Response()

    asked = chat_endpoint.ChatEndpoint(
        chat_endpoint.EndpointConfig(urls=("http://host:1",), model="m", max_retries=0), ""
    )
    asked._session = Session()  # type: ignore[assignment]
    asked._count = lambda *_: None  # type: ignore[method-assign]
    return await asked.ask([{"role": "user", "content": "?"}], max_new_tokens=4)


def all_readers(tmp: Path) -> list[Reader]:
    model = tmp / "tokenizer"
    make_tiny_tokenizer(model)
    return [
        *question_readers(tmp, model),
        *set_readers(tmp),
        config_reader(tmp),
        *model_readers(tmp, model),
        *state_readers(tmp),
        *reply_readers(tmp),
    ]
