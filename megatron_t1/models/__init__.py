"""One file a model family; this registry finds the family of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from megatron_t1.models.qwen2 import qwen2
from megatron_t1.models.spec import Family, HFConfig, ModelSpec

FAMILIES: dict[str, Family] = {"Qwen2ForCausalLM": qwen2}


def spec_of(model_dir: Path) -> ModelSpec:
    """The model spec of a Hugging Face folder.

    Raises:
        ValueError: no config.json, an unknown architecture, or a config field that we do not understand.
    """
    hf = HFConfig.load(model_dir)
    if hf.architecture not in FAMILIES:
        raise ValueError(
            f"{hf.origin}: architecture {hf.architecture!r} is not known; known: {', '.join(sorted(FAMILIES))}. "
            "A family is one file in megatron_t1/models/."
        )
    spec = FAMILIES[hf.architecture](hf)
    hf.refuse_unread()
    return spec
