"""Tiny random Hugging Face folders for tests: real config, real tokenizer, real safetensors, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_tiny_tokenizer(directory: Path, vocab_size: int = 320):
    """Writes a byte-level tokenizer: the 256 bytes, three special tokens, then `<extra_N>` up to `vocab_size`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(vocab_size - len(alphabet) - len(SPECIAL_TOKENS))])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(directory)
    return fast


# What a tiny model of each architecture has besides the common sizes. Each number that may differ from another does:
# an entry read from the wrong field then shows.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 64},
    "Qwen3MoeForCausalLM": {
        "head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
    },
    "GlmForCausalLM": {"head_dim": 32},
    "Glm4ForCausalLM": {"head_dim": 32, "attention_bias": False},
    "Glm4MoeForCausalLM": {
        "head_dim": 32, "attention_bias": True, "use_qk_norm": True, "moe_intermediate_size": 64, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
        "norm_topk_prob": True, "num_mtp_layers": 0,
    },
}  # fmt: skip


def make_tiny(
    architecture: str,
    directory: str | Path,
    *,
    vocab_size: int = 320,
    tied: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    init_std: float = 0.3,
    **fields: Any,
) -> Path:
    """Writes a random model with tokenizer and chat template, loadable by transformers and vLLM; returns `directory`.

    vLLM's CPU attention needs heads of at least 32 numbers. `init_std` is far above the usual 0.02: the logits then
    differ enough for a wrong weight to show in the logprobs.

    Args:
        architecture: one of ARCHITECTURES.
        fields: of its `config.json`.
    """
    import torch
    import transformers

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(directory, vocab_size)
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(
        **{
            "vocab_size": vocab_size,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": tied,
            "initializer_range": init_std,
            **ARCHITECTURES[architecture],
            **fields,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(getattr(torch, dtype))
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):  # float32 in every release
                module.e_score_correction_bias = module.e_score_correction_bias.float()
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:  # biases start at 0 and norms at 1, where a swapped one would not show
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    model.save_pretrained(directory)
    return directory


def make_tiny_qwen2(
    directory: str | Path,
    *,
    vocab_size: int = 320,
    tied: bool = True,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 256,
    max_position_embeddings: int = 1024,
    dtype: str = "float32",
    seed: int = 0,
    init_std: float = 0.3,
) -> Path:
    """`make_tiny` of a Qwen2."""
    return make_tiny(
        "Qwen2ForCausalLM",
        directory,
        vocab_size=vocab_size,
        tied=tied,
        dtype=dtype,
        seed=seed,
        init_std=init_std,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
    )


def make_tiny_qwen3_moe(directory: str | Path, *, vocab_size: int = 320, seed: int = 0, init_std: float = 0.3) -> Path:
    """`make_tiny` of a Qwen3 mixture of experts: 4 experts, 2 a token."""
    return make_tiny("Qwen3MoeForCausalLM", directory, vocab_size=vocab_size, seed=seed, init_std=init_std)
