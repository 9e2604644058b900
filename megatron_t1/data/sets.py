"""The question sets of the paper's table by name, and question files of known layouts: rows in, `Question`s out.

A name is looked for in `sets_dir`, then fetched from the Hugging Face hub. What the layouts have in common is found by
field names, so a file downloaded from anywhere works: MATH500 (problem, answer, level, subject), GSM8K (an answer that
ends in "#### 18"), AIME (Problem, Answer), Omni-MATH (problem, answer, difficulty, domain), GPQA (Question, Correct
Answer, Incorrect Answer 1 to 3), MMLU (question, choices, the number of the answer from 0 on), MMLU-Pro (question,
options, the answer's letter), and our own (prompt or messages, answer).
"""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_t1.data.config import INSTRUCTION, QUESTION_SETS, set_name
from megatron_t1.data.prompts import Question, given, gold_of, is_missing, parse_rows, question_of
from megatron_t1.files import ENCODING, parse_json, read_json

T = TypeVar("T")
_PROBLEM = ("problem", "Problem", "question", "Question")
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_LETTERS = "ABCDEFGHIJ"
_MARKED = re.compile(r"(?:^|\s)####\s*(\S.*)$")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclass(frozen=True)
class _Named:
    """Where a set lies on the hub and what a local copy may be called."""

    repo: str
    file: str
    local: tuple[str, ...]
    """Stems of a local file, lower case, without - and _."""
    size: int
    """Questions it must have."""
    subset_of_larger: bool = False
    """A file with more questions is cut to `size` of them, drawn with a fixed seed."""


NAMED = {
    "math500": _Named("HuggingFaceH4/MATH-500", "test.jsonl", ("math500",), 500),
    "aime2024": _Named("Maxwell-Jia/AIME_2024", "aime_2024_problems.parquet", ("aime2024", "aime24"), 30),
    "aime2025": _Named("math-ai/aime25", "test.jsonl", ("aime2025", "aime25"), 30),
    "omni_math_500": _Named("KbsdJames/Omni-MATH", "test.jsonl", ("omnimath500", "omnimath"), 500, True),
    "gpqa": _Named("Idavidrein/gpqa", "gpqa_diamond.csv", ("gpqadiamond", "gpqa"), 198),
    "gsm8k": _Named("openai/gsm8k", "main/test-00000-of-00001.parquet", ("gsm8ktest", "gsm8k"), 1319),
}


def load_set(
    name: str,
    *,
    sets_dir: Path | None = None,
    seed: int = 0,
    instruction: str = INSTRUCTION,
    system_prompt: str | None = None,
) -> list[Question]:
    """The questions of a set by name, or of a file by path.

    Args:
        sets_dir: folder of local copies; without one, or when the set is not there, the hub is asked.
        seed: decides the order of multiple-choice options, question by question.
        instruction: added under each question of a layout that brings none (all but our own).

    Raises:
        ValueError: neither name nor file, no local copy and no hub, or rows that can't be read.
    """
    path, rows, named = *_read(name, sets_dir), NAMED.get(name)

    def parse(row: dict[str, Any], number: int) -> Question:
        return _question(row, f"{set_name(name)}-{number}", seed, instruction, system_prompt)

    questions = parse_rows(path, parse, rows)
    uses = Counter(question.id for question in questions)
    if len(uses) < len(questions):
        example = uses.most_common(1)[0][0]
        raise ValueError(f"{path}: {len(questions) - len(uses)} ids are used twice, for example {example!r}")
    _check_size(name, path, len(questions))
    if named and len(questions) > named.size:
        chosen = sorted(random.Random(500).sample(range(len(questions)), named.size))
        questions = [questions[i] for i in chosen]
    return questions


def load_question_texts(
    name: str, *, sets_dir: Path | None = None, field: str = "problem"
) -> list[tuple[str, tuple[str, ...]]]:
    """(name of the row, all that it asks) of every row of a set or file, whatever its answer is: the question as its
    author wrote it, the prompt that was made of it, each message of the user.

    Args:
        field: the question's, where a layout of its own has another.

    Raises:
        ValueError: as `load_set` does, or a row without a question.
    """

    def parse(row: dict[str, Any], number: int) -> tuple[str, tuple[str, ...]]:
        if "prompt" in row or "messages" in row:
            asked = question_of({**row, "id": number, "answer": "-", "mode": "response", "choices": []})
            texts = [message["content"] for message in asked.messages if message["role"] == "user"]
        else:
            texts = [_problem_of(row, field)]
        texts += [row[other] for other in (field, *_PROBLEM) if isinstance(row.get(other), str)]
        return f"{name}:{number}", tuple(dict.fromkeys(text for text in texts if not is_missing(text)))

    path, rows = _read(name, sets_dir)
    texts = parse_rows(path, parse, rows)
    _check_size(name, path, len(texts))
    return texts


def _read(name: str, sets_dir: Path | None) -> tuple[Path, Iterable[tuple[int, Any]] | None]:
    """What its rows are named after in errors, and the rows as `parse_rows` takes them."""
    if name in QUESTION_SETS:
        return Path(name), enumerate(QUESTION_SETS[name](sets_dir), start=1)
    path = file_of(name, sets_dir)
    return path, _rows(path)


def file_of(name: str, sets_dir: Path | None) -> Path:
    """Where a set or file lies on this machine; what is not there is fetched.

    Raises:
        ValueError: neither name nor file, or no local copy and no hub.
    """
    if named := NAMED.get(name):
        return _find(name, named, sets_dir)
    if Path(name).suffix not in _SUFFIXES:
        known = ", ".join([*NAMED, *QUESTION_SETS])
        raise ValueError(f"set {name!r} is none of {known} and no file ending in {', '.join(_SUFFIXES)}")
    return Path(name)


def parse_file(path: Path, parse: Callable[[dict[str, Any], int], T]) -> list[T]:
    """`parse(row, number)` of every row of a JSON lines, JSON, CSV or Parquet file.

    Raises:
        ValueError: rows that can't be read, each named by its number.
    """
    return parse_rows(path, parse, _rows(path))


def _check_size(name: str, path: Path, count: int) -> None:
    named = NAMED.get(name)
    if named and (count < named.size or (count > named.size and not named.subset_of_larger)):
        raise ValueError(
            f"{path} has {count} questions, the set {name} has {named.size}: this is another set; give the file's path "
            "in place of the name"
        )


def _find(name: str, named: _Named, sets_dir: Path | None) -> Path:
    if sets_dir is not None:
        if not sets_dir.is_dir():
            raise ValueError(f"evaluate.sets_dir = {sets_dir} must be a folder")
        files = [path for path in sets_dir.absolute().rglob("*") if path.suffix in _SUFFIXES]
        files.sort(key=lambda path: (len(path.parts), path))  # a copy in a folder of old ones comes last
        on_hub = Path(named.file).parts
        for stem in named.local:  # a file of that name, or the hub's files in a folder of that name
            for path in files:
                folder, inside = path.parts[: -len(on_hub)], path.parts[-len(on_hub) :]
                if _plain(path.stem) == stem or (inside == on_hub and _plain(folder[-1]) == stem):
                    return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(named.repo, named.file, repo_type="dataset"))
    except (OSError, ValueError, HfHubHTTPError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"set {name!r} is not in evaluate.sets_dir = {sets_dir} (as {named.local[0]}.jsonl, .json, .csv or "
            f".parquet) and {named.repo}/{named.file} can't be had from the Hugging Face hub: {reason}\n"
            f"Fetch it on a machine with access (`hf download {named.repo} {named.file} --repo-type dataset "
            f"--local-dir sets/{named.local[0]}`; a gated set needs `hf auth login`) and give the folder `sets` as "
            "evaluate.sets_dir, or the file's path in place of the name"
        ) from None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _rows(path: Path) -> Iterator[tuple[int, Any]] | None:
    """(line or row number, row) of a file that is no JSON lines; None for JSON lines, which `parse_rows` reads."""
    if path.suffix not in (".json", ".csv", ".parquet"):
        return None
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.suffix == ".json" and _is_lines(path):
        return None
    try:
        if path.suffix == ".csv":
            return enumerate(_csv_rows(path), start=1)
        if path.suffix == ".parquet":
            return enumerate(_parquet_rows(path), start=1)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} can't be read as {path.suffix[1:]}: {error}") from None
    rows = read_json(path)
    if isinstance(rows, dict):
        rows = next((value for value in rows.values() if isinstance(value, list)), None)
    if not isinstance(rows, list):
        raise ValueError(f"{path} can't be read as json: it must be a list of questions, or an object that has one")
    return enumerate(rows, start=1)


def _is_lines(path: Path) -> bool:
    """Whether a .json file is JSON lines, as many of the hub are: its first line is an object, and not all of it."""
    with path.open("rb") as file:
        lines = filter(bytes.strip, file)
        first, second = next(lines, b""), next(lines, b"")
    try:
        return bool(second) and isinstance(parse_json(first), dict)
    except ValueError:
        return False


def _csv_rows(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 24)
    with path.open(encoding=ENCODING, newline="") as file:
        reader = csv.reader(file, strict=True)  # or a quote that nothing closes takes the rest of the file for its text
        names = next(reader, [])
        _refuse_twice(names)
        rows = []
        for cells in reader:
            if cells and len(cells) != len(names):
                raise ValueError(f"line {reader.line_num} has {len(cells)} fields, the header has {len(names)}")
            if cells:
                rows.append(dict(zip(names, cells, strict=True)))
        return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowException, float32, float64, parquet, string

    try:
        table = parquet.read_table(path, page_checksum_verification=True)
        _refuse_twice(table.column_names)
        for i, column in enumerate(table.schema):
            if column.type == float32():  # as it was written: 0.1, and not 0.10000000149011612
                table = table.set_column(i, column.name, table.column(i).cast(string()).cast(float64()))
        return table.to_pylist()
    except (ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:  # the library's own are of all these
        raise ValueError(str(error) or type(error).__name__) from None


def _refuse_twice(names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"column {twice[0]!r:.80} is there twice")


def _question(
    row: dict[str, Any], fallback_id: str, seed: int, instruction: str, system_prompt: str | None
) -> Question:
    if "prompt" in row or "messages" in row:
        return question_of({**row, "id": given(row, "id", fallback_id)}, system_prompt)
    problem = _problem_of(row)
    answer = _first(row, "answer", "Answer", "Correct Answer")
    gold = gold_of(answer)
    own = _first(row, "id", "ID", "unique_id", "Record ID")
    identity = fallback_id if own is None else str(own)
    mode, choices = "mc" if row.get("kind") == "multiple_choice" else "response", tuple[str, ...]()
    if "Correct Answer" in row:
        options = [gold_of(row[name], name) for name in ("Correct Answer", *_wrong_options(row))]
        choices = tuple(random.Random(f"{seed}/{identity}").sample(options, len(options)))
        mode, gold = "mc", _LETTERS[choices.index(options[0])]
    elif options := _first(row, "choices", "options"):
        choices = _options(options)
        mode, gold = "mc", _letter(answer, choices)
    elif marked := _MARKED.search(gold):
        gold = _THOUSANDS.sub("", marked[1])
    if choices:
        problem += "\n\n" + "\n".join(f"({letter}) {text}" for letter, text in zip(_LETTERS, choices, strict=False))
    if mode == "mc" and instruction == INSTRUCTION:
        instruction = "Please reason step by step, and put the letter of the right option within \\boxed{}."
    text = problem.strip() + (f"\n\n{instruction}" if instruction else "")
    return Question(
        id=identity,
        messages=[
            *([{"role": "system", "content": system_prompt}] if system_prompt else []),
            {"role": "user", "content": text},
        ],
        gold=gold,
        mode="mc" if mode == "mc" else "response",
        choices=choices,
        meta={"level": _level(row), "subject": _subject(row)},
    )


def _problem_of(row: dict[str, Any], *fields: str) -> str:
    problem = _first(row, *fields, *_PROBLEM)
    if not isinstance(problem, str):
        raise ValueError('no question: one of "prompt", "messages", "problem", "question" must hold its text')
    return problem


def _wrong_options(row: dict[str, Any]) -> list[str]:
    return [name for name in (f"Incorrect Answer {i}" for i in range(1, 10)) if not is_missing(row.get(name))]


def _options(options: Any) -> tuple[str, ...]:
    if not isinstance(options, list) or not all(isinstance(each, str) for each in options):
        raise ValueError(f"the options are {options!r:.60}; they must be a list of texts")
    if not 1 < len(options) <= len(_LETTERS):
        raise ValueError(f"there are {len(options)} options; they must be 2 to {len(_LETTERS)}")
    return tuple(options)


def _letter(answer: Any, choices: tuple[str, ...]) -> str:
    """Of the right option, which `answer` names by its text, its letter, or its number from 0 on."""
    letters = _LETTERS[: len(choices)]
    if type(answer) is int and 0 <= answer < len(choices):
        return letters[answer]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters:  # also where C is an option
        return answer.strip()
    if choices.count(answer) == 1:
        return letters[choices.index(answer)]
    raise ValueError(
        f"the answer is {answer!r:.60}; it must be one of the {len(choices)} options: its text, its letter from A on, "
        "or its number from 0 on"
    )


def _first(row: dict[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if not is_missing(row.get(name))), None)


def _level(row: dict[str, Any]) -> str | None:
    level = _first(row, "level", "difficulty")
    return None if level is None else str(level).removeprefix("Level ")


def _subject(row: dict[str, Any]) -> str | None:
    subject = _first(row, "subject", "type", "High-level domain", "domain")
    if isinstance(subject, list):  # Omni-MATH: ["Mathematics -> Algebra -> Sequences"]
        subject = subject[0] if subject else None
    if subject is None:
        return None
    parts = str(subject).split(" -> ")
    return parts[1] if len(parts) > 1 and parts[0] == "Mathematics" else parts[0]
