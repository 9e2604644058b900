"""What runs inside the unmodified vLLM server: the receiving end of the weight transfer.

vLLM calls `register` in every one of its processes (entry point `vllm.general_plugins`), perhaps more than once.
"""

from __future__ import annotations

from megatron_t1.servers.config import BACKEND


def register() -> None:
    """Makes the weight-transfer backend `t1` known to vLLM. Imports neither torch nor our engine."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, f"{__name__}.receive", "Engine")
