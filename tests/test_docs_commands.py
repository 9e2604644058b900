"""Every command that README and docs show is accepted: t1's by its reader of options, the others in dry mode."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
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


FAKE_PYTHON = """#!/bin/sh
if [ "$1" = -m ]; then
    mkdir -p "$3/bin"
    printf '#!/bin/sh\\ntest ! -e offline' > "$3/bin/pip"
    chmod +x "$3/bin/pip"
fi
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Our Makefile in a folder of its own; its Python makes environments whose pip fails where a file `offline` is."""
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "PYTHON=./python", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]})

    return run


def test_an_environment_that_make_did_not_make_is_left_alone(make, tmp_path: Path) -> None:
    for venv, words in ((".venv", ["install"]), (".venv-gpu", ["quickstart", "GPU=/proc/driver/nvidia/gpus/0"])):
        (tmp_path / venv / "bin").mkdir(parents=True)
        refused = make(*words)
        assert refused.returncode != 0
        assert f"error: {venv} was not made by make" in refused.stdout
        assert [path.name for path in (tmp_path / venv).rglob("*")] == ["bin"]
    assert make("install", "VENV=other").returncode == 0
    assert (tmp_path / "other/.installed").exists()


def test_an_installation_that_was_cut_is_begun_again(make, tmp_path: Path) -> None:
    (tmp_path / "offline").touch()
    assert make("install").returncode != 0
    (tmp_path / "offline").unlink()
    assert make("install").returncode == 0
    assert {path.name for path in (tmp_path / ".venv").iterdir()} == {"bin", ".installed"}
    os.utime(tmp_path / ".venv/.installed", (0, 0))  # the requirements are newer
    assert "pip install" in make("install").stdout
    assert "pip install" not in make("install").stdout


def test_make_keeps_results_and_goes_on_with_a_run(make, tmp_path: Path) -> None:
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    assert make("install").returncode == 0
    assert make("clean").returncode == 0
    assert (tmp_path / "runs/quickstart").exists()
    assert not (tmp_path / ".venv").exists()
    assert "--run_dir runs/second --seed 0 --resume" in make("-n", "quickstart", "RUN=runs/second").stdout
