"""Names that Megatron-Core imports; nothing here quantises."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Format(enum.Enum):
    E4M3, E5M2, HYBRID = "e4m3", "e5m2", "hybrid"


class Recipe:
    pass


@dataclass
class DelayedScaling(Recipe):
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    reduce_amax: bool = True


class Float8CurrentScaling(DelayedScaling):
    pass


class Float8BlockScaling(DelayedScaling):
    pass


class MXFP8BlockScaling(DelayedScaling):
    pass
