"""The jobs of the `t1` command that train, and the sync check: what they bring up, in which order.

`run` is the whole of T1 in one job: SFT while the servers start, evaluation, RL, evaluation, inference scaling, report.
They run on all trainer ranks, where servers, grading and files are rank 0's; those that only ask servers are in
`asking.py`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from megatron_t1 import rl, sft
from megatron_t1.asking import check_context, evaluate_set, longest, longest_of
from megatron_t1.check.context import context_needs
from megatron_t1.config import Config, SyncCheckConfig, keep
from megatron_t1.data.dedup import refuse_shared
from megatron_t1.data.prompts import load_prompts, load_questions, load_sft
from megatron_t1.data.template import Template
from megatron_t1.engine import checkpoint
from megatron_t1.engine.parallel import from_main, initialize, is_main
from megatron_t1.engine.step import ForwardEngine
from megatron_t1.evaluation.questions import question_sets
from megatron_t1.evaluation.resume import prompts_identity
from megatron_t1.evaluation.samplers import ServerSampler
from megatron_t1.evaluation.scaling import Scaling
from megatron_t1.files import read_json, write_json
from megatron_t1.metrics import Stopwatch
from megatron_t1.platform import gpus
from megatron_t1.platform.detect import Platform, setup
from megatron_t1.platform.installed import versions
from megatron_t1.push.sync import WeightSync
from megatron_t1.push.sync_check import TOLERANCE, sync_check
from megatron_t1.rank0 import Rank0, open_rank0
from megatron_t1.replay import replay
from megatron_t1.report.report import write_report
from megatron_t1.servers.servers import Servers
from megatron_t1.stop import STOP
from megatron_t1.trace import Trace
from megatron_t1.weights.folder_digest import weights_digest


@contextmanager
def trainer_ranks(cfg: Config) -> Iterator[Platform]:
    """Platform and process groups; says on rank 0 what was found."""
    platform = setup()
    with STOP.joining():
        initialize(cfg.parallel, platform, cfg.seed)
    if is_main():
        print(f"{platform.describe()}; {dist.get_world_size()} trainer processes", flush=True)
    yield platform
    # Left out when a rank raises: the others may be waiting in a collective, and the launcher ends them.
    dist.barrier()
    dist.destroy_process_group()


def run_sft(cfg: Config) -> None:
    with trainer_ranks(cfg) as platform:
        template = Template(Path(cfg.model.hf_path), cfg.data)
        hf_dir = sft.train(cfg, platform, load_sft(cfg.data.need("sft"), template, cfg.data))
        if is_main():
            template.keep_in(hf_dir)
        _say(f"fine-tuned model: {hf_dir}")


def run_rl(cfg: Config) -> None:
    with trainer_ranks(cfg) as platform, ExitStack() as stack:
        template = Template(Path(cfg.model.hf_path), cfg.data)
        prompts = load_prompts(cfg.data.need("train"), template, cfg.data)
        if cfg.data.heldout:
            heldout = load_prompts(cfg.data.need("heldout"), template, cfg.data)
            refuse_shared((prompt.text for prompt in prompts), (prompt.text for prompt in heldout))
        asks = cfg.rl.measure_every and is_main()
        measured = longest_of(question_sets(cfg, cfg.evaluate.sets), template) if asks else {}
        rl.check(cfg, prompts)
        check_context(cfg, context_needs(cfg, "rl", template, train=longest(prompts), measured=measured))
        # Before servers are started and a model is built.
        checkpoint.begun(Path(cfg.run_dir) / "rl" / "checkpoints", allowed=cfg.resume)
        rank0 = stack.enter_context(_rank0_of_training(cfg, template))
        trainer = stack.enter_context(rl.Trainer(cfg, platform, prompts, rank0))
        if rank0:
            keep(cfg)
        trainer.push()
        hf_dir = trainer.train()
        if rank0:
            template.keep_in(hf_dir)
        _say(f"trained model: {hf_dir}")


def run_replay(cfg: Config, step: int, *, profiled: bool) -> None:
    """Train step `step` of the run in run_dir again, from what is stored."""
    with trainer_ranks(cfg) as platform:
        template = Template(Path(cfg.model.hf_path), cfg.data)
        prompts = load_prompts(cfg.data.need("train"), template, cfg.data)
        to = Path(cfg.run_dir) / "replay" / f"step_{step}.json" if profiled else None
        _say(replay(cfg, platform, prompts, step, to).table())
        if to:
            _say(f"profile: {to} (open it in https://ui.perfetto.dev)")


def run_all(cfg: Config) -> None:
    """SFT, evaluation, RL, evaluation, inference scaling, report. With `resume`, what is finished is not done again."""
    if cfg.evaluate.sets or cfg.evaluate.endpoint.urls or cfg.evaluate.responses or cfg.scaling.set:
        raise ValueError(
            "t1 run measures its own model on data.heldout: leave out evaluate.sets, evaluate.endpoint, "
            "evaluate.responses and scaling.set, and give them to t1 evaluate and t1 scaling afterwards"
        )
    began = time.perf_counter() - (time.time() - psutil.Process().create_time())  # Python and the imports included
    run_dir, watch = Path(cfg.run_dir), Stopwatch()
    with trainer_ranks(cfg) as platform, ExitStack() as stack:
        template = Template(Path(cfg.model.hf_path), cfg.data)
        train = load_prompts(cfg.data.need("train"), template, cfg.data)
        questions = load_questions(cfg.data.need("heldout"), cfg.data.system_prompt)
        refuse_shared((prompt.text for prompt in train), (question.text for question in questions))
        rl.check(cfg, train)
        measured = longest_of({cfg.data.need("heldout").stem: questions}, template)
        check_context(cfg, context_needs(cfg, "run", template, train=longest(train), measured=measured))
        for stage in ("sft", "rl"):  # before servers are started, and before hours of SFT
            checkpoint.begun(run_dir / stage / "checkpoints", allowed=cfg.resume)
        watch.add("start", time.perf_counter() - began)
        with watch("data"):
            examples = load_sft(cfg.data.need("sft"), template, cfg.data)
        with watch("start"):
            rank0 = stack.enter_context(_rank0_of_training(cfg, template))
        hf_dir = run_dir / "sft" / "hf"
        with watch("sft"):
            if cfg.resume and hf_dir.exists():
                sft.check_finished(cfg, examples)
            else:
                hf_dir = sft.train(cfg, platform, examples)
                gc.collect()  # its engine lies in cycles, and RL needs the memory
        if is_main():
            template.keep_in(hf_dir)
        tuned = replace(cfg, model=replace(cfg.model, hf_path=str(hf_dir)))
        with watch("start"):
            trainer = stack.enter_context(rl.Trainer(tuned, platform, train, rank0))
            if rank0:
                keep(cfg)
            trainer.push()

        set_of = cfg.data.need("heldout").stem

        def measure(label: str, model_dir: Path) -> dict[str, Any]:
            assert rank0 is not None
            settings = {"weights": weights_digest(model_dir), "step": trainer.steps_done}
            sampler = ServerSampler(rank0, template)
            evaluate_set(cfg, sampler, questions, label, set_of, settings, replace_other=True)
            return settings

        def scale(settings: dict[str, Any]) -> None:
            assert rank0 is not None
            settings |= {"reward": cfg.reward.deciding()}
            settings["prompts"] = prompts_identity(question.prompt(template) for question in questions)
            folder = run_dir / "scaling" / "rl"
            curve = Scaling(cfg.scaling, questions, folder, settings, cfg.seed, resume=cfg.resume, replace_other=True)
            curve.think(rank0, template)
            curve.answer(rank0, template, template)
            curve.curve()

        with watch("evaluate"):  # all ranks wait: a push would not as long, and NCCL would keep GPUs busy
            if trainer.steps_done == 0:
                rl.on_main(partial(measure, "sft", hf_dir))
        with watch("rl"):
            final = trainer.train()
        with watch("evaluate"):
            settings = rl.on_main(partial(measure, "rl", final))
        with watch("scaling"):
            rl.on_main(partial(scale, settings))
        with watch("stop"):
            stack.close()
        if is_main():
            template.keep_in(final)
            with watch("report"):
                _summarize(cfg, watch, trainer.watch, began)
                report = write_report(run_dir)
            _say(
                f"report:       {report}\n"
                f"TensorBoard:  tensorboard --logdir {run_dir / 'tensorboard'}\n"
                f"model:        {final} (Hugging Face format)"
            )


def run_sync_check(cfg: SyncCheckConfig) -> bool:
    """Push model.hf_path into all servers and compare what they answer with what the trainer's ranks compute.

    Returns whether every server held, took and keeps the trainer's weights. Not while a training uses the servers.
    """
    with trainer_ranks(cfg) as platform, ExitStack() as stack:
        model_dir = Path(cfg.model.hf_path)
        servers = None
        if is_main():
            trainer_gpus = gpus.of_trainer()
            servers = stack.enter_context(Servers(cfg.rollout, model_dir, cfg.run_dir, trainer_gpus=trainer_gpus))
            servers.start()
        engine = ForwardEngine(cfg.model, cfg.parallel, platform, temperature=1.0)
        engine.load_weights(model_dir)
        if servers:
            servers.wait_ready()
        result = sync_check(
            stack.enter_context(WeightSync(engine.pieces(), cfg.rollout, servers)),
            engine.logprobs,
            vocab_size=engine.spec.vocab_size,
            max_tokens=cfg.parallel.max_tokens_per_microbatch,
            tolerance=TOLERANCE[cfg.model.dtype],
            perturb=engine.pieces() if cfg.perturb else None,
        )
        _say(result.table())
        return not result.wrong


@contextmanager
def _rank0_of_training(cfg: Config, template: Template) -> Iterator[Rank0 | None]:
    """None on the other ranks."""
    folder = Path(cfg.run_dir) / "rl"
    with ExitStack() as stack:
        rank0 = None
        if is_main():
            trace = Trace(folder / "trace.json")
            pushed = replace(cfg, rollout=replace(cfg.rollout, load_weights=False))
            opened = open_rank0(pushed, template, trainer_gpus=gpus.of_trainer(), trace=trace, status_in=folder)
            rank0 = stack.enter_context(opened)
        if cfg.rollout.sleep:  # they measure what is free while they start: no rank may take memory before
            if rank0:
                rank0.servers.wait_ready().sleep()
            from_main(None)
        yield rank0


def _summarize(cfg: Config, watch: Stopwatch, rl_watch: Stopwatch, began: float) -> None:
    """summary.json: what came out, where the time went, with which versions."""
    run_dir = Path(cfg.run_dir)

    def read(path: str) -> Any:
        return read_json(run_dir / path)

    def accuracy(label: str) -> Any:
        """None where a run that was resumed has another data.heldout than the one measured before RL."""
        summary = run_dir / "evaluate" / label / cfg.data.need("heldout").stem / "summary.json"
        return read_json(summary)["pass_at_1"] if summary.exists() else None

    seconds = {stage: round(value, 2) for stage, value in watch.total.items()}
    seconds |= {f"rl/{stage}": round(value, 2) for stage, value in rl_watch.total.items()}
    seconds["total"] = round(time.perf_counter() - began, 2)
    write_json(
        run_dir / "summary.json",
        {
            "sft_pass_at_1": accuracy("sft"),
            "rl_pass_at_1": accuracy("rl"),
            "scaling": [[point["budget"], point["accuracy"]] for point in read("scaling/rl/points.json")],
            "seconds": seconds,
            "seed": cfg.seed,
            "versions": versions(),
        },
    )


def _say(text: str) -> None:
    if is_main():
        print(text, flush=True)
