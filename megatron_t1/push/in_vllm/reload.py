"""vLLM's layerwise reload with two silent bugs of its CPU build mended, and with proof that everything was loaded.

Without the mends the logprobs after a push are wrong with no error: a tied `lm_head` keeps multiplying with its own
packed copy of the old embedding, and a mixture-of-experts layer skips packing its weights the second time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel
from vllm.platforms import current_platform


class Reload:
    """One reload of all weights: made, `load`, then `finish`. There is no way back, but a load may start over."""

    def __init__(self, model: torch.nn.Module, model_config: Any) -> None:
        self.model = model
        self.model_config = model_config
        self.tied_heads = _tied_heads(model)
        initialize_layerwise_reload(model)

    def start_over(self) -> None:
        """After a load that was cut off between two tensors: forgets what modules that are not complete got."""
        for module in self.model.modules():
            info = get_layerwise_info(module)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        initialize_layerwise_reload(self.model)  # for those that were complete

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Loads all weights and raises when any parameter did not get all of its numbers (vLLM itself would not)."""
        if current_platform.is_cpu():
            _forget_packed_experts(self.model)
        with disable_mtp_completeness_check():
            self.model.load_weights(weights)
        if missing := self._incomplete():
            raise ValueError(f"{len(missing)} modules did not get all their weights: {', '.join(missing[:5])}")

    def finish(self) -> None:
        """Puts the new weights in force."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            for head in self.tied_heads:
                head.quant_method.process_weights_after_loading(head)

    def _incomplete(self) -> list[str]:
        """Modules whose parameters did not all receive numbers.

        vLLM closes a module as soon as it is complete, so only those still open are looked at. Of these, attention
        layers (scales, loaded last), padding rows of a vocabulary, and tied heads have nothing to receive.
        """
        names = []
        for name, module in self.model.named_modules():
            info = get_layerwise_info(module)
            if not info.can_load() or is_deferred_attention_layer(module) or module in self.tied_heads:
                continue
            parameters = [p for p in module._parameters.values() if p is not None]
            expected = sum(get_tensor_load_numel(p) for p in parameters)
            if isinstance(module, VocabParallelEmbedding):
                expected = module.shard_indices.num_org_elements * sum(p[:1].numel() for p in parameters)
            if info.load_numel < expected:
                names.append(f"{name} ({info.load_numel} of {expected} numbers)")
        return names


def check_names(model_config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError when the announced tensors are not exactly those of the folder that this server serves.

    Layers after the last one (they predict further tokens) and rotary frequencies are served from no tensor.
    A folder without safetensors (dummy weights, a hub name) can't be compared and passes; `load` still checks that
    every parameter is filled.
    """
    served: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(model_config.model).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.offset_keys() if _is_served(name, model_config.hf_config)]
            served |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    if not served:
        return
    optional = {"lm_head.weight"} if getattr(model_config.hf_config, "tie_word_embeddings", False) else set()
    problems = [f"{name} is missing" for name in sorted(served.keys() - shapes.keys() - optional)]
    problems += [f"{name} is unknown" for name in sorted(shapes.keys() - served.keys() - optional)]
    problems += [
        f"{name} is {shapes[name]}, served is {served[name]}"
        for name in sorted(shapes.keys() & served.keys())
        if shapes[name] != served[name]
    ]
    if problems:
        raise ValueError(
            f"the trainer's weights are not those of the model served from {model_config.model}: "
            + "; ".join(problems[:3])
            + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        )


def _is_served(name: str, hf_config: Any) -> bool:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    beyond = layer is not None and int(layer[1]) >= hf_config.num_hidden_layers
    return not name.endswith(".inv_freq") and not beyond


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """The CPU build packs experts for their kernel only while `moe_kernel` is None."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _tied_heads(model: torch.nn.Module) -> list[ParallelLMHead]:
    """Heads that share the embedding's tensor: they hold a packed copy that a reload leaves alone."""
    heads = [module for module in model.modules() if isinstance(module, ParallelLMHead)]
    embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding) and m not in heads]
    return [head for head in heads if any(head.weight is embedding.weight for embedding in embeddings)]
