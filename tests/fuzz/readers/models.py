"""Readers of models' folders: configs, weights, tokenizers, templates."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_t1.data.template import Template
from megatron_t1.models import spec_of
from megatron_t1.weights.hf_folder import HFFolder
from megatron_t1.weights.torch_dist import TorchDistReader
from tests.fuzz.damage import spoil, spoil_bytes, text_of
from tests.fuzz.reader import Damage, Reader, bytes_damage, check_ids, from_file, is_text, json_damage, must
from tests.tiny import ARCHITECTURES, CHAT_TEMPLATE


def model_readers(tmp: Path, model: Path) -> list[Reader]:
    import torch
    import transformers
    from safetensors.torch import save

    configs = []
    for name, fields in ARCHITECTURES.items():
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        made = getattr(transformers, name).config_class(hidden_size=128, **heads, **fields)
        configs.append({**json.loads(made.to_json_string()), "architectures": [name], "vocab_size": 320})
    own = tmp / "model"
    own.mkdir()

    def check_spec(spec: Any) -> None:
        whole = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        for name in (*whole, "kv_channels"):
            must(type(spec.transformer[name]) is int and 0 < spec.transformer[name] < 1 << 31, name)
        for name, value in spec.transformer.items():
            if "experts" in name or "topk" in name or "ffn_hidden" in name or "intermediate" in name:
                assert value is None or type(value) in (int, float), (name, value)
        for number in (spec.vocab_size, spec.max_position_embeddings):
            assert type(number) is int
            assert number > 0
        for number in (spec.rotary_base, spec.rotary_fraction, spec.transformer["layernorm_epsilon"]):
            must(type(number) is float and math.isfinite(number) and number > 0, number)
        assert type(spec.tied_embeddings) is bool

    tensors = {"a": torch.ones(2, 3), "b": torch.arange(4), "c": torch.zeros(5, dtype=torch.bfloat16)}
    single = save(tensors)
    length = int.from_bytes(single[:8], "little")
    header, body = json.loads(single[8 : 8 + length]), single[8 + length :]

    def safetensors_damage(rng: random.Random) -> tuple[bytes, str]:
        if rng.random() < 0.4:
            return spoil_bytes(single, rng)
        if rng.random() < 0.15:
            size = rng.choice((0, 1, length - 1, length + 8, 2**31, 2**63, 2**64 - 1))
            return size.to_bytes(8, "little") + single[8:], "size of the header"
        value, what = spoil(header, rng)
        text = text_of(value, rng)
        return len(text).to_bytes(8, "little") + text + body, what

    def read_folder(folder: Path) -> Any:
        opened = HFFolder(folder)
        return {name: opened.read(name) for name in opened.tensors}

    def check_tensors(found: dict[str, Any]) -> None:
        assert sum(tensor.nbytes for tensor in found.values()) <= len(body)
        for name in found:
            is_text(name)

    def folder(name: str, files: dict[str, bytes]) -> Path:
        made = tmp / name
        made.mkdir()
        for file, data in files.items():
            (made / file).write_bytes(data)
        return made

    index = {"metadata": {"total_size": 50}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    sharded = folder(
        "sharded", {"x.safetensors": save({"a": tensors["a"]}), "y.safetensors": save({"b": tensors["b"]})}
    )
    one = folder("single", {})
    torch_dist = folder("torch_dist", {})
    tokens = folder("tokens", {path.name: path.read_bytes() for path in model.iterdir() if "token" in path.name})
    (tokens / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    as_json = json.loads((tokens / "tokenizer.json").read_text())
    named = json.loads((tokens / "tokenizer_config.json").read_text())

    def template(path: Path) -> Any:
        found = Template(path.parent)
        return found, found.prompt_ids([{"role": "user", "content": "Why <|im_end|>? ü"}]), found.response_ids(["x"])

    def check_template(found: Any) -> None:
        made, prompt, (response,) = found
        check_ids(prompt, 0)
        check_ids(response)
        assert type(made.eos_token_id) is int
        assert 0 <= made.eos_token_id < len(made.tokenizer)
        assert all(0 <= token < len(made.tokenizer) for token in [*prompt, *response])

    def tokenizer_file(name: str, damaged: Damage, path: Path, seeds: Sequence[bytes]) -> Reader:
        sound = path.read_bytes() if path.exists() else None

        def read(data: bytes) -> Any:
            try:
                return from_file(path, template)(data)
            finally:
                path.unlink() if sound is None else path.write_bytes(sound)

        return Reader(name=name, damaged=damaged, read=read, check=check_template, says=str(tokens), seeds=seeds)

    def check_named(found: dict[str, Any]) -> None:
        assert found.keys() <= tensors.keys()  # that none is missing is checked against config.json

    def read_index(path: Path) -> TorchDistReader:
        return TorchDistReader(path.parent)

    def check_index(found: TorchDistReader) -> None:
        for key in sorted(found.keys()):
            is_text(key)
            assert all(type(size) is int and size >= 0 for size in found.shape(key))
            assert isinstance(found.dtype(key), torch.dtype)

    from megatron_t1.weights.torch_dist import Box, TorchDistWriter

    writer = TorchDistWriter(torch_dist)
    writer.write(Box("a", (0, 0), (2, 3)), tensors["a"], full_shape=(2, 3), file_name="f")
    writer.write(Box("b", (0,), (4,)), tensors["b"], full_shape=(4,), file_name="f")
    writer.finish()
    metadata = (torch_dist / ".metadata").read_bytes()
    stored = (torch_dist / "f.distcp").read_bytes()

    def read_stored(path: Path) -> Any:
        reader = TorchDistReader(path.parent)
        a, b = torch.empty(2, 3), torch.empty(4, dtype=torch.int64)
        reader.read(Box("a", (0, 0), (2, 3)), a)
        reader.read(Box("b", (0,), (4,)), b)
        return {"a": a, "b": b}

    return [
        Reader(
            name="config.json",
            damaged=json_damage(*configs),
            read=from_file(own / "config.json", lambda path: spec_of(path.parent)),
            check=check_spec,
            says=r"config\.json",
            seeds=[json.dumps(config).encode() for config in configs],
        ),
        Reader(
            name="safetensors",
            damaged=safetensors_damage,
            read=from_file(one / "model.safetensors", lambda path: read_folder(path.parent)),
            check=check_tensors,
            says=r"model\.safetensors",
            seeds=[single],
        ),
        Reader(
            name="index.json",
            damaged=json_damage(index),
            read=from_file(sharded / "model.safetensors.index.json", lambda path: read_folder(path.parent)),
            check=check_named,
            says=r"sharded",
            seeds=[json.dumps(index).encode()],
        ),
        tokenizer_file("tokenizer.json", json_damage(as_json), tokens / "tokenizer.json", []),
        tokenizer_file("tokenizer_config.json", json_damage(named), tokens / "tokenizer_config.json", []),
        tokenizer_file(
            "chat_template",
            bytes_damage(CHAT_TEMPLATE.encode()),
            tokens / "chat_template.jinja",
            [CHAT_TEMPLATE.encode()],
        ),
        Reader(
            name="torch_dist",
            damaged=bytes_damage(metadata),
            read=from_file(torch_dist / ".metadata", read_index),
            check=check_index,
            says=r"torch_dist/\.metadata",
            seeds=[metadata],
        ),
        Reader(
            name="distcp",
            damaged=bytes_damage(stored),
            read=lambda data: (
                (torch_dist / ".metadata").write_bytes(metadata),
                from_file(torch_dist / "f.distcp", read_stored)(data),
            )[1],
            check=lambda found: None,
            says=r"torch_dist",
            seeds=[stored],
        ),
    ]
