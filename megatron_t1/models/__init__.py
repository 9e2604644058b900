"""One file a model family; every module here is imported and registers the architectures that it reads."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from megatron_t1.models.spec import FAMILIES, HFConfig, ModelSpec

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def spec_of(model_dir: Path) -> ModelSpec:
    """The model spec of a Hugging Face folder.

    Raises:
        ValueError: no config.json, an unknown architecture, or a config field that we do not understand.
    """
    hf = HFConfig.load(model_dir)
    if hf.architecture not in FAMILIES:
        raise ValueError(
            f"{hf.origin}: architecture {hf.architecture!r:.80} is not known; known: {', '.join(sorted(FAMILIES))}. "
            "A family is one file in megatron_t1/models/, or in a module that `plugins` names."
        )
    spec = FAMILIES[hf.architecture](hf)
    hf.refuse_unread()
    return spec
