"""The package's imports go one way, lazy ones and those for type checkers included; configs are light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.forks import ROOT

PACKAGE = ROOT / "megatron_t1"
# From the ground up: a part may import what stands on a line above its own, and any room's config.py: configs are
# light, and the command line reads them before anything else.
FLOORS = [
    {"plugins"},
    {"types", "files", "fields", "stop", "warn", "reasoning"},
    {"lock", "trace"},
    {"platform"},
    {"algo", "data", "models", "reward", "metrics"},
    {"servers"},
    {"weights", "rollout"},
    {"engine", "push"},
    {"config"},
    {"status", "learner", "turns", "convert", "logprobs", "grade", "trackers"},
    {"rank0"},
    {"evaluation"},
    {"report", "curate", "sft", "check", "milestones"},
    {"rl"},
    {"synthesize", "replay", "asking"},
    {"pipeline"},
    {"cli"},
    {"__main__", "__init__"},
]
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}
CONFIGS = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.rglob("config.py"))
USES_MEGATRON = {"engine", "platform"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """Modules that the file imports anywhere; of ours the deepest that exists, so that a package is not its modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else str(node.module))
    return names


GRAPH = {module: imports_of(path) for module, path in MODULES.items()}


def part_of(module: str) -> str:
    _, _, rest = module.partition(".")
    return rest.split(".")[0] or "__init__"


def is_above(module: str, other: str) -> bool:
    """Whether `module` may import `other`."""
    is_config = other in CONFIGS and other.count(".") > 1
    return is_config or part_of(module) == part_of(other) or FLOOR_OF[part_of(module)] > FLOOR_OF[part_of(other)]


def test_every_part_has_a_floor() -> None:
    assert {part_of(module) for module in MODULES} == set(FLOOR_OF)


def test_imports_go_one_way() -> None:
    backwards = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others & MODULES.keys()
        if not is_above(module, other)
    ]
    assert not backwards, "\n".join(backwards)


def test_no_module_imports_itself_in_a_circle() -> None:
    try:
        TopologicalSorter({module: others & MODULES.keys() for module, others in GRAPH.items()}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_only_the_engine_and_the_platform_import_megatron() -> None:
    users = {module for module, others in GRAPH.items() if any(name.split(".")[0] == "megatron" for name in others)}
    assert {part_of(module) for module in users} <= USES_MEGATRON


def test_configs_and_the_command_line_are_light() -> None:
    """`t1 --help`, `t1 rl --help` and a refused option cost no import of torch, Megatron, SymPy or transformers."""
    code = (
        f"import sys, {', '.join(CONFIGS)}, megatron_t1.cli.main, megatron_t1.cli.help\n"
        "heavy = {'torch', 'megatron', 'sympy', 'transformers', 'scipy', 'aiohttp', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
