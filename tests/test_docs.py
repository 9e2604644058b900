"""What README and docs name is there: files and links, `t1` commands with their options, settings, `make` targets."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from megatron_t1.cli.help import _docs
from megatron_t1.cli.main import _COMMANDS, main
from megatron_t1.cli.options import class_of_each
from megatron_t1.config import Config, GradeConfig, LogprobsConfig, SyncCheckConfig
from megatron_t1.data.quickstart import QuickstartDataConfig
from megatron_t1.synthesize.config import SynthesizeConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_t1"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("tests/**/README.md")]
CONFIGS = {
    **dict.fromkeys(
        ("run", "sft", "rl", "rollout", "replay", "curate", "evaluate", "scaling", "serve", "check"), Config
    ),
    "sync-check": SyncCheckConfig,
    "synthesize": SynthesizeConfig,
    "grade": GradeConfig,
    "logprobs": LogprobsConfig,
    "quickstart-data": QuickstartDataConfig,
}
LABELLED = ("evaluate", "scaling")
SUFFIXES = ("py", "sh", "yaml", "md", "j2", "txt", "in", "toml")
NOT_OURS = {".git", ".venv", "runs"}
MADE_UP = {"my.yaml", "config.yaml"}
"""Files of the reader's own, or of a run."""
WRITTEN = ("jsonl", "json", "html", "sqlite")


def split(text: str) -> tuple[list[str], list[str], str]:
    """Command lines of code blocks (where some begin with $, the others are output), inline code, and the prose."""
    lines = []
    for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
        all_lines = block.replace("\\\n", " ").splitlines()
        lines += [line for line in all_lines if line.startswith("$ ")] or all_lines
    prose = re.sub(r"^```\n.*?^```", "", text, flags=re.M | re.S)
    return lines, re.findall(r"`([^`\n]+)`", prose), prose


def words_of(line: str) -> list[str]:
    try:
        return shlex.split(line.removeprefix("$ "), comments=True)
    except ValueError:  # a drawing, not a command
        return []


def missing_links(page: Path, prose: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            yield f"link to {target}"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@functools.cache
def names_of_files() -> set[str]:
    folders = (
        PACKAGE,
        *(ROOT / name for name in ("benchmarks", "examples", "slurm", "tests", "tools", "requirements")),
    )
    return {path.name for folder in folders for path in folder.rglob("*")} | {path.name for path in ROOT.iterdir()}


def missing_files(page: Path, words: list[str]) -> Iterator[str]:
    """Words that begin as a path of the repository or of the package, or end as a file of source does."""
    tops = {path.name for folder in (ROOT, PACKAGE) for path in folder.iterdir() if path.is_dir()} - NOT_OURS
    for word in words:
        path = re.sub(r"<\w+>", "*", word.strip("(),:;").partition("::")[0])
        if not re.fullmatch(r"[\w.*/-]+", path):
            continue
        if "/" in path and path.split("/")[0] in tops:
            if not any(any(folder.glob(path.rstrip("/"))) for folder in (ROOT, PACKAGE, page.parent)):
                yield f"file {word}"
        elif re.fullmatch(rf"[a-z_]\w*\.({'|'.join(SUFFIXES)})", path) and path not in names_of_files() | MADE_UP:
            yield f"file {word}"


def field_type(cls: Any, name: str) -> Any:
    """Type of the field with a dotted name; raises KeyError."""
    for part in name.split("."):
        arguments = get_args(cls)
        cls = get_type_hints(cls)[part] if is_dataclass(cls) else {part: arguments[1]}[part] if arguments else {}[part]
    return cls


def unknown_setting(cls: Any, name: str, value: str = "") -> str | None:
    """The setting, or the key of its YAML value, that the class does not have."""
    try:
        hint = field_type(cls, name)
    except KeyError:
        return name
    sections = yaml.safe_load(value) if value.startswith("{") else {}
    if is_dataclass(hint):
        sections = {"": sections}
    elif not any(map(is_dataclass, get_args(hint))):
        return None
    each = hint if is_dataclass(hint) else get_args(hint)[1]
    keys = [key for section in sections.values() for key in section]
    return next((f"{name}.{key}" for key in keys if key not in get_type_hints(each)), None)


@functools.cache
def help_of(*arguments: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return text.getvalue()


@functools.cache
def source_of_cli() -> str:
    return "".join(path.read_text() for path in PACKAGE.glob("cli/*.py"))


def wrong_in_command(words: list[str]) -> Iterator[str]:
    """What does not exist of the `t1` command (or the batch script that runs one) in a line."""
    if (script := next((word for word in words if re.fullmatch(r"slurm/\w+\.sh", word)), None)) and "sbatch" in words:
        command, rest = Path(script).stem, words[words.index(script) + 1 :]
        command = command if command in CONFIGS else "rl"
    elif starts := [i + 1 for i, word in enumerate(words) if word in ("t1", "megatron_t1") and words[i + 1 :]]:
        command, rest = words[starts[0]], words[starts[0] + 1 :]
    else:
        return
    if command in ("COMMAND", "--help") or command.startswith("<"):
        return
    if command not in _COMMANDS:
        yield f"t1 {command}"
        return
    for option, value in zip(rest, [*rest[1:], ""], strict=False):
        name, equals, given = option.removeprefix("--").partition("=")
        if not option.startswith("--") or name in ("config", "print_config", "help"):
            continue
        if name == "label" and command in LABELLED:
            continue
        if command in ("check", "replay") and "." not in name:
            if f'"{option}"' not in source_of_cli():
                yield f"t1 {command} {option}"
        elif command == "convert":
            if not re.search(rf"{option}\b", help_of(command, rest[0])):
                yield f"t1 convert {rest[0]} {option}"
        elif command not in CONFIGS:
            yield f"t1 {command} {option}"
        elif unknown := unknown_setting(CONFIGS[command], name, given if equals else value):
            yield f"t1 {command} --{unknown}"
        elif command not in ("check", "replay") and f"--{name}" not in help_of(command):
            yield f"t1 {command} --{name}, of which its help says that it has no effect"


def wrong_settings(codes: list[str]) -> Iterator[str]:
    """`rollout.tp`, `--rl.steps 100` and the like that no config has."""
    sections = {name for cls in CONFIGS.values() for name, hint in get_type_hints(cls).items() if is_dataclass(hint)}
    for code in codes:
        name = re.match(r"(?:--)?([a-z_]+(?:\.[a-z_]\w*)+)(?=$|[ =])", code)
        if not name or name[1].split(".")[0] not in sections or name[1].rpartition(".")[2] in (*SUFFIXES, *WRITTEN):
            continue
        if all(unknown_setting(cls, name[1]) for cls in set(CONFIGS.values())):
            yield f"setting {name[1]}"


def wrong_targets(lines: list[str]) -> Iterator[str]:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in lines:
        if (target := re.match(r"(?:\w+=\S+ )*make ([a-z][\w-]*)", line)) and target[1] not in targets:
            yield f"make {target[1]}"


def wrong_in(page: Path, text: str) -> list[str]:
    lines, codes, prose = split(text)
    commands = [words_of(line) for line in (*lines, *codes)]
    return [
        *missing_links(page, prose),
        *missing_files(page, [word for words in commands for word in words]),
        *(problem for words in commands for problem in wrong_in_command(words)),
        *wrong_settings(codes),
        *wrong_targets([*lines, *codes]),
    ]


def configs_in(cls: Any) -> set[Any]:
    below = (class_of_each(hint) or hint for hint in get_type_hints(cls).values())
    return {cls}.union(*(configs_in(each) for each in below if is_dataclass(each)))


def test_every_setting_says_what_it_means():
    """`--help` prints the docstring of a setting, or else the first line of its class."""
    silent = {
        f"{cls.__name__}.{field.name}"
        for cls in set().union(*map(configs_in, CONFIGS.values()))
        for field in fields(cls)
        if not (_docs(cls).get(field.name) or is_dataclass(get_type_hints(cls)[field.name]))
    }
    assert silent == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    assert not wrong_in(page, page.read_text())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("see [that](docs/nothing.md)", "link to docs/nothing.md"),
        ("`megatron_t1/nothing.py`", "file megatron_t1/nothing.py"),
        ("`push/nothing.py` sends", "file push/nothing.py"),
        ("`nothing.py`", "file nothing.py"),
        ("`t1 nothing`", "t1 nothing"),
        ("```\nt1 rl --rl.stepps 3   # three\n```\n", "t1 rl --rl.stepps"),
        ("```\nt1 grade a b --rl.steps 3\n```\n", "t1 grade --rl.steps"),
        ("```\nt1 evaluate \\\n --evaluate.endpoint '{modell: M}'\n```\n", "t1 evaluate --evaluate.endpoint.modell"),
        ("```\nt1 convert to-hf A B --tp 2\n```\n", "t1 convert to-hf --tp"),
        ("```\nt1 check A.yaml --nodess 2\n```\n", "t1 check --nodess"),
        ("```\nsbatch slurm/rl.sh --rl.stepps 1\n```\n", "t1 rl --rl.stepps"),
        ("`--rollout.await 2`", "setting rollout.await"),
        ("by `rollout.timeout`", "setting rollout.timeout"),
        ("`make nothing`", "make nothing"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_seen(text, problem):
    assert wrong_in(ROOT / "README.md", text) == [problem]
