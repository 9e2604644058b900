"""Every command that README and docs show is accepted: t1's by its reader of options, the others in dry mode."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_t1.check.machines import Machines
from megatron_t1.cli.options import parse
from tests.test_docs import CONFIGS, ROOT, split, words_of

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
NOT_THERE = re.compile(
    r"can't be read: No such file|must be a file|must be files that are there|names \$\w+, which the environment|"
    r"needs the package"
)
"""Problems of a reader's own files, and of the shell's variables."""


def commands(pages: list[Path] = PAGES) -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """(where it stands, variables set before it, its words) of each command of the code blocks."""
    for page in pages:
        for line in split(page.read_text())[0]:
            for part in line.split(" && "):
                words = words_of(part)
                variables = {}
                while words and (found := re.fullmatch(r"([A-Z_]\w*)=(.*)", words[0])):
                    variables[found[1]] = found[2]
                    words.pop(0)
                if words:
                    yield f"{page.name}: {line}", variables, words


def problems_of(words: list[str]) -> list[str]:
    """What is wrong with a `t1` command; its positional words are files of the reader's."""
    command, *rest = words
    cls = CONFIGS.get(command)
    rest = rest[next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest)) :]
    if cls is None or "..." in words or "examples/extend" in str(words):  # the last: tests/test_plugins.py
        return []
    if command in ("check", "replay"):  # whose own options are argparse's, and are held to its help by test_docs
        own = {f"--{name}" for name in ("for", "step", *Machines.__dataclass_fields__)}
        while taken := own & set(rest):
            at = rest.index(taken.pop())
            del rest[at : at + 2]
    switches = ("--help", "--print_config", "--dry-run", "--suggest", "--profile")
    found = parse(cls, [word for word in rest if word not in switches])[1]
    return [problem for problem in found if not NOT_THERE.search(problem) and " is not set" not in problem]


def test_every_command_of_t1_is_accepted() -> None:
    seen, refused = 0, []
    for where, _, words in commands():
        if Path(words[0]).name == "t1" and len(words) > 1:
            seen += 1
            page = next(path for path in PAGES if path.name == where.partition(":")[0]).read_text()
            refused += [f"{where}: {problem}" for problem in problems_of(words[1:]) if problem not in page]
    assert not refused, "\n".join(refused)
    assert seen > 40
    assert problems_of(["rl", "--rl.steps", "many"]), "a wrong value is seen"


BATCH = [each for each in commands() if each[2][0] == "sbatch" and "slurm/" in str(each[2])]


@pytest.mark.parametrize(("where", "variables", "words"), BATCH, ids=[where for where, _, _ in BATCH])
def test_every_batch_script_runs_dry(where: str, variables: dict[str, str], words: list[str]) -> None:
    at = next(i for i, word in enumerate(words) if word.startswith("slurm/"))
    dry = {"T1_DRY_RUN": "1", "T1_NODES": "n1 n2 n3 n4", "T1_HOME": str(ROOT), "T1_PYTHON": sys.executable}
    env = {**os.environ, **dry, **variables}
    done = subprocess.run(["bash", *words[at:]], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "-m megatron_t1" in done.stdout


def test_every_target_of_make_is_one() -> None:
    targets = {words[1] for _, _, words in commands() if words[0] == "make" and len(words) > 1}
    assert {"quickstart", "test"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
