"""What `t1 check` says that a run needs of its machines: estimates held to real parameter counts, layouts, shared GPUs,
stopping."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core.parallel_state import RankGenerator
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from transformers import AutoModelForCausalLM
from vllm.config import ModelConfig, ParallelConfig

from benchmarks.published import CONFIGS, write_config
from megatron_t1.check import estimate
from megatron_t1.check.dry_run import dry_run
from megatron_t1.check.findings import Findings
from megatron_t1.check.machines import Machines, fullest, layout_of, nodes_that_write, seconds_of
from megatron_t1.check.needs import SCRIPTS_GRACE_S, _grace, needs
from megatron_t1.check.suggest import as_options, suggest
from megatron_t1.cli.options import read
from megatron_t1.config import Config, dump
from megatron_t1.engine.layout import check_divisible, check_world
from megatron_t1.models import spec_of
from megatron_t1.models.sizes import Sizes
from megatron_t1.servers.config import RolloutConfig
from tests.forks import ROOT
from tests.models.families import FAMILIES
from tests.tiny import make_tiny, make_tiny_qwen2, make_tiny_qwen3_moe


@pytest.mark.parametrize(
    "make",
    [
        make_tiny_qwen2,
        partial(make_tiny_qwen2, tied=False),
        make_tiny_qwen3_moe,
        FAMILIES["qwen3_moe dense layer"],
        FAMILIES["glm4_moe"],
    ],
)
def test_parameters_are_those_of_the_model(tmp_path: Path, make) -> None:
    model = make(tmp_path)
    sizes = Sizes.of(spec_of(model))
    assert sizes.total == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("Qwen2ForCausalLM", {"hidden_size": 256, "intermediate_size": 1024}),
        ("Qwen3MoeForCausalLM", {"hidden_size": 256, "moe_intermediate_size": 96, "num_experts_per_tok": 8}),
        ("Qwen3MoeForCausalLM", {"hidden_size": 512, "moe_intermediate_size": 64, "num_experts_per_tok": 4}),
    ],
)
def test_activations_are_those_that_megatron_keeps(architecture: str, sizes: dict, run_ranks, tmp_path: Path) -> None:
    """Of a mixture the input of every expert that a token is sent to, too: where there are many, the most of all."""
    more = {"num_experts": 16} if "Moe" in architecture else {}
    make_tiny(architecture, tmp_path / "model", init_std=0.02, **sizes, **more)
    kept, expected = map(
        int, run_ranks(Path(__file__).with_name("kept_worker.py"), 1, tmp_path / "model", 512).split()[-2:]
    )
    assert 0.8 * kept < expected < kept


@pytest.mark.parametrize(("pipeline", "chunks"), [(2, 1), (4, 1), (2, 2), (4, 2), (4, 5), (8, 2)])
@pytest.mark.parametrize("microbatches", [8, 64])
def test_a_stage_keeps_what_megatrons_schedule_runs_ahead(
    pipeline: int, chunks: int, microbatches: int, tmp_path: Path
) -> None:
    cfg, machines = at(tmp_path, nodes=4, vllm_nodes=2)
    parallel = replace(cfg.parallel, pipeline=pipeline, virtual_pipeline=chunks, tensor=1, sequence_parallel=False)
    layout = layout_of(replace(cfg, parallel=parallel), spec_of(tmp_path), "rl", machines, {"train": 200})
    layout = replace(layout, microbatches=microbatches, recompute=False, stage_layers=(40,) * pipeline)
    sizes = Sizes.of(spec_of(tmp_path))
    of_one = replace(layout, pipeline=1, virtual_pipeline=1, stage_layers=(40,), microbatches=1)
    one = estimate.stage_memory(sizes, of_one, 0)["activations"]
    for stage in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda stage=stage: stage)
        ranks = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None)
        total, _, ahead, _ = get_pp_rank_microbatches(microbatches, chunks, pipeline, p2p_communicator=ranks)
        kept = estimate.stage_memory(sizes, layout, stage)["activations"]
        assert kept / one == pytest.approx(min(ahead + 1, total) / chunks)


def test_more_gpus_than_kv_heads_hold_copies_of_keys_and_values(tmp_path: Path) -> None:
    """As vLLM cuts them: of two KV heads each GPU of four holds one."""
    model = make_tiny_qwen2(tmp_path, hidden_size=256, num_heads=8)
    spec, gpu, of_vllm = spec_of(model), estimate.GPUS["H100"], ModelConfig(str(model), enforce_eager=True)
    for tp in (1, 2, 4, 8):
        found, heads = Findings(), of_vllm.get_num_kv_heads(ParallelConfig(tensor_parallel_size=tp))
        cfg = read(Config, ["--model.hf_path", str(model), "--rollout.tp", str(tp), "--model.dtype", "float32"])
        needs(cfg, spec, "rl", Machines(nodes=2, vllm_nodes=1), {"train": 200}, found)
        (said,) = re.findall(r"room for (\d+) tokens of keys and values", "\n".join(found.facts))
        free = gpu.memory_bytes * 0.85 - 4e9 - 4 * Sizes.of(spec).total / tp
        assert int(said) == pytest.approx(free / (2 * 4 * heads * 32 * 2), rel=1e-6)


def but_disk(found: Findings) -> list[str]:
    """The problems that are not of the disk of the machine that runs the tests."""
    return [problem for problem in found.problems if "GB free" not in problem]


def at(tmp_path: Path, **machines: int) -> tuple[Config, Machines]:
    options = ["--config", str(ROOT / "examples/qwen2.5-32b/rl.yaml"), "--model.hf_path", str(tmp_path)]
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen2.5-32b"]))
    return read(Config, options), Machines(**machines)


def test_the_published_model_fits_where_the_example_puts_it(tmp_path: Path) -> None:
    cfg, machines = at(tmp_path, nodes=4, vllm_nodes=2)
    sizes = Sizes.of(spec_of(tmp_path))
    assert sizes.total == pytest.approx(32.76e9, rel=1e-3)  # as published
    layout = layout_of(cfg, spec_of(tmp_path), "rl", machines, {"train": 200})
    assert (layout.tensor, layout.pipeline, layout.data) == (8, 2, 1)
    for stage in (0, 1):
        parts = estimate.stage_memory(sizes, layout, stage)
        on_rank = parts["weights"] / 2
        assert on_rank == pytest.approx(sizes.total / 16, rel=0.01)
        assert parts["gradients"] + parts["optimizer"] + parts["anchor"] == pytest.approx(22 * on_rank)
        assert sum(parts.values()) < 80e9
        for kind, bytes_each in (("fixed", 2), ("none", 0)):
            other = estimate.stage_memory(sizes, replace(layout, anchor=kind), stage)["anchor"]
            assert other == pytest.approx(bytes_each * on_rank)


def test_fp8_copies_of_the_matrices_are_planned_for(tmp_path: Path) -> None:
    """The policy's, its transposes and the anchor's, a byte a number; none is kept where memory is given to servers."""
    cfg, machines = at(tmp_path, nodes=4, vllm_nodes=2)
    fp8 = replace(cfg, model=replace(cfg.model, transformer={**cfg.model.transformer, "fp8": "hybrid"}))
    spec, longest = spec_of(tmp_path), {"train": 200}
    plain, parts = (
        estimate.stage_memory(Sizes.of(spec), layout_of(each, spec, "rl", machines, longest), 0) for each in (cfg, fp8)
    )
    matrices = 32 * (5120 * (5120 + 2 * 1024) + 5120 * 5120 + 3 * 5120 * 27648) / 8
    assert parts == plain | {"fp8": pytest.approx(3 * matrices, rel=1e-3)}
    assert estimate.kept_bytes(parts, "none") == estimate.kept_bytes(plain, "none") + parts["fp8"]
    assert estimate.kept_bytes(parts, "optimizer") == parts["weights"]


@pytest.mark.parametrize("num_tokens", [16_384, 131_072])
def test_the_smallest_layout_that_fits_is_suggested(num_tokens: int, tmp_path: Path) -> None:
    cfg, machines = at(tmp_path, nodes=4, vllm_nodes=2)
    cfg = replace(cfg, sampling=replace(cfg.sampling, max_new_tokens=num_tokens))
    spec, longest = spec_of(tmp_path), {"train": 2048}
    found, worst = suggest(cfg, spec, "rl", machines, longest)
    found.parallel.check_fits(2048 + num_tokens, found.model)
    sizes, layout = Sizes.of(spec), layout_of(found, spec, "rl", machines, longest)
    assert sum(fullest(sizes, layout).values()) <= worst < 0.95 * 80e9
    size = found.parallel.num_ranks
    assert size <= 16
    for tensor, context, pipeline in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16)):
        if tensor * context * pipeline < size:  # everything kept but one tensor a layer, and still too much
            given = {"tensor": tensor, "context": context, "pipeline": pipeline, "sequence_parallel": tensor > 1}
            parallel = replace(cfg.parallel, **given, max_tokens_per_microbatch=-(-(2048 + num_tokens) // context))
            smaller = layout_of(replace(cfg, parallel=parallel), spec, "rl", machines, longest)
            needed = [sum(fullest(sizes, smaller).values()), estimate.checkpoint_memory(sizes, smaller, 0)[0]]
            assert max(needed) >= 0.95 * 80e9 * 0.99
    asked = replace(cfg, parallel=replace(cfg.parallel, virtual_pipeline=2))
    options = shlex.split(as_options(found, worst).splitlines()[1])
    (tmp_path / "asked.yaml").write_text(dump(asked))
    assert read(Config, ["--config", str(tmp_path / "asked.yaml"), *options]) == found
    assert suggest(cfg, spec, "rl", Machines(nodes=1, gpu="A100"), longest) is None
    assert suggest(cfg, spec, "rl", Machines(nodes=1, vllm_gpus=8), longest) is None, "none is left to train"
    of_run = suggest(cfg, spec, "run", Machines(nodes=4), {**longest, "sft": 4 * num_tokens // 3})
    of_run[0].parallel.check_fits(4 * num_tokens // 3, of_run[0].model)
    assert suggest(cfg, spec, "sft", machines, {})[0].parallel.num_ranks > 1


def test_a_card_with_less_memory_than_others_of_its_name_is_planned_for(tmp_path: Path) -> None:
    cfg, machines = at(tmp_path, nodes=4, vllm_nodes=2)
    spec, longest = spec_of(tmp_path), {"train": 200}
    for bytes_there, warned in ((85e9, False), (48e9, True)):
        there, found = replace(machines, gpu_memory_bytes=bytes_there), Findings()
        needs(cfg, spec, "rl", there, longest, found)
        assert warned == any("the trainer needs about 52 GB on a GPU of 48 GB" in text for text in found.warnings)
        assert (suggest(cfg, spec, "rl", there, longest) is None) == warned
        said = re.search(r"room for (\d+) tokens", "\n".join(found.facts))
        memory = 0.9 * min(bytes_there, 80e9) - 4e9 - 2 * Sizes.of(spec).total / 4
        assert int(said[1]) == pytest.approx(memory / (2 * 2 * 1024 / 4 * 64), rel=1e-6)


def test_shared_gpus_are_planned_for_trainer_and_servers(tmp_path: Path) -> None:
    """4 nodes that all train and serve: 32 ranks and 8 servers, whose memory is what the trainer leaves."""
    cfg, machines = at(tmp_path, nodes=4, share_gpus=True)
    spec, longest = spec_of(tmp_path), {"train": 200}
    assert (machines.ranks("rl"), machines.servers(cfg.rollout.tp)) == (32, 8)
    assert layout_of(cfg, spec, "rl", machines, longest).data == 2
    refused = Findings()
    needs(cfg, spec, "rl", machines, longest, refused)
    room = re.search(r"= 0.9 is more than the (0\.\d\d) of a shared GPU", "\n".join(refused.problems))
    assert room, refused.problems
    assert 0.3 < float(room[1]) < 0.4
    fits = replace(cfg, rollout=replace(cfg.rollout, gpu_memory_utilization=float(room[1])))
    found = Findings()
    needs(fits, spec, "rl", machines, longest, found)
    assert not but_disk(found)
    assert "set parallel.offload = all and rollout.sleep = true, or" in refused.problems[0]
    ahead = Findings()
    needs(replace(cfg, rl=replace(cfg.rl, lag=1)), spec, "rl", machines, longest, ahead)
    assert not re.search("rollout.sleep|parallel.offload", "\n".join([*ahead.facts, *ahead.problems]))
    with pytest.raises(ValueError, match="share no GPU"):
        Machines(nodes=4, vllm_nodes=2, share_gpus=True)


@pytest.mark.parametrize(
    ("example", "nodes"), [("glm-4-9b", 1), ("qwen2.5-14b", 1), ("qwen2.5-32b", 2), ("qwen2.5-32b", 4)]
)
def test_every_example_fits_the_fewest_nodes_that_share(example: str, nodes: int, tmp_path: Path) -> None:
    """As examples/shared_gpus.yaml and docs/cluster.md say."""
    model, machines = write_config(tmp_path, example), Machines(nodes=nodes, share_gpus=True)
    files = [ROOT / f"examples/{example}/rl.yaml", ROOT / "examples/shared_gpus.yaml"]
    cfg = read(Config, [*itertools.chain(*(("--config", str(file)) for file in files)), "--model.hf_path", str(model)])
    spec, found = spec_of(model), Findings()
    check_divisible(spec, cfg.parallel)
    check_world(cfg.parallel, machines.ranks("rl"))
    needs(cfg, spec, "rl", machines, {"train": 2048}, found)
    assert not but_disk(found)
    assert not found.warnings


def test_turns_leave_a_shared_gpu_to_who_has_it(tmp_path: Path) -> None:
    """Weights of 4 GB stay, 10 bytes a parameter move: float32 weights and moments of one of two ranks, the average."""
    cfg, machines = at(tmp_path, nodes=4, share_gpus=True)
    spec, longest = spec_of(tmp_path), {"train": 200}
    sizes, layout = estimate.Sizes.of(spec), layout_of(cfg, spec, "rl", machines, longest)
    parts = estimate.stage_memory(sizes, layout, 0)
    weights = sizes.total / 16 * 2
    assert estimate.kept_bytes(parts, "optimizer") == pytest.approx(weights, rel=0.01)
    assert estimate.moved_bytes(parts, layout, "optimizer") == pytest.approx(5 * weights, rel=0.01)
    assert estimate.moved_bytes(parts, layout, "all") == pytest.approx(6 * weights, rel=0.01)
    rollout = replace(cfg.rollout, share_gpus=True, gpu_memory_utilization=0.89)
    parallel = replace(cfg.parallel, offload="optimizer")
    for sleep in (False, True):
        turns = replace(cfg, rollout=replace(rollout, sleep=sleep), parallel=parallel)
        found = Findings()
        needs(turns, spec, "rl", machines, longest, found)
        assert sleep == (not but_disk(found)), found.problems
        assert sleep != any("gives the servers nothing" in warning for warning in found.warnings)
    added = seconds_of(turns, spec, "rl", machines, longest)["turns"]
    assert added == pytest.approx(2 * 5 * weights / 48e9 + 2, rel=0.01)
    for wrong, said in (
        ({"rl": replace(turns.rl, lag=1)}, "rl.lag = 1 must be 0"),
        ({"rollout": RolloutConfig()}, "parallel.offload = 'optimizer' needs rollout.share_gpus"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(turns, **wrong)


def test_attention_counts_every_pair_of_tokens(tmp_path: Path) -> None:
    """Flops of a forward pass, summed position by position over samples of every length up to the longest."""
    at(tmp_path)
    sizes, prompt, longest = Sizes.of(spec_of(tmp_path)), 2048, 2048 + 32768
    scores_and_values = 2 * 2 * sizes.hidden * sizes.num_layers
    upto = [0.0]
    for position in range(longest):
        upto.append(upto[-1] + 2 * sizes.active + scores_and_values * (position + 1))
    flops = [upto[prompt + new] for new in range(32769)]
    work = estimate.sequence_work(sizes, prompt + 16384, longest)
    assert 2 * sizes.active * work == pytest.approx(sum(flops) / len(flops), rel=1e-3)
    assert estimate.sequence_work(sizes, longest, longest) == pytest.approx(upto[-1] / (2 * sizes.active), rel=1e-3)
    assert work > 1.2 * (prompt + 16384), "and it is no trifle"


@pytest.mark.parametrize(
    ("example", "new_tokens"), [("glm-4-9b", 10240), ("qwen2.5-14b", 10240), ("qwen2.5-32b", 16384)]
)
def test_responses_have_the_papers_length_and_fit_with_their_prompts(example: str, new_tokens: int) -> None:
    cfg = read(Config, ["--config", str(ROOT / f"examples/{example}/rl.yaml")])
    assert cfg.sampling.max_new_tokens == cfg.evaluate.sampling.max_new_tokens == new_tokens
    assert cfg.scaling.sampling.max_new_tokens == cfg.scaling.budgets[-1] == new_tokens
    assert cfg.rollout.max_model_len == new_tokens + 2048
    cfg.parallel.check_fits(cfg.rollout.max_model_len, cfg.model)


@pytest.mark.parametrize(
    "sizes", [(8, 1, 1, 2, 1), (8, 1, 2, 2, 1), (2, 1, 4, 1, 4), (4, 2, 2, 2, 1), (1, 1, 16, 2, 8)]
)
def test_a_checkpoint_is_written_where_its_first_copy_lies(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """By Megatron's own order of ranks."""
    tensor, context, data, pipeline, expert = sizes
    cfg, machines = at(tmp_path, nodes=4, vllm_nodes=2)
    layout = layout_of(cfg, spec_of(tmp_path), "rl", machines, {"train": 200})
    layout = replace(layout, tensor=tensor, context=context, data=data, pipeline=pipeline, expert=expert)
    dense = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    experts = RankGenerator(
        tp=1, ep=expert, dp=tensor * context * data // expert, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp"
    )
    writers = {group[0] for group in dense.get_ranks("cp-dp") + (experts.get_ranks("dp") if expert > 1 else [])}
    for on_node in (1, 4, 8):
        assert nodes_that_write(layout, on_node) == len({rank // on_node for rank in writers})


def test_stopping_is_priced_and_held_to_the_grace(tmp_path: Path) -> None:
    """The checkpoint of the 32B example is 590 GB: five minutes are not enough."""
    cfg, machines = at(tmp_path, nodes=4, vllm_nodes=2)
    spec, longest = spec_of(tmp_path), {"train": 200}
    sizes, layout = Sizes.of(spec), layout_of(cfg, spec, "rl", machines, longest)
    step = seconds_of(cfg, spec, "rl", machines, longest)
    size = estimate.checkpoint_bytes(sizes, "bfloat16", layout.anchor)
    ahead = estimate.stop_seconds(sizes, layout, step, size, nodes=2, awaits_batch=True)
    seconds = estimate.stop_seconds(sizes, layout, step, size, nodes=2, awaits_batch=False)
    assert ahead == seconds | {"generate": max(0, step["generate"] - step["train"])}
    assert seconds["train"] == pytest.approx(step["train"] * 2 / (layout.microbatches + 1))
    assert layout.microbatches > 100
    assert seconds["write"] == size / 2e9
    assert 300 < sum(seconds.values()) < 330

    found = Findings()
    _grace(seconds, dataclasses.replace(machines, grace_s=1740), found)
    assert not found.problems
    _grace(seconds, dataclasses.replace(machines, grace_s=270), found)
    assert re.fullmatch(
        r"GRACE_S = 270 is less than stopping needs: .*; submit with GRACE_S=360 and sbatch --signal=B:USR1@420",
        found.problems[0],
    )

    assert f"GRACE_S:-{SCRIPTS_GRACE_S:.0f}}}" in (ROOT / "slurm/lib.sh").read_text()
    _grace({"train": 1000}, machines, found)
    assert not found.warnings
    _grace({"train": 2000}, machines, found)
    assert "GRACE_S = 1740, as the batch scripts have it, is less than stopping needs" in found.warnings[0]


def test_a_checkpoint_gathers_where_the_optimizer_is_spread(tmp_path: Path) -> None:
    cfg, machines = at(tmp_path, nodes=4, vllm_nodes=2)
    sizes = Sizes.of(spec_of(tmp_path))
    alone = layout_of(cfg, spec_of(tmp_path), "rl", machines, {"train": 200})
    spread = dataclasses.replace(alone, data=2)
    p = estimate.parameters(sizes, alone, 0)
    assert estimate.checkpoint_memory(sizes, alone, 0) == (24 * p, 18 * p)
    assert estimate.checkpoint_memory(sizes, spread, 0) == (18 * p + 6 * p, 18 * p + 14 * p)


@pytest.mark.parametrize("expert", [1, 4, 8])
def test_the_state_of_every_expert_is_held_once(expert: int, tmp_path: Path) -> None:
    """Spread over eight ranks, of which some have the same experts: 12 bytes a parameter on all of them together."""
    cfg, machines = at(tmp_path, nodes=4, vllm_nodes=2)
    layout = layout_of(cfg, spec_of(tmp_path), "rl", machines, {"train": 200})
    layout = dataclasses.replace(layout, tensor=1, pipeline=1, stage_layers=(), data=8, expert=expert)
    dense = Sizes.of(spec_of(tmp_path))
    sizes = dataclasses.replace(dense, experts=(8_000_000,) * dense.num_layers)
    assert layout.distributed_optimizer
    assert layout.dtype == "bfloat16"
    assert 8 * estimate.stage_memory(sizes, layout, 0)["optimizer"] == pytest.approx(12 * sizes.total)
    kept = estimate.kept_bytes(estimate.stage_memory(sizes, layout, 0), "none")
    experts, copies = sum(sizes.experts) / expert, 8 / expert
    gathered = 4 * dense.total * (1 + 1 / 8) + (4 * experts * (1 + 1 / copies) if expert < 8 else 0)
    assert estimate.checkpoint_memory(sizes, layout, 0)[0] - kept == pytest.approx(gathered), "one copy is not gathered"


def test_context_ranks_are_planned_like_data_parallel_ones_for_samples_twice_as_long(tmp_path: Path) -> None:
    cfg, machines = at(tmp_path, nodes=4, vllm_nodes=2)
    spec, longest = spec_of(tmp_path), {"train": 200}
    plain, shared = (replace(cfg, parallel=replace(cfg.parallel, pipeline=1, context=context)) for context in (1, 2))
    layouts = [layout_of(each, spec, "rl", machines, longest) for each in (plain, shared)]
    assert [(layout.context, layout.data, layout.copies) for layout in layouts] == [(1, 2, 2), (2, 1, 2)]
    assert layouts[0] == replace(layouts[1], context=1, data=2)
    parts = [estimate.stage_memory(estimate.Sizes.of(spec), layout, 0) for layout in layouts]
    assert parts[0] == parts[1]
    shared.parallel.check_fits(2 * 18432, shared.model)
    with pytest.raises(ValueError, match=r"36864 tokens .* microbatch of 18432; raise .* or parallel.context"):
        plain.parallel.check_fits(2 * 18432, plain.model)


@pytest.mark.parametrize("command", ["rl", "sft"])
def test_tensor_parallelism_over_nodes_is_never_suggested(command: str, tmp_path: Path) -> None:
    cfg, machines = at(tmp_path, nodes=8, ranks_per_node=4)
    found, _ = suggest(cfg, spec_of(tmp_path), command, machines, {"train": 200, "sft": 8192})
    assert found.parallel.tensor <= 4


def test_a_dry_run_prints_what_the_batch_script_would_run(tmp_path: Path) -> None:
    cfg, machines = at(tmp_path, nodes=4, vllm_nodes=2)
    text = dry_run(cfg, "rl", machines, ["--config", str(ROOT / "examples/qwen2.5-32b/rl.yaml"), "--rl.steps", "7"])
    lines = [line for line in text.splitlines() if line.startswith("srun")]
    serving, training = [line for line in lines if " serve " in line], [line for line in lines if " rl " in line]
    assert len(serving) == 2
    assert "--nodelist=node3" in serving[0]
    assert "--nodelist=node4" in serving[1]
    (line,) = training
    assert "--nodes=2 --ntasks-per-node=8 --ntasks=16 --nodelist=node1\\,node2" in line
    assert "--rl.steps 7" in line
    assert "--rollout.await_servers 4" in line
    assert "vllm.entrypoints" in text
    assert "--tensor-parallel-size 4" in text
    joined = [f"--config={ROOT / 'examples/qwen2.5-32b/rl.yaml'}", "--rl.steps", "7"]
    assert dry_run(cfg, "rl", machines, joined) == text
    with pytest.raises(ValueError, match="--dry-run needs --config FILE"):
        dry_run(cfg, "rl", machines, ["--rl.steps", "7"])
