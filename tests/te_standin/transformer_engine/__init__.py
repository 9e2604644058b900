"""A stand-in for Transformer Engine 2.11: its names and signatures, in plain torch: its layer spec runs on a CPU.

It shows that our side of the interface is right (names, cuts, gradients, checkpoints). It says nothing of Transformer
Engine's kernels, its FP8 or its speed. Only what Megatron-Core 0.16.1 and this project ask for is there.
"""

from . import common as common
from . import pytorch as pytorch

__version__ = "2.11.0"
