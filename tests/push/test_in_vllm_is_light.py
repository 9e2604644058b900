"""What of ours vLLM's processes import: no HTTP client, no Megatron, and nothing of vLLM before it asks for it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import megatron_t1.push.in_vllm

FOLDER = Path(megatron_t1.push.in_vllm.__file__).parent
HEAVY = {"aiohttp", "megatron", "transformers", "vllm"}


def test_what_vllm_imports_of_ours_is_light() -> None:
    ours = {"megatron_t1.push.in_vllm"}
    for path in FOLDER.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        ours |= {name for name in modules if name.startswith("megatron_t1.")}
    ours -= {f"megatron_t1.push.in_vllm.{path.stem}" for path in FOLDER.glob("*.py")}  # these import vLLM, as they may
    assert {"megatron_t1.push.layout", "megatron_t1.push.tcp"} <= ours
    code = f"import sys, {', '.join(sorted(ours))}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)
