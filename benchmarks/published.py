"""config.json of the models that `examples/` has, as they are published: for plans that need no weights."""

from __future__ import annotations

import json
from pathlib import Path

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8,
    "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
}  # fmt: skip
CONFIGS = {
    "qwen2.5-32b": {**QWEN, "intermediate_size": 27648, "num_hidden_layers": 64},
    "qwen2.5-14b": {**QWEN, "intermediate_size": 13824, "num_hidden_layers": 48, "rms_norm_eps": 1e-5},
    "glm-4-9b": {
        "architectures": ["Glm4ForCausalLM"], "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "attention_bias": False, "tie_word_embeddings": False,
    },
}  # fmt: skip


def write_config(folder: Path, name: str) -> Path:
    """A model folder with nothing but that file."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder / name
