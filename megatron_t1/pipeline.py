"""The jobs of the `t1` command: what they bring up, in which order.

`run` is the whole of T1 in one job: SFT while the servers start, evaluation, RL, evaluation, inference scaling, report.
SFT, RL, `run` and the sync check run on all trainer ranks, where servers, grading and files are rank 0's; evaluation,
scaling and curation are one process without Megatron.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from tqdm import trange

from megatron_t1 import curate, rl, sft
from megatron_t1.check.context import context_needs, too_long, wrong_answerer
from megatron_t1.config import Config, SyncCheckConfig, keep
from megatron_t1.data.dedup import refuse_shared
from megatron_t1.data.prompts import Question, load_prompts, load_questions, load_sft
from megatron_t1.data.template import Template
from megatron_t1.engine import checkpoint
from megatron_t1.engine.parallel import from_main, initialize, is_main
from megatron_t1.engine.step import ForwardEngine
from megatron_t1.evaluation.evaluate import evaluate
from megatron_t1.evaluation.questions import question_sets
from megatron_t1.evaluation.results import read_summaries, table
from megatron_t1.evaluation.resume import prompts_identity
from megatron_t1.evaluation.samplers import EndpointSampler, Sampler, ServerSampler, StoredSampler
from megatron_t1.evaluation.scaling import Scaling
from megatron_t1.files import read_json, write_json
from megatron_t1.metrics import MetricsLog, Stopwatch, rollout_metrics
from megatron_t1.models import spec_of
from megatron_t1.platform import gpus
from megatron_t1.platform.detect import Platform, setup
from megatron_t1.platform.installed import versions
from megatron_t1.push.sync import WeightSync, serve_folder
from megatron_t1.push.sync_check import TOLERANCE, sync_check
from megatron_t1.rank0 import Rank0, open_rank0
from megatron_t1.replay import replay
from megatron_t1.report.report import write_report
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.batches import BatchQueue
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.servers import Servers
from megatron_t1.stop import STOP
from megatron_t1.trace import Trace
from megatron_t1.types import Prompt
from megatron_t1.weights.folder_digest import weights_digest
from megatron_t1.weights.hf_folder import HFFolder


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
        measured = _longest_of(question_sets(cfg, cfg.evaluate.sets), template) if asks else {}
        rl.check(cfg, prompts)
        _check_context(cfg, context_needs(cfg, "rl", template, train=_longest(prompts), measured=measured))
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


def run_rollout(cfg: Config) -> None:
    """Make and store the samples of `rl.steps` batches with the weights of model.hf_path; one process, no Megatron."""
    folder = Path(cfg.run_dir) / "rollout"
    template = Template(cfg.model.folder(), cfg.data)
    prompts = load_prompts(cfg.data.need("train"), template, cfg.data)
    HFFolder(cfg.model.folder())  # whole, or refused before the servers start
    rl.check(cfg, prompts)
    _check_context(cfg, context_needs(cfg, "rl", template, train=_longest(prompts)))
    weights = weights_digest(cfg.model.folder())
    with ExitStack() as stack:
        rank0 = stack.enter_context(open_rank0(cfg, template))
        serve_folder(rank0.servers)
        batches = rl.batches_of(cfg, prompts, folder)
        # The next batch is asked beside each: its samples fill the servers while the last of this one end.
        queue = BatchQueue(batches, rank0.client, rank0.scorer.score, lag=1, begun_at=0)
        stack.callback(queue.close)
        log = stack.enter_context(MetricsLog(Path(cfg.run_dir), "rollout"))
        for step in trange(cfg.rl.steps, desc="rollout", unit="batch"):
            queue.ask(range(step, min(step + 2, cfg.rl.steps)), weights)
            batch = queue.take(step)
            log.samples(step + 1, batch.groups)
            log.log(step + 1, rollout_metrics(batch.groups) | batch.metrics | {"seconds": batch.seconds})
    num_bytes = sum(path.stat().st_size for path in batches.bank.folder.glob("*.jsonl"))
    print(f"samples: {batches.bank.folder} ({num_bytes / 1e6:.1f} MB), {folder / 'metrics.jsonl'}")


def run_replay(cfg: Config, step: int, *, profiled: bool) -> None:
    """Train step `step` of the run in run_dir again, from what is stored."""
    with trainer_ranks(cfg) as platform:
        template = Template(Path(cfg.model.hf_path), cfg.data)
        prompts = load_prompts(cfg.data.need("train"), template, cfg.data)
        to = Path(cfg.run_dir) / "replay" / f"step_{step}.json" if profiled else None
        _say(replay(cfg, platform, prompts, step, to).table())
        if to:
            _say(f"profile: {to} (open it in https://ui.perfetto.dev)")


def run_evaluate(cfg: Config, label: str) -> None:
    """Evaluate on `evaluate.sets`, or else on `data.heldout`, and list the sets when all are done; one process, no
    Megatron."""
    own, sets = cfg.evaluate, question_sets(cfg, cfg.evaluate.sets)
    with ExitStack() as stack:
        sampler: Sampler
        settings: dict[str, Any]
        if own.responses:
            path = Path(own.responses)
            sampler = stored = StoredSampler(path, stack.enter_context(Scorer(cfg.reward)))
            counts = {name: stored.num_samples(questions) for name, questions in sets.items()}
            own = replace(own, num_samples=counts, sampling=SamplingConfig(), sampling_by_set={})
            settings = {"responses": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
        elif own.endpoint.urls:
            own.endpoint.key()  # refused now, not in the middle
            sampler = EndpointSampler(own.endpoint, stack.enter_context(Scorer(cfg.reward)))
            settings = {
                "endpoint": list(own.endpoint.urls),
                "model": own.endpoint.model,
                "extra_body": own.endpoint.extra_body,
            }
        else:
            if not cfg.model.hf_path:
                raise ValueError("give model.hf_path, evaluate.endpoint.urls or evaluate.responses")
            folder = cfg.model.folder()
            template = Template(folder, cfg.data)
            HFFolder(folder)  # whole, or refused before the servers start
            _check_context(cfg, context_needs(cfg, "evaluate", template, measured=_longest_of(sets, template)))
            settings = {"weights": weights_digest(folder)}
            rank0 = stack.enter_context(open_rank0(cfg, template))
            serve_folder(rank0.servers)
            sampler = ServerSampler(rank0, template)
        done = Path(cfg.run_dir) / "evaluate" / label / "sets.json"
        done.unlink(missing_ok=True)
        for name, questions in sets.items():
            _evaluate(replace(cfg, evaluate=own), sampler, questions, label, name, settings)
        write_json(done, [*sets])
    print(table(read_summaries(Path(cfg.run_dir))))


def run_scaling(cfg: Config, label: str) -> None:
    """Accuracy of `model.hf_path` against thinking budgets on `scaling.set`, or else on `data.heldout`; no Megatron."""
    folder, other, of_answers = cfg.model.folder(), cfg.scaling.answer_model, cfg.of_answers()
    template, answer_folder = Template(folder, cfg.data), Path(of_answers.model.hf_path)
    HFFolder(folder)  # whole, or refused before the servers start
    answerer = Template(answer_folder, cfg.data) if other else template
    sets = question_sets(cfg, [cfg.scaling.set])
    (questions,) = sets.values()
    needs = context_needs(cfg, "scaling", template, measured=_longest_of(sets, template))
    _check_context(cfg, needs)
    if problem := wrong_answerer(cfg, needs):
        raise ValueError(problem)
    curve = Scaling(
        cfg.scaling,
        questions,
        Path(cfg.run_dir) / "scaling" / label,
        {
            "weights": weights_digest(folder),
            "answer_weights": weights_digest(answer_folder),
            "prompts": prompts_identity(question.prompt(template) for question in questions),
            "answer_prompts": prompts_identity(question.prompt(answerer) for question in questions),
            "reward": cfg.reward.deciding(),
        },
        cfg.seed,
        resume=cfg.resume,
    )
    with open_rank0(cfg, template) as rank0:
        serve_folder(rank0.servers)
        curve.think(rank0, template)
        if not other:
            curve.answer(rank0, template, template)
    if other:
        with open_rank0(of_answers, answerer) as rank0:
            serve_folder(rank0.servers)
            curve.answer(rank0, answerer, template)
    for point in curve.curve():
        low, high = point.interval
        print(
            f"budget {point.budget:>6}: accuracy {point.accuracy:.3f} (95%: {low:.3f} to {high:.3f}), "
            f"{point.mean_thinking_tokens:.0f} thinking tokens used, {100 * point.share_forced:.0f}% forced"
        )


def run_curate(cfg: Config) -> None:
    """Make a file of prompts for RL; one process, no Megatron."""
    folder = Path(cfg.run_dir) / "curate"
    if not (cfg.curate.clean_only or cfg.model.hf_path):
        raise ValueError("give model.hf_path, whose pass rates are measured, or curate.clean_only")
    sets_dir = Path(cfg.evaluate.sets_dir) if cfg.evaluate.sets_dir else None
    counts = curate.prepare(cfg.curate, cfg.reward, folder, sets_dir=sets_dir, resume=cfg.resume)
    if not cfg.curate.clean_only:
        template = Template(Path(cfg.model.hf_path), cfg.data)
        prompts = load_prompts(folder / "candidates.jsonl", template, cfg.data)
        HFFolder(cfg.model.folder())  # whole, or refused before the servers start
        with open_rank0(cfg, template) as rank0:
            serve_folder(rank0.servers)
            curate.sample(replace(cfg.sampling, num_samples=cfg.curate.num_samples), rank0, prompts, folder, cfg.seed)
    print(curate.select(cfg.curate, folder, counts)[1])


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
        measured = _longest_of({cfg.data.need("heldout").stem: questions}, template)
        _check_context(cfg, context_needs(cfg, "run", template, train=_longest(train), measured=measured))
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
            _evaluate(cfg, sampler, questions, label, set_of, settings, replace_other=True)
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


def _check_context(cfg: Config, needs: dict[str, int]) -> None:
    """Refuse, before the servers tell us hours later, a sampling that their context can't hold."""
    if problem := too_long(cfg, spec_of(Path(cfg.model.hf_path)), needs):
        raise ValueError(problem)


def _longest(prompts: Iterable[Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts)


def _longest_of(sets: Mapping[str, Sequence[Question]], template: Template) -> dict[str, int]:
    return {name: _longest(question.prompt(template) for question in questions) for name, questions in sets.items()}


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


def _evaluate(
    cfg: Config,
    sampler: Sampler,
    questions: list[Question],
    label: str,
    set_of: str,
    settings: dict[str, Any],
    *,
    replace_other: bool = False,
) -> None:
    settings = {**settings, "reward": cfg.reward.deciding()}
    result = evaluate(
        sampler,
        questions,
        Path(cfg.run_dir) / "evaluate" / label / set_of,
        cfg.evaluate.sampling_of(set_of),
        settings,
        cfg.seed,
        resume=cfg.resume,
        replace_other=replace_other,
    )
    low, high = result.interval
    refused = result.outcomes.get("refused", 0)
    print(
        f"{label}: pass@1 {result.pass_at_1:.3f} (95%: {low:.3f} to {high:.3f}) on {result.num_questions} questions "
        f"x {result.num_samples}, {result.mean_tokens:.0f} tokens a response, {100 * result.share_cut:.1f}% cut off"
        + (f", {refused} refused (counted as wrong)" if refused else ""),
        flush=True,
    )


def _say(text: str) -> None:
    if is_main():
        print(text, flush=True)
