"""Whether the installed Transformer Engine can be used, by importing it: its metadata only say that it was installed.

It is compiled against one torch. Where that is another one, `import transformer_engine` mostly succeeds without its
`pytorch`, and Megatron-Core takes a mock for it and says nothing; or it raises what Megatron-Core does not catch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys

from megatron_t1.fields import FieldError
from megatron_t1.platform import gpus
from megatron_t1.platform.installed import installed


@functools.cache
def failure() -> str | None:
    """Why the installed one can't be imported; None when it can, or when there is none.

    One that can't is hidden from Megatron-Core, which otherwise stops at it even with layers of its own.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # of the dynamic linker, of its search for its own libraries, of its asserts
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
        return f"{type(error).__name__}: {error}"
    return None


def version() -> str | None:
    """Of the one that can be used."""
    if failure() is not None or importlib.util.find_spec("transformer_engine") is None:
        return None
    return installed("transformer-engine") or "unknown"


def check_layers(layers: str) -> None:
    """To be called before Megatron-Core is imported.

    Raises:
        FieldError: on GPUs `model.layers` would take an installed Transformer Engine that can't be imported.
    """
    reason = failure()
    if reason is not None and layers == "auto" and gpus.usable():
        raise FieldError(
            "model.layers",
            layers,
            f"takes Transformer Engine {installed('transformer-engine') or ''}, which is installed and can't be "
            f"imported ({reason}): build it anew for torch {installed('torch')} (pip install --force-reinstall "
            "--no-deps --no-build-isolation -r requirements/te.txt), uninstall it, or give --model.layers local",
        )
