"""The jobs behind `t1 sft`, `t1 rl`, `t1 evaluate`, `t1 scaling` and `t1 run`: what they bring up, in which order.

`run` is the whole of T1 in one job: SFT while the servers start, evaluation, RL, evaluation, inference scaling, report.
Every job runs on all trainer ranks; what concerns servers, grading and files is rank 0's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch.distributed as dist

from megatron_t1 import evaluate, platform, rl, scaling, sft
from megatron_t1.actors import Actors, open_actors
from megatron_t1.config import Config
from megatron_t1.data.packing import Sequence
from megatron_t1.data.prompts import load_prompts, load_sft
from megatron_t1.data.template import Template
from megatron_t1.doctor import versions
from megatron_t1.engine.parallel import initialize, is_main
from megatron_t1.engine.step import ForwardEngine
from megatron_t1.files import write_json
from megatron_t1.metrics import Stopwatch
from megatron_t1.models import spec_of
from megatron_t1.platform import Platform
from megatron_t1.report import write_report
from megatron_t1.rollout.server import Servers
from megatron_t1.types import Prompt
from megatron_t1.weights.check import TOLERANCE, sync_check
from megatron_t1.weights.hf_folder import HFFolder
from megatron_t1.weights.sync import WeightSync, folder_pieces


@contextmanager
def trainer_ranks(cfg: Config) -> Iterator[Platform]:
    """Platform and process groups; says on rank 0 what was found."""
    found = platform.setup()
    initialize(cfg.parallel, found, cfg.seed)
    if is_main():
        print(f"{found.describe()}; {dist.get_world_size()} trainer processes", flush=True)
    yield found
    # Left out when a rank raises: the others may be waiting in a collective, and the launcher ends them.
    dist.barrier()
    dist.destroy_process_group()


def run_sft(cfg: Config) -> None:
    with trainer_ranks(cfg) as found:
        template = Template(Path(cfg.model.hf_path))
        hf_dir = sft.train(cfg, found, load_sft(cfg.data.need("sft"), template, cfg.data))
        _say(f"fine-tuned model: {hf_dir}")


def run_rl(cfg: Config) -> None:
    with trainer_ranks(cfg) as found, ExitStack() as stack:
        template = Template(Path(cfg.model.hf_path))
        prompts = load_prompts(cfg.data.need("train"), template, cfg.data)
        rl.check(cfg, prompts)
        actors = stack.enter_context(open_actors(cfg, template)) if is_main() else None
        trainer = rl.Trainer(cfg, found, prompts, actors)
        stack.callback(trainer.close)
        if actors:
            actors.ready(prompts[0])
        trainer.push()
        _say(f"trained model: {trainer.train()}")


def run_evaluate(cfg: Config, label: str) -> None:
    """Evaluate `model.hf_path` on `data.heldout`; one process, no Megatron."""
    template = Template(Path(cfg.model.hf_path))
    heldout = load_prompts(cfg.data.need("heldout"), template, cfg.data)
    HFFolder(Path(cfg.model.hf_path))  # whole, or refused before the servers start
    with open_actors(cfg, template) as actors:
        _serve_folder(cfg, actors)
        _evaluate(cfg, actors, heldout, label)


def run_scaling(cfg: Config, label: str) -> None:
    """Accuracy of `model.hf_path` against thinking budgets on `data.heldout`; one process, no Megatron."""
    template = Template(Path(cfg.model.hf_path))
    heldout = load_prompts(cfg.data.need("heldout"), template, cfg.data)
    HFFolder(Path(cfg.model.hf_path))  # whole, or refused before the servers start
    with open_actors(cfg, template) as actors:
        _serve_folder(cfg, actors)
        points = scaling.measure(cfg.scaling, actors, template, heldout, Path(cfg.run_dir) / "scaling", label, cfg.seed)
    for point in points:
        print(f"{point.budget:>8} thinking tokens: accuracy {point.accuracy:.3f}")


def run_all(cfg: Config) -> None:
    """SFT, evaluation, RL, evaluation, inference scaling, report. With `resume`, what is finished is not done again."""
    began = time.perf_counter() - (time.time() - psutil.Process().create_time())  # Python and the imports included
    run_dir, watch = Path(cfg.run_dir), Stopwatch()
    with trainer_ranks(cfg) as found, ExitStack() as stack:
        template = Template(Path(cfg.model.hf_path))
        train = load_prompts(cfg.data.need("train"), template, cfg.data)
        heldout = load_prompts(cfg.data.need("heldout"), template, cfg.data)
        _refuse_overlap(train, heldout)
        rl.check(cfg, train)
        _check_lengths(cfg, template, train, heldout)
        actors = stack.enter_context(open_actors(cfg, template)) if is_main() else None
        watch.add("start", time.perf_counter() - began)

        hf_dir = run_dir / "sft" / "hf"
        if not (cfg.resume and hf_dir.exists()):
            with watch("data"):
                examples = load_sft(cfg.data.need("sft"), template, cfg.data)
            with watch("sft"):
                hf_dir = sft.train(cfg, found, examples)
        tuned = replace(cfg, model=replace(cfg.model, hf_path=str(hf_dir)))
        with watch("start"):
            trainer = rl.Trainer(tuned, found, train, actors)
            stack.callback(trainer.close)
            if actors:
                actors.ready(train[0])
            trainer.push()

        with watch("evaluate"):
            if actors and trainer.steps_done == 0:
                _evaluate(cfg, actors, heldout, "sft")
        with watch("rl"):
            final = trainer.train()
        with watch("evaluate"):
            if actors:
                _evaluate(cfg, actors, heldout, "rl")
        with watch("scaling"):
            if actors:
                scaling.measure(cfg.scaling, actors, template, heldout, run_dir / "scaling", "rl", cfg.seed)
        with watch("stop"):
            stack.close()
        if is_main():
            with watch("report"):
                _summarize(cfg, watch, trainer.watch, began)
                report = write_report(run_dir)
            _say(
                f"report:       {report}\n"
                f"TensorBoard:  tensorboard --logdir {run_dir / 'tensorboard'}\n"
                f"model:        {final} (Hugging Face format)"
            )


def run_sync_check(cfg: Config) -> bool:
    """Push model.hf_path into all servers and compare what they answer with what the trainer's ranks compute.

    Returns whether every server held, took and keeps the trainer's weights. Not while a training uses the servers.
    """
    with trainer_ranks(cfg) as found, ExitStack() as stack:
        model_dir = Path(cfg.model.hf_path)
        servers = stack.enter_context(Servers(cfg.rollout, model_dir, cfg.run_dir)).start() if is_main() else None
        engine = ForwardEngine(cfg.model, cfg.parallel, found, temperature=1.0)
        engine.load_weights(model_dir)
        if servers:
            servers.wait_ready()
        result = sync_check(
            stack.enter_context(WeightSync(engine.pieces(), cfg.rollout, servers)),
            lambda pairs: engine.logprobs([_sequence(*pair) for pair in pairs]),
            vocab_size=engine.spec.vocab_size,
            max_tokens=cfg.parallel.max_tokens_per_microbatch,
            tolerance=TOLERANCE[cfg.model.dtype],
        )
        _say(result.table())
        return not result.wrong


def _sequence(prompt_ids: list[int], response_ids: list[int]) -> Sequence:
    return Sequence(prompt_ids=np.array(prompt_ids), response_ids=np.array(response_ids))


def _serve_folder(cfg: Config, actors: Actors) -> None:
    """Wait for the servers; those given by URL may hold other weights and get those of `model.hf_path`."""
    actors.servers.wait_ready()
    if cfg.rollout.urls:
        with WeightSync(folder_pieces(Path(cfg.model.hf_path)), cfg.rollout, actors.servers) as sync:
            sync.push(version=sync.next_version())


def _refuse_overlap(train: list[Any], heldout: list[Any]) -> None:
    shared = {prompt.text for prompt in train} & {prompt.text for prompt in heldout}
    if shared:
        raise ValueError(f"{len(shared)} held-out questions are in data.train too, for example {min(shared)!r}")


def _check_lengths(cfg: Config, template: Template, train: list[Prompt], heldout: list[Prompt]) -> None:
    """Refuse, before the servers tell us hours later, a sampling that their context can't hold."""
    limit = cfg.rollout.max_model_len or spec_of(Path(cfg.model.hf_path)).max_position_embeddings
    forced = len(template.ids(cfg.scaling.answer_opening)) + cfg.scaling.max_answer_tokens
    longest = max(len(prompt.token_ids) for prompt in heldout)
    needed = {
        "sampling.max_new_tokens": max(len(p.token_ids) for p in train) + cfg.sampling.max_new_tokens,
        "evaluate.sampling.max_new_tokens": longest + cfg.evaluate.sampling.max_new_tokens,
        "scaling.sampling.max_new_tokens": longest + cfg.scaling.sampling.max_new_tokens,
        "scaling.budgets": longest + min(cfg.scaling.budgets[-1], cfg.scaling.sampling.max_new_tokens) + forced,
    }
    if too_long := {name: tokens for name, tokens in needed.items() if tokens > limit}:
        listed = ", ".join(f"{name} needs {tokens}" for name, tokens in too_long.items())
        raise ValueError(
            f"the servers' context of {limit} tokens is too short for the longest prompt: {listed}; lower them or "
            "raise rollout.max_model_len"
        )


def _summarize(cfg: Config, watch: Stopwatch, rl_watch: Stopwatch, began: float) -> None:
    """summary.json: what came out, where the time went, with which versions."""
    run_dir = Path(cfg.run_dir)

    def read(path: str) -> Any:
        return json.loads((run_dir / path).read_text())

    seconds = {stage: round(value, 2) for stage, value in watch.total.items()}
    seconds |= {f"rl/{stage}": round(value, 2) for stage, value in rl_watch.total.items()}
    seconds["total"] = round(time.perf_counter() - began, 2)
    write_json(
        run_dir / "summary.json",
        {
            "sft_pass_at_1": read("evaluate/sft/summary.json")["pass_at_1"],
            "rl_pass_at_1": read("evaluate/rl/summary.json")["pass_at_1"],
            "scaling": [[point["budget"], point["accuracy"]] for point in read("scaling/rl/points.json")],
            "seconds": seconds,
            "seed": cfg.seed,
            "versions": versions(),
        },
    )


def _evaluate(cfg: Config, actors: Actors, heldout: list[Prompt], label: str) -> None:
    folder = Path(cfg.run_dir) / "evaluate"
    result = evaluate.evaluate(cfg.evaluate, actors, heldout, folder, label, cfg.seed, resume=cfg.resume)
    low, high = result.interval
    print(
        f"{label}: pass@1 {result.pass_at_1:.3f} (95%: {low:.3f} to {high:.3f}) on {result.num_questions} questions "
        f"x {result.num_samples}, {result.mean_tokens:.0f} tokens a response",
        flush=True,
    )


def _say(text: str) -> None:
    if is_main():
        print(text, flush=True)
