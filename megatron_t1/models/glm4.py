"""GLM-4-0414: GLM with a norm behind attention and MLP too."""

from __future__ import annotations

from megatron_t1.models import decoder
from megatron_t1.models.glm import glm_fields
from megatron_t1.models.spec import HFConfig, ModelSpec, family
from megatron_t1.models.weight_map import Op, Rename


@family("Glm4ForCausalLM")
def glm4(hf: HFConfig) -> ModelSpec:
    fields = glm_fields(hf)
    weights: dict[str, Op] = fields["weights"]
    for norm in ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"):
        weights[decoder.LAYER + norm] = Rename(decoder.HF_LAYER + norm)
    return ModelSpec(**fields, **decoder.embeddings(hf), **hf.rotary(fraction=0.5), sandwich_norms=True)
