"""The package's imports go one way, and only engine/ and platform/ import Megatron at module level."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_t1"
# What each part may import of ours; itself and the plain modules `types` and `files` always.
ALLOWED = {
    "types": set(),
    "files": set(),
    "stats": set(),
    "platform": set(),
    "data": set(),
    "reward": set(),
    "algo": set(),
    "rollout": set(),
    "models": {"weights"},
    "weights": {"models", "rollout"},
    "engine": {"algo", "data", "models", "platform", "weights"},
}
MEGATRON = {"engine", "platform"}


def module_level_imports(path: Path) -> set[str]:
    """Imported module names, those under `if TYPE_CHECKING` and inside functions left out."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                found.update(f"{base}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Try) or (
                isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test)
            ):
                visit(node.body)

    visit(ast.parse(path.read_text()).body)
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        part = part_of(path)
        for name in module_level_imports(path):
            root, _, rest = name.partition(".")
            if root == "megatron" and part not in MEGATRON:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
            if root == "megatron_t1" and part in ALLOWED:
                other = rest.split(".")[0]
                if other not in ALLOWED[part] | {part, "types", "files"}:
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)
