"""Question sets: every known layout, local copies, and what is said when there is none."""

from __future__ import annotations

import csv
import datetime
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_t1.data.sets import NAMED, file_of, load_set
from tests.forks import ROOT


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_math500_by_name_from_a_local_copy() -> None:
    questions = load_set("math500", sets_dir=ROOT / "tests/data")
    assert len(questions) == 500
    first = questions[0]
    assert first.text.startswith("Convert the point $(0,3)$")
    assert first.text.endswith("\n\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert (first.gold, first.mode) == ("\\left( 3, \\frac{\\pi}{2} \\right)", "response")
    assert first.meta == {"level": "2", "subject": "Precalculus"}


def test_layouts_of_the_other_sets(tmp_path: Path) -> None:
    parquet.write_table(
        pyarrow.Table.from_pylist([{"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 1,234"}] * 1319),
        tmp_path / "gsm8k.parquet",
    )
    aimes = ({"ID": f"2024-I-{i}", "Problem": "p", "Solution": "s", "Answer": 204} for i in range(1, 31))
    write(tmp_path / "AIME_2024.jsonl", *aimes)
    domain = ["Mathematics -> Algebra -> Sequences"]
    omnis = [{"problem": "p", "answer": "2", "difficulty": 4.5, "domain": domain}] * 500
    write(tmp_path / "Omni-MATH/test.jsonl", *omnis)
    write(tmp_path / "own.jsonl", {"id": 7, "messages": [{"role": "user", "content": "hi"}], "answer": 3, "level": "x"})
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": [{"question": "q", "answer": "1"}]}))
    gsm8k, aime, omni, own, wrapped = (
        load_set(name, sets_dir=tmp_path, system_prompt="s")[0]
        for name in ("gsm8k", "aime2024", "omni_math_500", str(tmp_path / "own.jsonl"), str(tmp_path / "wrapped.json"))
    )
    assert (gsm8k.id, gsm8k.gold) == ("gsm8k-1", "1234")
    assert (aime.id, aime.gold) == ("2024-I-1", "204")
    assert omni.meta == {"level": "4.5", "subject": "Algebra"}
    assert (own.id, own.text, own.gold, own.meta["level"]) == ("7", "hi", "3", "x")
    assert (wrapped.id, wrapped.messages[0]["content"]) == ("wrapped-1", "s")


def test_an_id_of_zero_is_an_id(tmp_path: Path) -> None:
    rows = [{"id": 0, "problem": "p", "answer": "1"}, {"id": None, "problem": "p", "answer": "1"}]
    assert [question.id for question in load_set(str(write(tmp_path / "own.jsonl", *rows)))] == ["0", "own-2"]
    rows = [{"id": 0, "prompt": "p", "answer": "1"}, {"id": None, "prompt": "p", "answer": "1"}]
    assert [question.id for question in load_set(str(write(tmp_path / "ask.jsonl", *rows)))] == ["0", "ask-2"]


def test_the_hubs_own_folders_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `hf download --local-dir sets/gsm8k` makes them, whichever of the folders is given."""
    file = tmp_path / "sets/gsm8k/main/test-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"question": ["q"] * 1319, "answer": ["#### 18"] * 1319}), file)
    for other in ("gsm8k/socratic", "other/main"):
        (tmp_path / "sets" / other).mkdir(parents=True)
        parquet.write_table(pyarrow.table({"question": ["no"], "answer": ["1"]}), tmp_path / "sets" / other / file.name)
    write(tmp_path / "sets/MATH-500/test.jsonl", *[{"problem": "p", "answer": "1"}] * 500)
    for folder in ("sets", "sets/gsm8k", "sets/gsm8k/main"):
        assert len(load_set("gsm8k", sets_dir=tmp_path / folder)) == 1319
    for folder in ("sets", "sets/MATH-500"):
        assert len(load_set("math500", sets_dir=tmp_path / folder)) == 500
    monkeypatch.chdir(tmp_path / "sets/gsm8k")
    assert len(load_set("gsm8k", sets_dir=Path())) == 1319


def test_what_is_advised_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, named in NAMED.items():
        with pytest.raises(ValueError, match="hf download") as error:
            load_set(name, sets_dir=tmp_path)
        advised = re.search(r"--local-dir (\S+)`", str(error.value))
        assert advised
        path = tmp_path / advised[1] / named.file  # what the command makes
        path.parent.mkdir(parents=True)
        path.touch()
        assert file_of(name, tmp_path / "sets") == path


def test_a_larger_omni_math_gives_the_same_500_every_time(tmp_path: Path) -> None:
    path = tmp_path / "omni_math.jsonl"
    write(path, *({"id": i, "problem": f"p{i}", "answer": "1"} for i in range(4428)))
    ids = [question.id for question in load_set("omni_math_500", sets_dir=tmp_path)]
    assert len(set(ids)) == 500
    assert ids == [question.id for question in load_set("omni_math_500", sets_dir=tmp_path, seed=9)]


def test_gpqa_options_are_shuffled_by_seed_and_the_gold_follows(tmp_path: Path) -> None:
    names = [
        "Record ID",
        "Question",
        "Correct Answer",
        *(f"Incorrect Answer {i}" for i in (1, 2, 3)),
        "High-level domain",
    ]
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(names)
        rows.writerows([f"rec{i}", f"Which,\n{i}?", "right", "w1", "w2", "w3", "Physics"] for i in range(198))
    one, again, other = (load_set("gpqa", sets_dir=tmp_path, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert [question.gold for question in one] != [question.gold for question in other]
    assert {question.gold for question in one} == set("ABCD")
    for question in one:
        assert question.mode == "mc"
        assert question.choices["ABCD".index(question.gold)] == "right"
        assert f"({question.gold}) right" in question.text
        assert "the letter of the right option within \\boxed{}" in question.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math5000", "set 'math5000' is none of math500, aime2024"),
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("gpqa", r"hf download Idavidrein/gpqa gpqa_diamond.csv --repo-type dataset.*evaluate.sets_dir"),
    ],
)
def test_what_is_not_there_is_said_with_the_remedy(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=re.compile(message, re.S)):
        load_set(name, sets_dir=tmp_path)


def test_another_set_under_the_name_of_one_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "math500.jsonl", {"problem": "p", "answer": "1"})
    with pytest.raises(ValueError, match=r"math500.jsonl has 1 questions, the set math500 has 500"):
        load_set("math500", sets_dir=tmp_path)
    assert len(load_set(str(path))) == 1


def test_bad_rows_are_named_by_line(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", {"problem": "p", "answer": "1"}, {"problem": "p"}, {"answer": "1"})
    with pytest.raises(ValueError, match=r"bad.jsonl:2: no reference answer") as error:
        load_set(str(path))
    assert "bad.jsonl:3: no question" in str(error.value)
    same = {"id": "a", "problem": "p", "answer": "1"}
    with pytest.raises(ValueError, match="used twice, for example 'a'"):
        load_set(str(write(tmp_path / "same.jsonl", same, same)))
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="can't be read as parquet"):
        load_set(str(tmp_path / "broken.parquet"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (["4"], "a list; it must be text or a number"),
        ({"value": 4}, "a dict; it must be"),
        (True, "a bool; it must be"),
        (float("nan"), "no reference answer"),
        ("  ", "no reference answer"),
        (None, "no reference answer"),
    ],
)
@pytest.mark.parametrize("asked", ["problem", "prompt"])
def test_golds_that_are_neither_text_nor_a_number_are_named_by_line(
    tmp_path: Path, asked: str, answer: Any, message: str
) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"id": "a", asked: "2+2?", "answer": answer}))
    with pytest.raises(ValueError, match=f"odd.jsonl:1: .*{message}"):
        load_set(str(path))


@pytest.mark.parametrize("answer", [b"4", datetime.date(2024, 1, 1), float("nan"), [4], datetime.timedelta(1)], ids=str)
def test_parquet_types_that_are_no_answers_are_refused(tmp_path: Path, answer: Any) -> None:
    path = tmp_path / "odd.parquet"
    parquet.write_table(pyarrow.table({"problem": ["2+2?"], "answer": [answer]}), path)
    with pytest.raises(ValueError, match=r"odd.parquet:1: .*answer"):
        load_set(str(path))


def test_numbers_of_parquet_are_answers(tmp_path: Path) -> None:
    path = tmp_path / "good.parquet"
    for answer in (4, 0.5, Decimal("0.25")):
        parquet.write_table(pyarrow.table({"problem": ["2+2?"], "answer": [answer]}), path)
        assert load_set(str(path))[0].gold == str(answer)


def test_numbers_of_half_the_width_are_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "narrow.parquet"
    answers = pyarrow.array([0.1, 2.675, 1e-7, None, 204.0], pyarrow.float32())
    rows = {"problem": ["p"] * 5, "level": answers, "answer": ["1"] * 5}
    parquet.write_table(pyarrow.table(rows), path)
    levels = [question.meta["level"] for question in load_set(str(path))]
    assert [None if level is None else float(level) for level in levels] == [0.1, 2.675, 1e-7, None, 204.0]
    parquet.write_table(pyarrow.table({"problem": ["p"], "answer": answers[:1]}), path)
    assert load_set(str(path))[0].gold == "0.1"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_questions_with_a_list_of_options_are_asked_with_them(tmp_path: Path, suffix: str) -> None:
    """MMLU's rows name the right one by its number, MMLU-Pro's by its letter; others by its text."""
    mmlu = {"question": "2+2?", "subject": "arithmetic", "choices": ["1", "2", "4", "3"], "answer": 2}
    pro = {"question": "2+2?", "options": ["1", "2", "4", "3", "5"], "answer": "C", "answer_index": 2}
    text = {"problem": "2+2?", "options": ["one", "two", "four"], "answer": "four"}
    none = {"problem": "2+2?", "options": [], "answer": "four"}
    path = tmp_path / f"options.{suffix}"
    for row in (mmlu, pro, text, none):
        if suffix == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
        else:
            write(path, row, row)
        question = load_set(str(path))[1]
        if row is none:
            assert (question.mode, question.gold, question.choices) == ("response", "four", ())
            continue
        assert (question.mode, question.gold) == ("mc", "C")
        assert all(
            f"({letter}) {option}\n" in question.text for letter, option in zip("ABCDE", question.choices, strict=False)
        )
        assert "the letter of the right option within \\boxed{}" in question.text


def test_a_letter_is_that_of_an_option_also_where_letters_are_the_options(tmp_path: Path) -> None:
    row = {"question": "Which vitamin?", "options": ["B", "A", "C"], "answer": "A"}
    (question,) = load_set(str(write(tmp_path / "own.jsonl", row)))
    assert question.gold == "A"
    assert question.choices[0] == "B"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["1", "2"], "answer": 2}, "the answer is 2; it must be one of the 2 options"),
        ({"choices": ["1", "2"], "answer": "C"}, "the answer is 'C'; it must be one of the 2 options"),
        ({"options": ["1", "1"], "answer": "1"}, "the answer is '1'; it must be one of the 2 options"),
        ({"options": {"text": ["1"]}, "answer": "A"}, "they must be a list of texts"),
        ({"options": "A. 1 B. 2", "answer": "A"}, "they must be a list of texts"),
        ({"options": ["1"], "answer": "A"}, "there are 1 options; they must be 2 to 10"),
        ({"options": [str(i) for i in range(11)], "answer": "A"}, "there are 11 options"),
    ],
)
def test_options_of_which_none_is_named_are_refused_by_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "odd.jsonl", {"problem": "p", "answer": "1"}, {"question": "2+2?", **row})
    with pytest.raises(ValueError, match=f"odd.jsonl:2: .*{message}"):
        load_set(str(path))


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5*3=15\n#### 1,234,567.5", "1234567.5"),
        ("5*3=15\n####18", "18"),
        ("so ####  -7 ", "-7"),
        ("#### (1,200)", "(1200)"),
        ("#### 1,2,3", "1,2,3"),
        ("#### (1,2)", "(1,2)"),
        ("#### 3\nor so #### 4", "4"),
        ("a####b", "a####b"),
    ],
)
def test_what_stands_behind_the_mark_is_the_answer(tmp_path: Path, answer: str, gold: str) -> None:
    path = write(tmp_path / "marked.jsonl", {"question": "q", "answer": answer})
    assert load_set(str(path))[0].gold == gold


def test_a_copy_in_a_deeper_folder_is_not_taken_for_the_set(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}?", "answer": str(i)} for i in range(30)]
    for folder in ("", "a_backup", "a_backup/older"):
        (tmp_path / folder).mkdir(exist_ok=True)
        write(tmp_path / folder / "aime2024.jsonl", *({**row, "id": f"{folder}-{row['answer']}"} for row in rows))
    assert load_set("aime2024", sets_dir=tmp_path)[0].id == "-0"


def test_json_lines_under_the_name_of_json_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "lines.json", {"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2"})
    assert [question.gold for question in load_set(str(path))] == ["1", "2"]
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))
    assert len(load_set(str(path))) == 2
    with path.open("a") as file:
        file.write('{"problem": "r"')
    with pytest.raises(ValueError, match=r"lines.json:6: not valid JSON"):
        load_set(str(path))
    path.write_text(json.dumps({"data": [{"problem": "p", "answer": "1"}]}, indent=1))
    assert len(load_set(str(path))) == 1


def test_a_mark_before_a_file_is_no_part_of_its_first_name(tmp_path: Path) -> None:
    texts = {
        "csv": "id,problem,answer\nx7,2+2?,4\n",
        "json": '[{"id": "x7", "problem": "2+2?", "answer": "4"}]',
        "jsonl": '{"id": "x7", "problem": "2+2?", "answer": "4"}\n',
    }
    for suffix, text in texts.items():
        path = tmp_path / f"excel.{suffix}"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_set(str(path))[0].id == "x7"
    path = tmp_path / "wide.csv"
    path.write_bytes(texts["csv"].encode("utf-16"))
    with pytest.raises(ValueError, match=r"wide.csv can't be read as csv"):
        load_set(str(path))
