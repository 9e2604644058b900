"""`t1 check`: everything that would stop or spoil a run, found before a GPU is spent, and what the run will need.

    read all settings -> settings against the checkpoint, the layout, the data, the disk -> memory and time -> report

Problems end it with exit code 1, warnings do not. Left out: anything that needs a GPU or a server to find out.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import torch

from megatron_t1.check.context import context_needs, too_long, wrong_answerer
from megatron_t1.check.findings import Findings
from megatron_t1.check.machines import Machines
from megatron_t1.check.needs import needs
from megatron_t1.check.suggest import as_options, suggest
from megatron_t1.config import Config
from megatron_t1.data.dedup import refuse_shared
from megatron_t1.data.prompts import load_questions, load_sft
from megatron_t1.data.template import Template
from megatron_t1.engine.layout import check_divisible, check_world
from megatron_t1.evaluation.questions import question_sets, unanswerable
from megatron_t1.fields import FieldError
from megatron_t1.files import ENCODING, of_shape, read_json
from megatron_t1.models import spec_of
from megatron_t1.models.sizes import Sizes
from megatron_t1.models.spec import ModelSpec
from megatron_t1.platform import te
from megatron_t1.platform.detect import Platform
from megatron_t1.platform.installed import installed
from megatron_t1.weights.hf_folder import CheckpointError, HFFolder, is_torch_dist

_OF_TRANSFORMER_ENGINE = ("apply_rope_fusion", "moe_permute_fusion", "moe_router_fusion")
"""Of `model.transformer`, what Megatron looks for Transformer Engine for as soon as it reads it."""
_LINES_READ = 200
"""Of each data file."""


def check(cfg: Config, command: str, machines: Machines, found: Findings, *, suggests: bool = False) -> Findings:
    """Adds what is found for `t1 <command>` at `machines`: sft, rl, evaluate, scaling, run or serve; with
    `suggests` the smallest layout that fits, too."""
    if machines.vllm_nodes and command == "run":
        found.problems.append("t1 run starts its servers where it trains: leave out --vllm_nodes, or use t1 rl")
    if command == "evaluate" and not cfg.model.hf_path:
        _elsewhere(cfg, found)
        return found
    files = _files(cfg, command, found)
    try:
        model_dir = cfg.model.folder()
        spec = spec_of(model_dir)
    except ValueError as error:
        found.problems.append(str(error))
        return found
    try:
        if not is_torch_dist(model_dir):
            HFFolder(model_dir)
    except CheckpointError as error:
        found.problems.append(str(error))
    trains, samples = command in ("sft", "rl", "run"), command != "sft"
    template = _tokens(cfg, model_dir, spec, found)
    if trains:
        _layout(cfg, spec, command, machines, found)
    if samples:
        _sampling(cfg, spec, command, machines, found)
    longest: dict[str, int] = {}
    if template:
        longest, measured = _data(cfg, command, files, template, found)
        _lengths(cfg, spec, command, longest, measured, template, found)
    if trains:
        needs(cfg, spec, command, machines, longest, found)
        if suggests and machines.share_gpus and command != "sft":
            found.facts.append(
                "no layout is suggested for shared GPUs: what fits depends on rollout.gpu_memory_utilization"
            )
        elif suggests:
            fits = suggest(cfg, spec, command, machines, longest)
            found.facts.append(as_options(*fits) if fits else "no layout fits these machines and the longest sequence")
    return found


def _elsewhere(cfg: Config, found: Findings) -> None:
    """An evaluation without a model folder: of an endpoint or of stored responses."""
    own = cfg.evaluate
    try:
        if own.responses and not Path(own.responses).is_file():
            raise ValueError(f"evaluate.responses = {own.responses} does not exist")
        if own.endpoint.urls:
            own.endpoint.key()
        elif not own.responses:
            raise ValueError("give model.hf_path, evaluate.endpoint.urls or evaluate.responses")
        for name, questions in question_sets(cfg, cfg.evaluate.sets).items():
            found.facts.append(f"set {name}: {len(questions)} questions")
    except (ValueError, OSError) as error:
        found.problems.append(str(error))


def _tokens(cfg: Config, model_dir: Path, spec: ModelSpec, found: Findings) -> Template | None:
    try:
        template = Template(model_dir, cfg.data)
    except ValueError as error:
        found.problems.append(str(error))
        return None
    size = len(template.tokenizer)
    found.must(
        size <= spec.vocab_size,
        f"{model_dir}: the tokenizer has {size} tokens and config.json a vocab_size of {spec.vocab_size}: ids beyond "
        "it have no weights; use the tokenizer that the model came with",
    )
    found.facts.append(
        f"{spec.architecture}, {Sizes.of(spec).total / 1e9:.2f}e9 parameters; vocabulary {spec.vocab_size} "
        f"rows for {size} tokens (the others leave no text, which the penalty garbled counts); responses end with "
        f"token {template.eos_token_id}"
    )
    path = model_dir / "generation_config.json"
    if path.exists():
        ends = read_json(path, dict[str, object]).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        found.should(
            ends == [None] or template.eos_token_id in ends,
            f"{path} ends responses with {ends}, the tokenizer, which training uses, with {template.eos_token_id}",
        )
    return template


def _layout(cfg: Config, spec: ModelSpec, command: str, machines: Machines, found: Findings) -> None:
    parallel, world = cfg.parallel, machines.ranks(command)
    if machines.splits_nodes(command) and not (cfg.rollout.urls or cfg.rollout.await_servers):
        found.must(
            0 < machines.vllm_gpus_of_node < machines.gpus_per_node,
            f"{machines.vllm_gpus_of_node} of the {machines.gpus_per_node} GPUs of a node are for vLLM, the others "
            "train: one side has none; give --vllm_gpus, or set rollout.share_gpus = true (docs/cluster.md)",
        )
    ours = 0 if machines.vllm_nodes or machines.share_gpus or cfg.rollout.urls else machines.vllm_gpus_of_node
    if command in ("rl", "run") and machines.ranks_per_node:
        found.must(
            machines.ranks_per_node + ours <= machines.gpus_per_node,
            f"{machines.ranks_per_node} trainer processes on a node and {ours} GPUs of it for vLLM are more than its "
            f"{machines.gpus_per_node}: lower one of them, or set rollout.share_gpus = true (docs/cluster.md)",
        )
    try:
        check_divisible(spec, parallel, cfg.model.transformer)
    except ValueError as error:
        found.problems += str(error).partition(": ")[2].split("; ")
    else:
        _megatron(cfg, spec, found)
    try:
        check_world(parallel, world)
    except ValueError as error:
        found.problems.append(str(error))
    on_node = machines.ranks_on_node(command)
    found.should(
        parallel.tensor <= on_node,
        f"parallel.tensor = {parallel.tensor} reaches over nodes of {on_node} trainer processes: slow; lower it and "
        "raise parallel.pipeline",
    )
    if cfg.model.transformer.get("fp8"):
        found.should(
            installed("transformer-engine") is not None,
            "model.transformer.fp8 needs Transformer Engine, which is not installed here",
        )
        found.must(cfg.model.layers == "auto", "model.transformer.fp8 needs model.layers = auto")
        found.must(
            cfg.model.dtype == "bfloat16", f"model.transformer.fp8 needs model.dtype = bfloat16, not {cfg.model.dtype}"
        )
    if command in ("rl", "run") and cfg.loss.kl_estimator == "full" and cfg.loss.kl_coef:
        found.warnings.append("loss.kl_estimator = full computes the anchor's whole vocabulary in every step: slower")


def _megatron(cfg: Config, spec: ModelSpec, found: Findings) -> None:
    """What Megatron's own config refuses of the layout and `model.transformer`."""
    version = te.version()  # before Megatron is imported, which one that is broken would end
    from megatron_t1.engine.model import transformer_config

    device = torch.device("cpu")
    planned = Platform(name="cuda", device=device, backend="nccl", transformer_engine=version or "planned", apex=False)
    given = cfg.model.transformer
    if version is None:  # the machines of the run may have what Megatron looks for here
        given = given | dict.fromkeys(_OF_TRANSFORMER_ENGINE, False)
    try:
        config = transformer_config(replace(cfg.model, transformer=given), spec, cfg.parallel, planned)
    except ValueError as error:
        found.problems.append(str(error))
        return
    kinds = get_type_hints(type(config))
    for name in given.keys() - {"attention_backend"}:  # its members have names, which `ModelConfig` knows
        try:
            of_shape(given[name] or None, kinds[name] | None)  # what is off may be spelled so
        except ValueError as error:
            found.problems.append(f"model.transformer.{name} = {given[name]!r} is nothing that Megatron takes: {error}")


def _sampling(cfg: Config, spec: ModelSpec, command: str, machines: Machines, found: Findings) -> None:
    rollout, sampling = cfg.rollout, cfg.sampling
    heads, groups = spec.transformer["num_attention_heads"], spec.transformer["num_query_groups"]
    found.must(heads % rollout.tp == 0, f"rollout.tp = {rollout.tp} does not divide the {heads} attention heads")
    found.must(
        groups % rollout.tp == 0 or rollout.tp % groups == 0,
        f"rollout.tp = {rollout.tp} and {groups} key-value heads: one must divide the other",
    )
    there = machines.gpus_of_servers(command)
    found.must(
        rollout.tp <= there or not there or bool(rollout.urls or rollout.await_servers),
        f"rollout.tp = {rollout.tp} is more than the {there} GPUs that each node has for vLLM: lower it or give more",
    )
    mode = rollout.vllm_args.get("logprobs-mode", rollout.vllm_args.get("logprobs_mode", "processed_logprobs"))
    found.must(
        mode == "processed_logprobs",
        f"rollout.vllm_args sets logprobs-mode = {mode}: logprobs from before the temperature make every policy ratio "
        "wrong",
    )
    if command == "scaling":
        try:
            cfg.of_answers()
        except FieldError as error:
            found.problems.append(str(error))
    if command not in ("rl", "run"):
        return
    for name, value in sampling.cuts().items():
        found.warnings.append(
            f"sampling.{name} = {value} cuts the distribution that is sampled, not the one that is trained: the policy "
            "gradient is biased, and tokens that were cut count as possible. T1 ablates it; the mismatch is logged"
        )
    found.should(
        rollout.dtype in ("auto", cfg.model.dtype),
        f"rollout.dtype = {rollout.dtype} is not model.dtype = {cfg.model.dtype}: a train/rollout mismatch by design",
    )
    found.facts.append(
        f"logprobs of servers and trainer: after temperature {sampling.temperature}, checked on every server at first"
    )


def _files(cfg: Config, command: str, found: Findings) -> dict[str, Path]:
    """The files of `data` that the command reads and that are there, by name."""
    files = {}
    read = {"sft": ("sft",), "rl": ("train",), "run": ("sft", "train", "heldout")}.get(command, ())
    if command == "rl" and cfg.data.heldout:
        read += ("heldout",)
    for name in read:
        try:
            files[name] = cfg.data.need(name)
        except ValueError as error:
            found.problems.append(str(error))
    return files


def _data(
    cfg: Config, command: str, files: dict[str, Path], template: Template, found: Findings
) -> tuple[dict[str, int], dict[str, int]]:
    """Reads what the command reads, questions whole, tokens of the first ones; the longest prompt (or example) of each
    file, and of each set that is measured."""
    longest: dict[str, int] = {}
    if "sft" in files:
        _examples(cfg, files["sft"], template, longest, found)
    read = {}
    for name, path in ((name, path) for name, path in files.items() if name != "sft"):
        try:
            questions = load_questions(path, cfg.data.system_prompt)
            beginning = questions[:_LINES_READ]
            longest[name] = max(len(question.prompt(template).token_ids) for question in beginning)
        except (ValueError, OSError) as error:
            found.problems.append(f"data.{name}: {error}")
            continue
        read[name] = questions
        if told := unanswerable(f"data.{name}", questions):
            found.warnings.append(told)
        found.facts.append(
            f"data.{name}: {len(questions)} questions; "
            f"the longest of the first {len(beginning)}: {longest[name]} tokens"
        )
    try:
        if "train" in read:
            cfg.rl.check_draws_from(len(read["train"]))
        if len(read) == 2:
            refuse_shared(*([question.text for question in read[name]] for name in ("train", "heldout")))
    except ValueError as error:
        found.problems.append(str(error))
    measured: dict[str, int] = {}
    measures, sets = command == "run" or (command == "rl" and cfg.rl.measure_every), any(cfg.evaluate.sets)
    if measures and not sets and "heldout" in longest:
        measured[files["heldout"].stem] = longest["heldout"]
    if command in ("evaluate", "scaling") or (measures and sets):
        try:
            named = [cfg.scaling.set] if command == "scaling" else cfg.evaluate.sets
            for name, questions in question_sets(cfg, named).items():
                tokens = max(len(question.prompt(template).token_ids) for question in questions)
                measured[name] = tokens
                found.facts.append(f"set {name}: {len(questions)} questions; the longest: {tokens} tokens")
        except (ValueError, OSError) as error:
            found.problems.append(str(error))
    return longest, measured


def _examples(cfg: Config, path: Path, template: Template, longest: dict[str, int], found: Findings) -> None:
    """Only the first are read: tokenising all of them takes minutes."""
    with tempfile.TemporaryDirectory() as folder:
        beginning = Path(folder) / path.name
        try:
            with path.open(encoding=ENCODING) as file:
                head = list(itertools.islice((line for line in file if line.strip()), _LINES_READ))
                count = len(head) + sum(1 for line in file if line.strip())
            beginning.write_text("".join(head), encoding="utf-8")
            longest["sft"] = max(sequence.num_tokens for sequence in load_sft(beginning, template, cfg.data))
        except (ValueError, OSError) as error:
            found.problems.append(f"data.sft: {str(error).replace(str(beginning), str(path))}")
            return
    found.facts.append(f"data.sft: {count} lines; the longest of the first {len(head)}: {longest['sft']} tokens")
    least, heldout = cfg.sft.batch_size, cfg.sft.num_heldout
    found.must(
        count - heldout >= least,
        f"sft.batch_size = {least} is larger than the {count} lines of {path}, less sft.num_heldout = {heldout}",
    )


def _lengths(
    cfg: Config,
    spec: ModelSpec,
    command: str,
    longest: dict[str, int],
    measured: dict[str, int],
    template: Template,
    found: Findings,
) -> None:
    limit = cfg.rollout.max_model_len
    found.must(
        limit is None or limit <= spec.max_position_embeddings,
        f"rollout.max_model_len = {limit} is more than the model's {spec.max_position_embeddings} positions: lower it, "
        "or stretch them by YaRN (docs/checkpoints.md)",
    )
    needed = context_needs(cfg, command, template, train=longest.get("train", 0), measured=measured)
    answerer = wrong_answerer(cfg, needed) if command == "scaling" else None
    found.problems += filter(None, [too_long(cfg, spec, needed), answerer])
    trained = []
    if command in ("rl", "run"):
        trained.append(longest.get("train", 0) + cfg.sampling.max_new_tokens)
    if command in ("sft", "run"):
        trained.append(longest.get("sft", 0))
        found.should(
            trained[-1] <= spec.max_position_embeddings,
            f"data.sft has an example of {trained[-1]} tokens, more than the model's {spec.max_position_embeddings} "
            "positions: leave it out, or stretch them by YaRN (docs/checkpoints.md)",
        )
    if trained:
        try:
            cfg.parallel.check_fits(max(trained), cfg.model)
        except ValueError as error:
            found.problems.append(str(error))
