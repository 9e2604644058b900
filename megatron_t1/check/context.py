"""What the settings of a command ask of the servers' context, held against it before anything is started."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_t1.config import Config
from megatron_t1.data.template import Template
from megatron_t1.models.spec import ModelSpec


def context_needs(cfg: Config, command: str, longest: Mapping[str, int], template: Template) -> dict[str, int]:
    """Tokens of context by the setting that asks for them.

    Args:
        longest: tokens of the longest prompt of `train` and of `heldout`, as far as `command` reads them.
    """
    train, heldout = longest.get("train", 0), longest.get("heldout", 0)
    needs = {}
    if command in ("rl", "run"):
        needs["sampling.max_new_tokens"] = train + cfg.sampling.max_new_tokens
    if command in ("evaluate", "run") or (command == "rl" and cfg.rl.measure_every):
        needs["evaluate.sampling.max_new_tokens"] = heldout + cfg.evaluate.sampling.max_new_tokens
    if command in ("scaling", "run"):
        own = cfg.scaling
        forced = len(template.ids(own.answer_opening)) + own.max_answer_tokens
        needs["scaling.sampling.max_new_tokens"] = heldout + own.sampling.max_new_tokens
        longest_cut = min(own.budgets[-1], own.sampling.max_new_tokens)
        needs["scaling.budgets"] = heldout + longest_cut + forced
        if own.summary and not own.summary_endpoint.urls:
            around = len(template.ids(own.summary_prompt)) + own.summary_sampling.max_new_tokens
            needs["scaling.summary_sampling.max_new_tokens"] = heldout + longest_cut + around
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
