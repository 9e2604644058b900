"""What runs inside the unmodified vLLM server: the guard of its routes and the receiving end of the weight transfer.

vLLM calls `register` in every one of its processes (entry point `vllm.general_plugins`), perhaps more than once.
"""

from __future__ import annotations


def register() -> None:
    """Makes the weight-transfer backends `shm` and `gloo` known to vLLM. Imports neither torch nor our engines."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for name, module, engine in (
        ("shm", "shm_engine", "ShmEngine"),
        ("gloo", "gloo_engine", "GlooEngine"),
    ):
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, f"{__name__}.{module}", engine)
