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
    """Writes a random Qwen2 with tokenizer and chat template, loadable by transformers and vLLM; returns `directory`.

    vLLM's CPU attention needs heads of at least 32 numbers. `init_std` is far above the usual 0.02: the logits then
    differ enough for a wrong weight to show in the logprobs.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    directory = Path(directory)
    config = Qwen2Config(
        **_common(directory, vocab_size),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tied,
        initializer_range=init_std,
    )
    return _save(Qwen2ForCausalLM, config, directory, dtype, seed)


def make_tiny_qwen3_moe(directory: str | Path, *, vocab_size: int = 320, seed: int = 0, init_std: float = 0.3) -> Path:
    """As `make_tiny_qwen2`, for a Qwen3 mixture of experts: 2 layers of 4 experts, 2 a token, an untied head."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    directory = Path(directory)
    config = Qwen3MoeConfig(
        **_common(directory, vocab_size),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=init_std,
    )
    return _save(Qwen3MoeForCausalLM, config, directory, "float32", seed)


def _common(directory: Path, vocab_size: int) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(directory, vocab_size)
    return {
        "vocab_size": vocab_size,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def _save(model_class: Any, config: Any, directory: Path, dtype: str, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(getattr(torch, dtype))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases start at 0 and norms at 1, where a swapped one would not show
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(directory)
    return directory
