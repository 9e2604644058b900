"""The only place that knows whether we run on CUDA (NCCL) or on the CPU (gloo), and which accelerations are installed.

`setup()` runs once, before Megatron builds anything; everything else asks the `Platform` that it returns.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

from megatron_t1.platform import cpu, gpus, te


@dataclass(frozen=True, kw_only=True)
class Platform:
    name: str
    """`cpu` or `cuda`"""
    device: torch.device
    backend: str
    """torch.distributed backend of the training groups: `gloo` or `nccl`"""
    transformer_engine: str | None
    """Version of Transformer Engine, when it can be used: its layers are the fast path and the only FP8 path."""
    apex: bool
    """Apex is importable: Megatron then takes its fused Adam and multi-tensor kernels."""

    def describe(self) -> str:
        """One line for the start of a run: what was found, and what is slower for want of something."""
        found = [f"{self.name} ({self.backend})"]
        if self.name == "cuda":
            found.append(torch.cuda.get_device_name(self.device))
        missing = []
        if self.transformer_engine:
            found.append(f"Transformer Engine {self.transformer_engine}")
        else:
            missing.append("Transformer Engine (local layer spec instead, no FP8)")
        if self.apex:
            found.append("Apex")
        elif not self.transformer_engine:
            missing.append("Apex (torch's optimizer instead of a fused one)")
        return "platform: " + ", ".join(found) + ("; not found: " + ", ".join(missing) if missing else "")


def _usable_apex() -> bool:
    # The package called `apex` on the package index is another project; only NVIDIA's has these modules.
    return importlib.util.find_spec("apex") is not None and importlib.util.find_spec("amp_C") is not None


@functools.lru_cache(maxsize=1)
def setup() -> Platform:
    """Detect the platform and, on the CPU, teach torch the answers that Megatron-Core expects of CUDA. Idempotent.

    Raises:
        ValueError: there are GPUs that torch can't use, or fewer than ranks.
    """
    if gpus.usable():
        index = gpus.index_of(int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(index)
        return Platform(
            name="cuda",
            device=torch.device("cuda", index),
            backend="nccl",
            transformer_engine=te.version(),
            apex=_usable_apex(),
        )
    cpu.install()
    return Platform(name="cpu", device=torch.device("cpu"), backend="gloo", transformer_engine=None, apex=False)
