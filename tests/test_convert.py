"""Conversion keeps every byte, at every cut, and Megatron agrees with it; damaged input is refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_t1.convert import to_hf, to_megatron, verify, verify_and_say
from megatron_t1.engine import stored
from megatron_t1.models.spec import FAMILIES as KNOWN
from megatron_t1.weights import torch_dist
from megatron_t1.weights.hf_folder import CheckpointError, HFFolder
from megatron_t1.weights.torch_dist import Box, TorchDistReader, TorchDistWriter
from tests.forks import ROOT, WORKERS, environment
from tests.models.families import FAMILIES
from tests.tiny import ARCHITECTURES, make_tiny, make_tiny_qwen2

WORKER = WORKERS / "convert_worker.py"


def contents(folder: Path) -> dict:
    """Tensor name -> dtype, shape, bytes."""
    found = HFFolder(folder)
    return {
        name: (info, found.read(name).view(-1).view(torch.uint8).numpy().tobytes())
        for name, info in found.tensors.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_byte_for_byte(family, tmp_path):
    source = FAMILIES[family](tmp_path / "hf")
    to_megatron(source, tmp_path / "megatron", tp=2, pp=2)
    to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=100_000)
    assert contents(tmp_path / "back") == contents(source)
    assert not list(verify(source, tmp_path / "megatron"))
    for beside in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "generation_config.json"):  # fmt: skip
        for folder in ("megatron", "back"):
            assert (tmp_path / folder / beside).read_bytes() == (source / beside).read_bytes()


@st.composite
def odd_configs(draw):
    architecture = draw(st.sampled_from(sorted(ARCHITECTURES.keys() & KNOWN)))
    kv_heads = draw(st.integers(1, 3))
    tp = draw(st.sampled_from([n for n in (1, 2, 3) if kv_heads % n == 0]))
    pp = draw(st.integers(1, 2))
    return {
        "architecture": architecture,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([2, 6])),
        "hidden_size": draw(st.sampled_from([6, 20])),
        "intermediate_size": 6 * draw(st.integers(1, 3)),
        "vocab_size": 264 + draw(st.integers(0, 9)),
        "num_hidden_layers": pp * draw(st.integers(1, 2)),
        "tied": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        **({"moe_intermediate_size": 12} if "moe_intermediate_size" in ARCHITECTURES[architecture] else {}),
    }, tp, pp  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(odd_configs())
def test_odd_sizes_come_back_byte_for_byte(tmp_path_factory, case):
    config, tp, pp = case
    folder = tmp_path_factory.mktemp("odd")
    source = make_tiny(directory=folder / "hf", **config)
    to_megatron(source, folder / "megatron", tp=tp, pp=pp)
    to_hf(folder / "megatron", folder / "back")
    assert contents(folder / "back") == contents(source)


def test_every_dtype_is_kept_where_a_checkpoint_mixes_them(tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf", dtype="bfloat16", num_layers=3, vocab_size=321)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:  # all norms, one matrix of a fused pair, one layer of a stack
        if "norm" in name or "up_proj" in name or "layers.1.self_attn.o_proj" in name:
            tensors[name] = torch.randn(tensors[name].shape)
    tensors["model.layers.2.mlp.down_proj.weight"] = tensors["model.layers.2.mlp.down_proj.weight"].half()
    tensors["model.layers.0.self_attn.q_proj.bias"][3] = float("nan")
    save_file(tensors, source / "model.safetensors")
    to_megatron(source, tmp_path / "megatron")
    stored = TorchDistReader(tmp_path / "megatron")
    assert stored.dtype("embedding.word_embeddings.weight") == torch.bfloat16
    assert stored.dtype("decoder.layers.self_attention.linear_proj.weight") == torch.float32
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.timeout(600)
def test_megatron_loads_at_any_layout_what_was_converted_at_another(run_ranks, tmp_path):
    for family, make in FAMILIES.items():
        to_megatron(make(tmp_path / family / "hf"), tmp_path / family / "megatron", pp=2)
    layouts = {
        "TP2 PP2": ({"tensor": 2, "pipeline": 2, "sequence_parallel": True}, list(FAMILIES)),
        "TP2": ({"tensor": 2}, ["qwen2"]),
        "PP2": ({"pipeline": 2}, ["qwen2 tied"]),
    }
    run_ranks(WORKER, 4, tmp_path, json.dumps(layouts), timeout_s=500)
    for layout, (_, families) in layouts.items():
        for family in families:
            source = contents(tmp_path / family / "hf")
            for how in ("by megatron", "by us"):
                assert contents(tmp_path / family / f"{layout} {how}") == source
        # What Megatron saved at that layout (with its vocabulary padded) is read back too.
        first = tmp_path / families[0]
        to_hf(first / f"{layout} saved", first / f"{layout} back", hf_dir=first / "hf")
        assert contents(first / f"{layout} back") == contents(first / "hf")


@pytest.fixture
def pair(tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf", vocab_size=321)
    to_megatron(source, tmp_path / "megatron")
    return source, tmp_path / "megatron"


def test_verify_names_what_differs(pair, tmp_path):
    source, megatron = pair
    other = shutil.copytree(source, tmp_path / "other")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 5] += 0.5
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16().float().bfloat16()
    tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(2, 64)
    tensors["extra"] = tensors.pop("model.layers.0.self_attn.k_proj.bias")
    tensors["model.layers.0.self_attn.q_proj.bias"][7] = 0.0
    save_file(tensors, other / "model.safetensors")
    found = {}
    for difference in verify(megatron, other):
        found.setdefault(difference.name, []).append(difference.what)
    assert "shape (128,) and (2, 64)" in found["model.layers.0.input_layernorm.weight"][0]
    assert "only in" in found["extra"][0]
    assert "only in" in found["model.layers.0.self_attn.k_proj.bias"][0]
    assert found["model.norm.weight"][0] == "dtype torch.float32 and torch.bfloat16"
    changed = found["model.layers.1.mlp.up_proj.weight"][0]
    assert changed.startswith("1 of 32768 numbers differ, by at most 0.5; the first is number 261:")
    assert len(found) == 6
    command = [sys.executable, "tools/convert_hf.py", "verify", str(megatron)]
    done = subprocess.run(
        [*command, str(other)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 1
    assert "differ in 6 tensors" in done.stdout


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_and_none_are_infinitely_far_apart(value, tmp_path, capsys):
    source = make_tiny_qwen2(tmp_path / "hf")
    other = shutil.copytree(source, tmp_path / "other")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = float(value)
    tensors["model.norm.weight"][4] += 0.5
    save_file(tensors, other / "model.safetensors")
    for one, two in ((source, other), (other, source)):
        (found,) = verify(one, two)
        assert found.what.startswith("2 of 128 numbers differ, by at most inf; the first is number 3:")
        assert verify_and_say(one, two) == 1
        assert "differ in 1 tensors, by at most inf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks 1 tensors, the first: ['model.norm.weight']"),
        (lambda t: t.update(extra=torch.zeros(1)), "does not use, the first: ['extra']"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(63)}), "model.norm.weight has shape (63,)"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_a_folder_that_is_not_the_model_is_refused_by_name_and_leaves_nothing(change, message, tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        to_megatron(source, tmp_path / "megatron")
    assert message in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_weights_that_were_not_downloaded_are_said_with_what_to_do(tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf")
    single, index = source / "model.safetensors", source / "model.safetensors.index.json"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            to_megatron(source, tmp_path / "megatron")

    single.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n")
    refused(r"hf/model.safetensors is what Git LFS keeps .*: run git lfs pull in \S+/hf")
    single.unlink()
    single.symlink_to("../blobs/00")
    refused(r"hf/model.safetensors is a link to ../blobs/00, which is not there: download the model again")
    single.rename(source / "a.safetensors")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}}))
    refused(r"hf/a.safetensors is a link to ../blobs/00, .* download the model again")
    index.unlink()
    index.symlink_to("../blobs/01")
    refused(r"index.json is a link to ../blobs/01, .* download the model again")


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_of_8_bits_among_others_is_refused_by_name(layer, tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"hf/model.safetensors: tensor {name} has torch.float8_e4m3fn, which"):
        to_megatron(source, tmp_path / "megatron")


def test_what_lies_among_the_chat_templates_and_is_none_stays(pair, tmp_path):
    source, _ = pair
    (source / "additional_chat_templates/.ipynb_checkpoints").mkdir(parents=True)
    (source / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    to_megatron(source, tmp_path / "again")
    assert [path.name for path in (tmp_path / "again/additional_chat_templates").iterdir()] == ["tools.jinja"]


def sharded(folder: Path, first: dict, second: dict, weight_map: dict) -> None:
    (folder / "model.safetensors").unlink()
    save_file(first, folder / "a.safetensors")
    save_file(second, folder / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_is_not_true_is_refused_by_name(tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf")
    single = (source / "model.safetensors").read_bytes()
    tensors = load_file(source / "model.safetensors")
    norm = {"model.norm.weight": tensors.pop("model.norm.weight")}
    weight_map = {**dict.fromkeys(tensors, "a.safetensors"), "model.norm.weight": "b.safetensors"}

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError) as error:
            HFFolder(source)
        assert message in str(error.value)

    sharded(source, tensors, norm, weight_map)
    assert len(HFFolder(source).tensors) == len(weight_map)
    index = source / "model.safetensors.index.json"
    index.write_text(
        index.read_text().replace('"model.norm.weight"', '"model.norm.weight": "a.safetensors", "model.norm.weight"')
    )
    refused("'model.norm.weight' is there twice")
    index.write_text(json.dumps({"weight_map": {**weight_map, "ghost": "a.safetensors"}}))
    refused("lists 1 tensors that no file has, the first: ['ghost']")
    index.write_text(json.dumps({"weight_map": {**weight_map, "ghost": "../a.safetensors"}}))
    refused("names a.safetensors, which is not in")
    index.write_text(json.dumps({"weight_map": weight_map}))
    save_file(tensors | norm, source / "a.safetensors")
    refused("holds tensor model.norm.weight, which model.safetensors.index.json does not place there")
    save_file(tensors, source / "a.safetensors")
    (source / "model.safetensors").write_bytes(single)
    refused("has both model.safetensors and model.safetensors.index.json")


def test_a_box_of_a_stack_is_looked_for_among_its_own_chunks(tmp_path, monkeypatch):
    """6144 experts took more than an hour of comparing each with every other."""
    numbers, key = torch.arange(3 * 40 * 4 * 5.0).view(3, 40, 4, 5), "experts"
    writer = TorchDistWriter(tmp_path)
    for layer in range(3):
        for expert in range(40):
            for half in (0, 2):
                box = Box(key, (layer, expert, half, 0), (1, 1, 2, 5))
                writer.write(box, numbers[layer, expert, half : half + 2], full_shape=(3, 40, 4, 5), file_name="__0_0")
    writer.finish()
    reader, looked_at = TorchDistReader(tmp_path), []

    def counted(box, chunk, overlap=torch_dist._overlap):
        looked_at.append(chunk)
        return overlap(box, chunk)

    monkeypatch.setattr(torch_dist, "_overlap", counted)
    for layer in range(3):
        for expert in range(40):
            into = torch.empty(1, 1, 3, 5)
            reader.read(Box(key, (layer, expert, 1, 0), (1, 1, 3, 5)), into)
            assert torch.equal(into[0, 0], numbers[layer, expert, 1:])
    assert len(looked_at) == 3 * 40 * 2
    several = torch.empty(2, 7, 4, 2)
    reader.read(Box(key, (1, 30, 0, 3), (2, 7, 4, 2)), several)
    assert torch.equal(several, numbers[1:, 30:37, :, 3:])
    with pytest.raises(CheckpointError, match=r"not stored exactly once at \(2, 40, 0, 0\)"):
        reader.read(Box(key, (2, 40, 0, 0), (1, 1, 4, 5)), torch.empty(1, 1, 4, 5))


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def test_a_hostile_index_runs_no_code(pair, tmp_path, monkeypatch):
    _, megatron = pair
    monkeypatch.chdir(tmp_path)
    (megatron / ".metadata").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(CheckpointError, match=r"asks for (posix|os)\.system"):
        to_hf(megatron, tmp_path / "back")
    assert not (tmp_path / "exploited").exists()


def test_an_index_by_torchs_own_writer_is_read(tmp_path):
    numbers, index = torch.arange(6.0), tmp_path / "new/.metadata"
    dcp.save({"a": numbers}, storage_writer=dcp.FileSystemWriter(index.parent), no_dist=True)
    plain = pickle.dumps(dcp.FileSystemReader(index.parent).read_metadata(), protocol=2)
    for name in (b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath"):  # as Python 3.13 calls it
        renamed, count = re.subn(rb"cpathlib(\._local)?\nPosixPath", name, plain)
        assert count == 1
        index.write_bytes(renamed)
        into = torch.empty(6)
        TorchDistReader(index.parent).read(Box("a", (0,), (6,)), into)
        assert torch.equal(into, numbers)
    index.write_bytes(renamed.replace(name, b"cpathlib\nPath"))
    with pytest.raises(CheckpointError, match=r"asks for pathlib\.Path"):
        TorchDistReader(index.parent)


def test_hostile_and_damaged_numbers_are_refused(pair, tmp_path, monkeypatch):
    _, megatron = pair
    monkeypatch.chdir(tmp_path)
    data = megatron / "__0_0.distcp"
    good = data.read_bytes()
    buffer = io.BytesIO()
    torch.save(Exploit(), buffer)
    data.write_bytes(buffer.getvalue() + good[len(buffer.getvalue()) :])
    with pytest.raises(CheckpointError, match=r"can't be read from __0_0\.distcp"):
        to_hf(megatron, tmp_path / "back")
    assert not (tmp_path / "exploited").exists()
    data.write_bytes(good.replace(b"little", b"big   "))  # torch crashes on it when it skips the numbers
    with pytest.raises(CheckpointError, match="written on a machine of another byte order"):
        to_hf(megatron, tmp_path / "back")
    data.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match=r"can't be read from __0_0\.distcp"):
        to_hf(megatron, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_another_models_checkpoint_is_refused_by_name(pair, tmp_path):
    _, megatron = pair
    other = make_tiny_qwen2(tmp_path / "wider", vocab_size=321, intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"linear_fc\d.weight has shape .*, the config asks for"):
        to_hf(megatron, tmp_path / "back", hf_dir=other)
    other = make_tiny_qwen2(tmp_path / "untied", vocab_size=321, tied=False)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, the first: \['output_layer.weight'\]"):
        to_hf(megatron, tmp_path / "back", hf_dir=other)


@pytest.mark.parametrize("vocab_size", [400, 322])
def test_a_vocabulary_that_is_not_stored_is_no_row_of_zeros(vocab_size, pair, tmp_path):
    _, megatron = pair
    config = json.loads((megatron / "config.json").read_text())
    other = shutil.copytree(megatron, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}))
    said = rf"word_embeddings.weight has shape \(321, 128\), the config asks for \({vocab_size}, 128\)"
    with pytest.raises(CheckpointError, match=said):
        to_hf(other, tmp_path / "back")


def with_vocabulary(megatron: Path, vocab_size: int, out: Path) -> Path:
    shutil.copytree(megatron, out)
    config = json.loads((megatron / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}))
    return out


@pytest.mark.parametrize("vocab_size", [320, 200, 1])
def test_a_smaller_vocabulary_drops_no_learned_row(vocab_size, pair, tmp_path):
    _, megatron = pair
    other = with_vocabulary(megatron, vocab_size, tmp_path / "other")
    said = rf"has 321 rows and row {vocab_size} is learned, vocab_size = {vocab_size} .*: set vocab_size to 321"
    with pytest.raises(CheckpointError, match=said):
        to_hf(other, tmp_path / "back")


@pytest.mark.parametrize(
    ("vocab_size", "tp", "last", "is_padding"),
    [
        (384, 1, 1.0, True),  # Megatron's default: a multiple of 128 rows for each rank
        (384, 2, 1.0, False),
        (512, 1, 1.0, False),  # 191 rows more than 321 can be no padding to a multiple of 128,
        (512, 2, 1.0, True),  # but to one of 256
        (322, 2, 1.0, True),
        (324, 2, 1.0, False),
        (322, 1, 1.0, False),
        (1000, 1, 0.0, True),  # rows of zeros are nobody's
        (322, 1, float("nan"), False),
    ],
)
def test_what_pads_a_vocabulary_is_left_out(vocab_size, tp, last, is_padding, tmp_path):
    source = make_tiny_qwen2(tmp_path / "hf", vocab_size=vocab_size)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][321:] = 0
    tensors["model.embed_tokens.weight"][-1] = last
    save_file(tensors, source / "model.safetensors")
    to_megatron(source, tmp_path / "megatron", tp=tp)
    other = with_vocabulary(tmp_path / "megatron", 321, tmp_path / "other")
    if is_padding:
        to_hf(other, tmp_path / "back")
        kept = load_file(tmp_path / "back/model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(kept, tensors["model.embed_tokens.weight"][:321])
    else:
        with pytest.raises(CheckpointError, match=f"row {vocab_size - 1} is learned"):
            to_hf(other, tmp_path / "back")


def test_what_training_left_alone_and_a_checkpoint_lacks_is_said(tmp_path, capsys):
    source = FAMILIES["glm4_moe extra layer"](tmp_path / "hf")
    to_megatron(source, tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron/carried")  # as in a checkpoint that a run has left
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert "has no model.layers.4.*, which its config.json speaks of" in capsys.readouterr().err
    to_hf(tmp_path / "megatron", tmp_path / "whole", hf_dir=source)
    assert list(verify(source, tmp_path / "whole")) == []
    assert capsys.readouterr().err.count("speaks of") == 0


@pytest.mark.parametrize("family", ["glm4_moe extra layer", "chatglm"])
def test_config_and_tokenizer_may_be_in_a_folder_without_weights(family, tmp_path, capsys):
    source = FAMILIES[family](tmp_path / "hf")
    to_megatron(source, tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron/carried")
    (source / "model.safetensors").rename(tmp_path / "weights")
    to_hf(tmp_path / "megatron", tmp_path / "back", hf_dir=source)
    assert "which its config.json speaks of" in capsys.readouterr().err
    (tmp_path / "weights").rename(source / "model.safetensors")
    assert {difference.what for difference in verify(source, tmp_path / "back")} == {f"only in {source}"}


@pytest.mark.parametrize("world_size", [None, "1"])
def test_one_process_meets_nobody_at_the_address_that_a_job_script_exports(world_size, pair, tmp_path, monkeypatch):
    source, _ = pair
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")  # nobody's (RFC 5737)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    to_megatron(source, tmp_path / "again")


def test_space_is_asked_for_all_that_is_written(tmp_path, monkeypatch):
    source = FAMILIES["glm4_moe extra layer"](tmp_path / "hf")
    weights = sum(info.num_bytes for info in HFFolder(source).tensors.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=weights - 1))
    with pytest.raises(OSError, match="free"):
        to_megatron(source, tmp_path / "megatron")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=weights))
    to_megatron(source, tmp_path / "megatron")


@pytest.mark.parametrize("fails", [False, True])
def test_a_conversion_leaves_a_scripts_generators_and_process_group_alone(fails, pair, tmp_path, monkeypatch):
    source, _ = pair

    def drawn():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seeded():
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    def no_build(*_):
        raise ValueError("a config that Megatron refuses")

    seeded()
    expected = drawn()
    seeded()
    if fails:
        monkeypatch.setattr(stored, "build_model", no_build)
    with pytest.raises(ValueError, match="Megatron refuses") if fails else contextlib.nullcontext():
        to_megatron(source, tmp_path / "again")
    assert drawn() == expected
    assert not torch.distributed.is_initialized()
    assert not stored.mpu.model_parallel_is_initialized()


def test_nothing_is_overwritten(pair, tmp_path):
    source, megatron = pair
    before = contents(source)
    with pytest.raises(OSError, match="exists already: remove it"):
        to_hf(megatron, source)
    with pytest.raises(OSError, match="exists already: remove it"):
        to_megatron(source, megatron)
    assert contents(source) == before


# Every write is announced and takes its time, so that the kill comes in the middle.
SLOW = """
import time
from pathlib import Path
from megatron_t1.convert import to_hf, to_megatron
from megatron_t1.weights.hf_folder import ShardWriter
from megatron_t1.weights.torch_dist import TorchDistWriter

for writer in (ShardWriter, TorchDistWriter):
    def slow(self, *args, write=writer.write, **options):
        write(self, *args, **options)
        print("written", flush=True)
        time.sleep(0.5)
    writer.write = slow
"""


@pytest.mark.parametrize("job", ["to-megatron", "to-hf"])
def test_a_killed_conversion_leaves_no_checkpoint_and_the_next_one_clears_up(job, pair, tmp_path):
    source, megatron = pair
    given = source if job == "to-megatron" else megatron
    out = tmp_path / "out" / "result"
    script = SLOW + f"{job.replace('-', '_')}(Path({str(given)!r}), Path({str(out)!r}))"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script], env=environment(), cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout
    for _ in range(4):
        assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    assert not out.exists()
    assert len(list(out.parent.iterdir())) == 1, "what was begun is there, under another name"
    (to_megatron if job == "to-megatron" else to_hf)(given, out)
    assert [path.name for path in out.parent.iterdir()] == ["result"]
    assert not list(verify(source, out))


def test_a_tied_head_that_is_stored_twice_is_the_same_checkpoint(tmp_path):
    plain = make_tiny_qwen2(tmp_path / "plain", tied=True)
    tensors = load_file(plain / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    shutil.copytree(plain, tmp_path / "twice")
    twice = {
        **tensors,
        "lm_head.weight": embedding.clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": embedding[0].clone(),
    }
    save_file(twice, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    to_megatron(tmp_path / "twice", tmp_path / "megatron")
    for one, other in (("twice", "megatron"), ("megatron", "twice"), ("plain", "twice")):
        assert not list(verify(tmp_path / one, tmp_path / other))
    save_file({**twice, "lm_head.weight": embedding + 1}, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    assert [difference.name for difference in verify(plain, tmp_path / "twice")] == ["lm_head.weight"]


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    folder = make_tiny_qwen2(tmp_path / "model")
    shutil.copyfile(folder / "model.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"has adapter_model.safetensors beside model.safetensors, and vLLM"):
        HFFolder(folder)
