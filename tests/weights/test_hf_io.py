"""Hugging Face folders in and out, byte-exact, and every way in which a folder can be wrong named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_t1.models import spec_of
from megatron_t1.models.weight_map import QKV, GateUp, Piece, Rename, Shard, Vocab
from megatron_t1.weights import hf_io
from megatron_t1.weights.hf_folder import name_dtype
from megatron_t1.weights.plan import Plan
from tests.tiny import make_tiny_qwen2


def blank(spec, tensors, tp):
    """Every parameter of a one-stage model on each tensor-parallel rank, filled with NaN, with its pieces."""
    heads, groups = spec.transformer["num_attention_heads"], spec.transformer["num_query_groups"]
    width = (heads + 2 * groups) * spec.transformer["kv_channels"]
    hidden, ffn = spec.transformer["hidden_size"], spec.transformer["ffn_hidden_size"]
    rows = -(-spec.vocab_size // tp)
    pieces = []
    for rank in range(tp):
        for name, op in spec.weights.items():
            match op:
                case QKV():
                    shape = (width // tp, hidden) if name.endswith("weight") else (width // tp,)
                case GateUp():
                    shape = (2 * ffn // tp, hidden)
                case Vocab():
                    shape = (rows, hidden)
                case Rename(tp_dim=1):
                    shape = (hidden, (ffn if "fc2" in name else heads * spec.transformer["kv_channels"]) // tp)
                case Rename():
                    shape = (hidden,)
            for layer in range(spec.transformer["num_layers"]) if "{layer}" in name else [0]:
                param = torch.full(shape, torch.nan, dtype=next(iter(tensors.values())).dtype)
                pieces += op.pieces(param, Shard(rank, tp), {"layer": layer})
    return pieces


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_byte_exact_at_every_tp_and_shard_size(tp, dtype, tied, tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf", tied=tied, dtype=dtype, vocab_size=321)
    tensors = load_file(source / "model.safetensors")
    pieces = blank(spec_of(source), tensors, tp)
    hf_io.load(pieces, source)
    hf_io.save(pieces, source, tmp_path / "out", max_shard_bytes=40_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3
    written = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for beside in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / beside).read_bytes() == (source / beside).read_bytes()
    # The sharded folder is a checkpoint like any other.
    hf_io.load(blank(spec_of(source), tensors, tp), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks 1 tensors, the first: ['model.norm.weight']"),
        (
            lambda t: t.update({"model.extra": torch.zeros(1)}),
            "does not use, the first: ['model.extra']",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(63)}), "has shape (63,), the config asks for (128,)"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(320, 128)}), "does not use, the first: ['lm_head.weight']"),
    ],
    ids=["missing", "extra", "misshapen", "another head in a tied model"],
)
def test_a_folder_that_is_not_the_model_is_refused_by_name(change, message, tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    pieces = blank(spec_of(source), tensors, 1)
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(hf_io.CheckpointError) as error:
        hf_io.load(pieces, source)
    assert message in str(error.value)


def test_a_tied_checkpoint_may_repeat_its_embedding_as_the_head(tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    pieces = blank(spec_of(source), tensors, 1)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    hf_io.load(pieces, source)


def read_whole(folder):
    """A piece of every tensor of a folder."""
    return [Piece(name=name, shape=tuple(tensor.shape), index=tuple(slice(0, n) for n in tensor.shape), view=tensor)
            for name, tensor in load_file(folder / "model.safetensors").items()]  # fmt: skip


@pytest.mark.parametrize("is_there", [True, False], ids=["a folder", "not yet"])
def test_a_link_to_another_disk_stays_one_at_every_export(is_there, tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf")
    pieces, out = read_whole(source), tmp_path / "run/hf"
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    out.symlink_to(tmp_path / "disk/hf")
    if is_there:
        (tmp_path / "disk/hf").mkdir()
    for number in range(3):
        pieces[0].view.fill_(number)
        hf_io.save(pieces, source, out)
        assert out.is_symlink()
        assert load_file(tmp_path / "disk/hf/model.safetensors")[pieces[0].name].unique().tolist() == [number]
    assert [path.name for path in (*(tmp_path / "run").iterdir(), *(tmp_path / "disk").iterdir())] == ["hf", "hf"]


def test_an_export_that_fails_leaves_the_one_before_and_nothing_else(monkeypatch, tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf")
    pieces, out = read_whole(source), tmp_path / "rl/hf"
    hf_io.save(pieces, source, out)

    def fails(said):
        with pytest.raises(OSError, match=said):
            hf_io.save(pieces, source, out)
        assert [path.name for path in out.parent.iterdir()] == ["hf"]
        assert len(load_file(out / "model.safetensors")) == len(pieces)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_io.ShardWriter, "write", no_space)
    fails("No space left")
    monkeypatch.setattr(hf_io.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    fails(r"rl/hf needs 0.00 GB and \S+/rl has 0.00 GB free: free some space")


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a file"])
def test_weights_are_exported_without_the_folder_that_config_and_tokenizer_come_from(left, tmp_path, capsys):
    pieces = read_whole(make_tiny_qwen2(tmp_path / "hf"))
    if left == "an empty folder":
        (tmp_path / "purged").mkdir()
    elif left == "a file":
        (tmp_path / "purged").touch()
    hf_io.save(pieces, tmp_path / "purged", tmp_path / "out", carried=("model.layers.4.",))
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(written[each.name], each.view) for each in pieces)
    assert f"{tmp_path / 'out'} will lack config or tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [(), ("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_the_dtype_is_named_in_every_spelling_that_is_there(keys, tmp_path):
    config = tmp_path / "config.json"
    for before, after in (("bfloat16", "float32"), ("float32", "float32")):
        text = json.dumps(dict.fromkeys(keys, before))
        config.write_text(text)
        name_dtype(config, torch.float32)
        assert json.loads(config.read_text()) == dict.fromkeys(keys, after)
    assert config.read_text() == text, "what is right already stays as it is"


def piece(rows, shape=(4, 2), name="w"):
    size = rows.stop - rows.start
    return Piece(name=name, shape=shape, index=(rows, slice(0, shape[1])), view=torch.zeros(size, shape[1]))


@pytest.mark.parametrize(
    "rows", [[slice(0, 2)], [slice(0, 3), slice(2, 4)], [slice(0, 5)]], ids=["gap", "overlap", "outside"]
)
def test_a_plan_covers_every_element_exactly_once(rows):
    with pytest.raises(ValueError, match="tensor w"):
        Plan([piece(r) for r in rows])
