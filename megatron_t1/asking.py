"""The jobs that only ask servers or an endpoint: rollout, evaluation, scaling, curation. One process, no Megatron."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import trange

from megatron_t1 import curate, rl
from megatron_t1.check.context import context_needs, too_long, wrong_answerer
from megatron_t1.config import Config
from megatron_t1.data.prompts import Question, load_prompts
from megatron_t1.data.template import Template
from megatron_t1.evaluation.evaluate import evaluate
from megatron_t1.evaluation.questions import question_sets
from megatron_t1.evaluation.results import read_summaries, table
from megatron_t1.evaluation.resume import prompts_identity
from megatron_t1.evaluation.samplers import EndpointSampler, Sampler, ServerSampler, StoredSampler
from megatron_t1.evaluation.scaling import Scaling
from megatron_t1.files import write_json
from megatron_t1.metrics import MetricsLog, rollout_metrics
from megatron_t1.models import spec_of
from megatron_t1.push.sync import serve_folder
from megatron_t1.rank0 import open_rank0
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.batches import BatchQueue
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.types import Prompt
from megatron_t1.weights.folder_digest import weights_digest
from megatron_t1.weights.hf_folder import HFFolder


def run_rollout(cfg: Config) -> None:
    """Make and store the samples of `rl.steps` batches with the weights of model.hf_path; one process, no Megatron."""
    folder = Path(cfg.run_dir) / "rollout"
    template = Template(cfg.model.folder(), cfg.data)
    prompts = load_prompts(cfg.data.need("train"), template, cfg.data)
    HFFolder(cfg.model.folder())  # whole, or refused before the servers start
    rl.check(cfg, prompts)
    check_context(cfg, context_needs(cfg, "rl", template, train=longest(prompts)))
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
            check_context(cfg, context_needs(cfg, "evaluate", template, measured=longest_of(sets, template)))
            settings = {"weights": weights_digest(folder)}
            rank0 = stack.enter_context(open_rank0(cfg, template))
            serve_folder(rank0.servers)
            sampler = ServerSampler(rank0, template)
        done = Path(cfg.run_dir) / "evaluate" / label / "sets.json"
        done.unlink(missing_ok=True)
        for name, questions in sets.items():
            evaluate_set(replace(cfg, evaluate=own), sampler, questions, label, name, settings)
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
    needs = context_needs(cfg, "scaling", template, measured=longest_of(sets, template))
    check_context(cfg, needs)
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


def evaluate_set(
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


def check_context(cfg: Config, needs: dict[str, int]) -> None:
    """Refuse, before the servers tell us hours later, a sampling that their context can't hold."""
    if problem := too_long(cfg, spec_of(Path(cfg.model.hf_path)), needs):
        raise ValueError(problem)


def longest(prompts: Iterable[Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts)


def longest_of(sets: Mapping[str, Sequence[Question]], template: Template) -> dict[str, int]:
    return {name: longest(question.prompt(template) for question in questions) for name, questions in sets.items()}
