"""T1's inference scaling: accuracy against the thinking budget, from one long thinking a question.

Each response's thinking is cut at every budget, and the answer is forced from the cut by closing the thinking and
opening the answer; the same server continues from there (its prefix cache holds the thinking, nothing is generated
twice). A thinking that ended within the budget keeps its own answer; one that the length limit cut has none and is
forced at every budget.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_t1 import stats
from megatron_t1.actors import Actors
from megatron_t1.data.template import Template
from megatron_t1.files import write_json
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.types import Prompt, Sample


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Budgets and how an answer is forced."""

    budgets: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    """Thinking tokens after which a response is cut."""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.6, top_p=0.95, num_samples=1, max_new_tokens=16384)
    )
    """Of the long thinking; the forced answer is greedy."""
    end_of_thinking: str = "</think>"
    """Text that ends a thinking."""
    answer_opening: str = "</think>\\boxed{"
    """Put after a cut thinking, to force the answer."""
    max_answer_tokens: int = 64
    """Limit of a forced answer."""

    def __post_init__(self) -> None:
        if not self.budgets or any(budget < 1 for budget in self.budgets):
            raise ValueError(f"scaling.budgets = {self.budgets} must be positive numbers of tokens")
        if tuple(sorted(set(self.budgets))) != tuple(self.budgets):
            raise ValueError(f"scaling.budgets = {self.budgets} must rise")
        if self.max_answer_tokens < 1:
            raise ValueError(f"scaling.max_answer_tokens = {self.max_answer_tokens} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Point:
    """Accuracy when thinking may take at most `budget` tokens."""

    budget: int
    mean_thinking_tokens: float
    """What was really used, thinkings that ended early included."""
    accuracy: float
    interval: tuple[float, float]
    share_forced: float
    """Responses whose thinking was cut."""


def measure(
    cfg: ScalingConfig, actors: Actors, template: Template, prompts: list[Prompt], out_dir: Path, label: str, seed: int
) -> list[Point]:
    """The curve of what the servers serve now; writes `points.json` to `out_dir/label`."""
    groups = actors.generate(prompts, cfg.sampling, seed=seed)
    flat = [(group.prompt, sample) for group in groups for sample in group.samples]
    thinking = [_thinking(sample, template, cfg.end_of_thinking) for _, sample in flat]
    opening = template.ids(cfg.answer_opening)
    points = []
    for budget in cfg.budgets:
        forced = [i for i, (used, ended) in enumerate(thinking) if used > budget or not ended]
        correct = [bool(sample.reward and sample.reward.correct) for _, sample in flat]
        prefixes = [
            np.concatenate([flat[i][0].token_ids, flat[i][1].token_ids[:budget], opening]).tolist() for i in forced
        ]
        sampling = replace(cfg.sampling, temperature=0.0, num_samples=1, max_new_tokens=cfg.max_answer_tokens)
        answers = actors.client.complete_tokens(prefixes, sampling, seed=seed) if forced else []
        completed = [
            (flat[i][0], _completed(flat[i][1], budget, cfg.answer_opening, answer[0], template))
            for i, answer in zip(forced, answers, strict=True)
        ]
        for i, reward in zip(forced, actors.scorer.score_all(completed), strict=True):
            correct[i] = reward.correct
        k = cfg.sampling.num_samples
        mean, low, high = stats.accuracy_interval([correct[j : j + k] for j in range(0, len(correct), k)])
        points.append(
            Point(
                budget=budget,
                mean_thinking_tokens=float(np.mean([min(used, budget) for used, _ in thinking])),
                accuracy=mean,
                interval=(low, high),
                share_forced=len(forced) / len(flat),
            )
        )
    write_json(out_dir / label / "points.json", [asdict(point) for point in points])
    return points


def _thinking(sample: Sample, template: Template, end: str) -> tuple[int, bool]:
    """Tokens of the response up to the end of its thinking, and whether the model ended it (or the whole response)."""
    decode = template.tokenizer.decode  # with special tokens, which the end of thinking may be
    if end not in decode(sample.token_ids):
        return len(sample.token_ids), sample.finish_reason == "stop"
    low, high = 0, len(sample.token_ids)
    while low < high:  # the smallest prefix whose text holds the end mark
        middle = (low + high) // 2
        if end in decode(sample.token_ids[:middle]):
            high = middle
        else:
            low = middle + 1
    return low, True


def _completed(sample: Sample, budget: int, opening: str, answer: Sample, template: Template) -> Sample:
    """The cut thinking, the opening and the forced answer as one response to be graded."""
    thinking = template.tokenizer.decode(sample.token_ids[:budget], skip_special_tokens=True)
    return replace(answer, text=thinking + opening + answer.text, token_ids=answer.token_ids, reward=None)
