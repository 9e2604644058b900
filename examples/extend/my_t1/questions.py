"""A question set and a chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_t1.data.config import CHAT_TEMPLATES, QUESTION_SETS


@QUESTION_SETS.add
def times_tables(sets_dir: Path | None) -> Iterator[dict[str, Any]]:
    """`evaluate.sets: [times_tables]`. A set of your own would read its file from `sets_dir`."""
    for a in range(2, 10):
        for b in range(2, 10):
            yield {"id": f"{a}x{b}", "prompt": f"{a} times {b}?", "answer": str(a * b), "mode": "last_integer"}


@CHAT_TEMPLATES.add
def plain() -> str:
    """`data.chat_template: plain`, in Jinja."""
    return (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
