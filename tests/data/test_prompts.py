"""Data files: tokenised as the chat template says, and every bad line named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_t1.data.config import DataConfig
from megatron_t1.data.prompts import load_prompts, load_sft
from megatron_t1.data.quickstart import build_tokenizer
from megatron_t1.data.template import Template


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return Template(folder)


def file(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def errors(tmp_path: Path, template: Template, *lines: Any) -> str:
    with pytest.raises(ValueError, match="bad lines") as caught:
        load_prompts(file(tmp_path, *lines), template, DataConfig())
    return str(caught.value).replace(str(tmp_path), "")


GOOD = {"id": "q", "prompt": "Find x: 9x+9=0 mod 8", "answer": 7}


def test_questions_go_through_the_chat_template(tmp_path: Path, template: Template) -> None:
    turns = [{"role": r, "content": c} for r, c in (("user", "Try 1"), ("assistant", "1"), ("user", "Try 2"))]
    path = file(
        tmp_path,
        {**GOOD, "level": 5},
        "",
        {"id": 2, "messages": turns, "answer": "2", "mode": "mc", "choices": ["a", "b"]},
    )
    first, second = load_prompts(path, template, DataConfig())
    assert (first.id, first.text, first.gold, first.mode, first.meta) == (
        "q",
        GOOD["prompt"],
        "7",
        "response",
        {"level": 5},
    )
    assert template.tokenizer.decode(first.token_ids) == "<|user|>Find x: 9x+9=0 mod 8<|assistant|>"
    assert (second.id, second.text, second.mode, second.choices) == ("2", "Try 2", "mc", ("a", "b"))
    assert template.tokenizer.decode(second.token_ids) == "<|user|>Try 1<|assistant|>1<|end|><|user|>Try 2<|assistant|>"


def test_null_is_what_is_not_there(tmp_path: Path, template: Template) -> None:
    """Tables write it in every row that lacks a column of others."""
    turns = [{"role": "user", "content": "Try 2"}]
    nulls = {"mode": None, "choices": None}
    path = file(
        tmp_path,
        {**GOOD, **nulls, "messages": None},
        {"id": "m", "prompt": None, "messages": turns, "answer": 1, **nulls},
    )
    first, second = load_prompts(path, template, DataConfig())
    assert (first.text, first.mode, first.choices) == (GOOD["prompt"], "response", ())
    assert (second.text, second.mode, second.choices) == ("Try 2", "response", ())


def test_system_prompt_comes_first_unless_the_line_has_one(tmp_path: Path, template: Template, monkeypatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(template, "prompt_ids", lambda messages: seen.append(messages))
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    path = file(tmp_path, GOOD, {"id": "s", "messages": own, "answer": "1"})
    load_prompts(path, template, DataConfig(system_prompt="box it"))
    assert [messages[0] for messages in seen] == [{"role": "system", "content": "box it"}, own[0]]


def test_sft_examples_end_with_the_end_token(tmp_path: Path, template: Template) -> None:
    pairs = [(f"Find x: {i}", f"<think>Try {j}</think>\\boxed{{{j}}}") for i in range(3) for j in range(700)]
    path = file(tmp_path, *({"prompt": p, "response": r.replace("699", "120")} for p, r in pairs))
    found = load_sft(path, template, DataConfig())
    assert len(found) == len(pairs)
    decode = template.tokenizer.decode
    assert decode(found[705].prompt_ids) == "<|user|>Find x: 1<|assistant|>"
    assert decode(found[705].response_ids) == "<think>Try 5</think>\\boxed{5}<|end|>"
    assert decode(found[-1].response_ids).endswith("\\boxed{120}<|end|>")


def test_an_sft_example_may_be_a_conversation_that_ends_with_the_response(tmp_path: Path, template: Template) -> None:
    user, said = {"role": "user", "content": "Find x: 7"}, "<think>Try 5</think>\\boxed{5}"
    apart = {"messages": [user], "response": said}
    whole = {"messages": [user, {"role": "assistant", "content": said}]}
    earlier = {"messages": [user, {"role": "assistant", "content": "7"}, user, {"role": "assistant", "content": said}]}
    rows = (apart, whole, {**whole, "prompt": None, "response": None, "answer": "5"}, earlier)
    found = load_sft(file(tmp_path, *rows), template, DataConfig(system_prompt="Be brief."))
    ids = [(example.prompt_ids.tolist(), example.response_ids.tolist()) for example in found]
    assert ids[0] == ids[1] == ids[2]
    assert ids[3][1] == ids[0][1]
    assert template.tokenizer.decode(ids[3][0]).count("Find x: 7") == 2
    for odd in ([user], [{"role": "assistant", "content": said}], [user, {"role": "assistant", "content": " "}], ["x"]):
        with pytest.raises(ValueError, match=r"data.jsonl:2: "):
            load_sft(file(tmp_path, apart, {"messages": odd}), template, DataConfig())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "must be an object"),
        ({"prompt": "q", "answer": "1"}, '"id" is missing'),
        ({"id": "a", "answer": "1"}, 'either "prompt" or "messages"'),
        ({"id": "a", "prompt": "q"}, '"answer" is missing'),
        ({"id": "a", "prompt": ["q"], "answer": "1"}, '"prompt" is'),
        ({"id": "a", "prompt": "q", "answer": True}, '"answer" is True'),
        ({"id": "a", "prompt": "q", "answer": "1", "mode": "guess"}, "mode="),
        ({"id": "a", "prompt": "q", "answer": "1", "choices": "AB"}, '"choices" must'),
        ({"id": "a", "messages": [{"role": "robot", "content": "q"}], "answer": "1"}, '"messages" must'),
        ({"id": "a", "messages": [{"role": "assistant", "content": "q"}], "answer": "1"}, '"messages" must'),
        ({"id": "a", "messages": [{"role": "user", "content": " \n"}], "answer": "1"}, "the last of the user"),
        ({"id": "a", "prompt": "\ud800", "answer": "1"}, "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        (GOOD, "already used in line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, template: Template, line: Any, why: str) -> None:
    message = errors(tmp_path, template, GOOD, line)
    assert "/data.jsonl:2: " in message
    assert why in message


def test_all_bad_lines_are_counted_and_ten_are_shown(tmp_path: Path, template: Template) -> None:
    message = errors(tmp_path, template, GOOD, *["{"] * 25)
    assert "25 bad lines" in message
    assert message.count("data.jsonl:") == 10
    assert "15 more" in message


def test_a_template_that_refuses_names_the_line(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    tokenizer.save_pretrained(tmp_path / "model")
    assert ":1: the chat template refuses these messages: no such role" in errors(
        tmp_path, Template(tmp_path / "model"), GOOD
    )


def test_folders_without_what_is_needed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer can't be loaded"):
        Template(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        Template(tmp_path)


def test_missing_empty_and_binary_files(tmp_path: Path, template: Template) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_prompts(tmp_path / "none.jsonl", template, DataConfig())
    with pytest.raises(ValueError, match="has no lines"):
        load_prompts(file(tmp_path), template, DataConfig())
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_prompts(tmp_path / "data.jsonl", template, DataConfig())
    with pytest.raises(ValueError, match=r"data\.train is not set"):
        DataConfig().need("train")
