"""Given to a vLLM server as its `worker-extension-cls`: its reloads leave the packed copy of a tied head."""

from __future__ import annotations

from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from megatron_t1.push.in_vllm.reload import Reload


class Forgetful:
    pass


def _finish(self: Reload) -> None:
    finalize_layerwise_reload(self.model, self.model_config)


Reload.finish = _finish  # type: ignore[method-assign]
