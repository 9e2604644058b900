"""Readers of questions, examples, sets and graded rows."""

from __future__ import annotations

import csv
import datetime
import io
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_t1 import curate, grade
from megatron_t1.config import CurateConfig
from megatron_t1.data.config import DataConfig
from megatron_t1.data.prompts import Question, load_prompts, load_questions, load_sft, load_texts
from megatron_t1.data.sets import load_set
from megatron_t1.data.template import Template
from megatron_t1.evaluation.samplers import StoredSampler
from megatron_t1.types import Prompt, TrainSequence
from tests.fuzz.damage import spoil, spoil_bytes
from tests.fuzz.reader import (
    Damage,
    Reader,
    check_ids,
    from_file,
    is_text,
    json_damage,
    jsonl,
    jsonl_damage,
    lines_of,
    must,
)

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
            says=lines_of(file),
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
