"""The tokenizer that a checkpoint brings, in whichever of three forms, as one kind of object.

- `tokenizer.json`: read as it is. (transformers' AutoTokenizer would look at `model_type` and, for every Qwen2 folder,
  put Qwen2's own splitting of text in place of the file's.)
- `tokenizer.model` of sentencepiece, as Llama has it.
- `tokenizer.model` of tiktoken, as GLM-4-9B has it: a line for each token, base64 and rank. The checkpoint's own reader
  is code that comes with it, which is never run; its pattern and chat format are below.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from megatron_t1.files import read_json, read_text

# GLM-4's conversation, for a checkpoint that keeps it in its code: https://github.com/THUDM/GLM-4
GLM4_CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPACE = "\u2581"  # how sentencepiece spells a space
_UNKNOWN_END = "eos_token = {!r:.80} is no token of its vocabulary"
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def load_tokenizer(model_dir: Path) -> Any:
    """A `PreTrainedTokenizerFast` of the folder's tokenizer.

    Raises:
        ValueError: there is none, or it can't be read, or it has no vocabulary.
    """
    try:
        tokenizer = _load(model_dir)
        # For a folder without the file, the library makes one that has its special tokens alone.
        ids = tokenizer("a 1", add_special_tokens=False)["input_ids"]
    except Exception as error:  # the libraries have no class for it, they raise what they come upon
        raise ValueError(f"{model_dir}: its tokenizer can't be loaded: {_told(error)}") from None
    if not set(ids) - {tokenizer.unk_token_id}:
        raise ValueError(
            f"{model_dir}: its tokenizer has no vocabulary: tokenizer.json (or tokenizer.model) is missing or empty; "
            "fetch it again from where the model came from"
        )
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
    return tokenizer


def hidden_ids(tokenizer: Any, vocab_size: int) -> list[int]:
    """Ids below `vocab_size` that leave no text when a response is decoded: control tokens, and rows of the embedding
    for which the tokenizer has no token (399 of Qwen2.5's)."""
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(set(range(vocab_size)) - (set(tokenizer.get_vocab().values()) - control))


def _told(error: Exception) -> str:
    """Its words, or its class where these alone say nothing."""
    named = (
        f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, AttributeError, IndexError)) else str(error)
    )
    return named[:500] or type(error).__name__


def _load(model_dir: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (model_dir / "tokenizer.json").exists():
        made = PreTrainedTokenizerFast.from_pretrained(model_dir)
        _check_end(made, model_dir)
        return made
    vocabulary = model_dir / "tokenizer.model"
    if not vocabulary.exists():
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    ranks = _tiktoken_ranks(vocabulary)
    tokenizer = _from_sentencepiece(vocabulary) if ranks is None else _from_tiktoken(ranks)
    path = model_dir / "tokenizer_config.json"
    config = read_json(path, dict[str, Any]) if path.exists() else {}
    _add_tokens(tokenizer, config)
    template = model_dir / "chat_template.jinja"
    if template.exists():
        config["chat_template"] = read_text(template)
    if ranks is not None and tokenizer.token_to_id("[gMASK]") is not None:
        config.setdefault("chat_template", GLM4_CHAT_TEMPLATE)
    named = {name: _content(config[name]) for name in _NAMED_TOKENS if config.get(name)}
    if (end := named.get("eos_token")) and tokenizer.token_to_id(end) is None:
        raise ValueError(_UNKNOWN_END.format(end))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=config.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _check_end(tokenizer: Any, model_dir: Path) -> None:
    """The library gives an end token that no file knows a number of its own, past the weights or among their padding.

    Raises:
        ValueError: it did.
    """
    end, path = tokenizer.eos_token, model_dir / "tokenizer_config.json"
    if end is None:
        return
    text = read_text(model_dir / "tokenizer.json")
    if any(json.dumps(end, ensure_ascii=ascii_only) in text for ascii_only in (True, False)):
        return
    config = read_json(path, dict[str, Any]) if path.exists() else {}
    if all(_content(token) != end for token in config.get("added_tokens_decoder", {}).values()):
        raise ValueError(_UNKNOWN_END.format(end))


def _tiktoken_ranks(path: Path) -> dict[bytes, int] | None:
    """Token -> rank; None when the file is not of that kind."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        return None
    return ranks or None


def _from_tiktoken(ranks: dict[bytes, int]) -> Any:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        """With the ranks at hand: the library's own reader keeps a copy of every file it has read, by its path."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: Any) -> dict[bytes, int]:
            return ranks

    return Converter().converted()  # its pattern is that of cl100k, which GLM-4's code has too


def _from_sentencepiece(path: Path) -> Any:
    """Tokens and merges of a sentencepiece model, and its treatment of spaces: one put before the text, all spelled."""
    from google.protobuf.message import DecodeError
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    try:
        extractor = SentencePieceExtractor(str(path))
    except DecodeError as error:
        raise ValueError(f"{path.name} is neither a sentencepiece nor a tiktoken file ({error})") from None
    parts, trained = extractor.extract(None), extractor.proto.trainer_spec
    normal = extractor.proto.normalizer_spec
    model: Any
    if isinstance(parts["vocab"], dict):
        model = models.BPE(
            vocab=parts["vocab"],
            merges=parts["merges"],
            unk_token=trained.unk_piece,
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )
    else:
        model = models.Unigram(parts["vocab"], unk_id=parts["unk_id"], byte_fallback=trained.byte_fallback)
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(normal.precompiled_charsmap)] if normal.precompiled_charsmap else []
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normal.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else []),
        ]
    )
    tokenizer.add_tokens(parts["additional_special_tokens"])
    return tokenizer


def _add_tokens(tokenizer: Any, config: dict[str, Any]) -> None:
    """The tokens that tokenizer_config.json adds, which must get the numbers that it says."""
    from tokenizers import AddedToken

    added = {int(number): token for number, token in config.get("added_tokens_decoder", {}).items()}
    for number, token in sorted(added.items()):
        fields = {name: token.get(name, False) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        add = tokenizer.add_special_tokens if fields["special"] else tokenizer.add_tokens
        add([AddedToken(token["content"], **fields)])
        if tokenizer.token_to_id(token["content"]) != number:
            raise ValueError(
                f"tokenizer_config.json gives {token['content']!r} the number {number}, but it is "
                f"{tokenizer.token_to_id(token['content'])} after the tokens of tokenizer.model"
            )


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token
