"""What the settings of a command ask of the servers' context, held against it before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_t1.config import Config
from megatron_t1.data.template import Template
from megatron_t1.models import spec_of
from megatron_t1.models.spec import ModelSpec
from megatron_t1.weights.hf_folder import HFFolder


def context_needs(
    cfg: Config, command: str, template: Template, *, train: int = 0, measured: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Tokens of context by the setting that asks for them.

    Args:
        train: tokens of the longest prompt of data.train.
        measured: tokens of the longest prompt of every set that `command` measures, by the set's name.
    """
    measured, needs = measured or {}, {}
    if command in ("rl", "run"):
        needs["sampling.max_new_tokens"] = train + cfg.sampling.max_new_tokens
    if command in ("evaluate", "rl", "run"):
        for name, tokens in measured.items():
            section = f"sampling_by_set.{name}" if "max_new_tokens" in cfg.evaluate.given_for(name) else "sampling"
            setting = f"evaluate.{section}.max_new_tokens"
            tokens += cfg.evaluate.sampling_of(name).max_new_tokens
            needs[setting] = max(tokens, needs.get(setting, 0))
    if command in ("scaling", "run"):
        own, longest = cfg.scaling, max(measured.values(), default=0)
        forced = len(template.ids(own.answer_opening)) + own.max_answer_tokens
        needs["scaling.sampling.max_new_tokens"] = longest + own.sampling.max_new_tokens
        longest_cut = min(own.budgets[-1], own.sampling.max_new_tokens)
        needs["scaling.budgets"] = longest + longest_cut + forced
        if own.summary and not own.summary_endpoint.urls:
            around = len(template.ids(own.summary_prompt)) + own.summary_sampling.max_new_tokens
            needs["scaling.summary_sampling.max_new_tokens"] = longest + longest_cut + around
    return needs


def too_long(cfg: Config, spec: ModelSpec, needs: Mapping[str, int]) -> str | None:
    """What is wrong when the servers' context is shorter than what `needs` says."""
    limit = cfg.rollout.max_model_len or spec.max_position_embeddings
    if not (over := {name: tokens for name, tokens in needs.items() if tokens > limit}):
        return None
    listed = ", ".join(f"{name} needs {tokens}" for name, tokens in over.items())
    remedy = "lower them or raise rollout.max_model_len"
    if max(over.values()) > (positions := spec.max_position_embeddings):
        remedy += f", beyond the model's {positions} positions by YaRN (docs/checkpoints.md)"
    return f"the servers' context of {limit} tokens is too short for the longest prompt: {listed}; {remedy}"


def wrong_answerer(cfg: Config, needs: Mapping[str, int]) -> str | None:
    """What would end `t1 scaling` when scaling.answer_model comes up, after all the thinking. A model of a family that
    only vLLM knows is left to vLLM.

    Args:
        needs: `context_needs` of scaling.
    """
    if not (other := cfg.scaling.answer_model):
        return None
    try:
        HFFolder(Path(other))
    except ValueError as error:
        return f"scaling.answer_model = {other}: {error}"
    try:
        spec = spec_of(Path(other))
    except ValueError:
        return None
    limit, positions = cfg.rollout.max_model_len, spec.max_position_embeddings
    if limit and limit > positions:
        return (
            f"rollout.max_model_len = {limit} is more than the {positions} positions of scaling.answer_model: lower it"
        )
    of_answers = {name: tokens for name, tokens in needs.items() if name != "scaling.sampling.max_new_tokens"}
    problem = too_long(cfg, spec, of_answers)
    return f"scaling.answer_model = {other}: {problem}" if problem else None
