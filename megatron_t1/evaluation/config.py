"""What a user says about evaluation and inference scaling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_t1.data.config import INSTRUCTION, set_name
from megatron_t1.fields import FieldError, at_least
from megatron_t1.rollout.config import EndpointConfig, SamplingConfig

NUM_SAMPLES = {"aime2024": 32, "aime2025": 32}
"""As the paper measures the former, where nothing else is said of the set."""


@dataclass(frozen=True, kw_only=True)
class SetSampling:
    """How a single set is sampled; null: as the others."""

    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    """Cuts the tail of the distribution."""
    top_k: int | None = None
    """Only the k most likely tokens; 0: all."""
    min_p: float | None = None
    """Cuts tokens below min_p x the most likely one's probability."""
    max_new_tokens: int | None = None
    """Longest response, tokens."""
    stop: tuple[str, ...] | None = None
    """Strings that end a response."""
    stop_token_ids: tuple[int, ...] | None = None
    """Token ids that end a response."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What a checkpoint or endpoint is asked, and how."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.6, top_p=0.95, num_samples=1))
    """Its own sampling: `num_samples` is k, and k > 1 averages over them; temperature 0 is greedy."""
    sets: tuple[str, ...] = ()
    """Sets by name (math500, aime2024, aime2025, omni_math_500, gpqa, gsm8k) or question files; empty: data.heldout."""
    sets_dir: str | None = None
    """Folder with local copies of the named sets; what it lacks is fetched from the Hugging Face hub."""
    num_samples: dict[str, int] = field(default_factory=lambda: dict(NUM_SAMPLES))
    """Samples a question for single sets, in place of sampling.num_samples; aime2024 and aime2025 have 32 unless
    they are named."""
    sampling_by_set: dict[str, SetSampling] = field(default_factory=dict)
    """Other fields of `sampling` for single sets: {aime2024: {temperature: 0.6, top_p: 0.95}} beside a greedy one."""
    instruction: str = INSTRUCTION
    """Put under every question of the named sets (files with "prompt" or "messages" are asked as they are)."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Ask this OpenAI-compatible endpoint instead of model.hf_path."""
    responses: str | None = None
    """Grade the responses of this JSON lines file ({"id", "response"}) instead of asking a model."""

    def __post_init__(self) -> None:
        self.check_samplings({*map(set_name, self.sets), *self.sampling_by_set})
        given = [self.sampling.stop_token_ids, *(own.stop_token_ids for own in self.sampling_by_set.values())]
        if self.endpoint.urls and any(given):
            rule = "is not asked of an endpoint, whose tokens may be others: give sampling.stop, a text"
            raise FieldError("sampling.stop_token_ids", [each for each in given if each], rule)

    def check_samplings(self, sets: Iterable[str], section: str = "") -> None:
        """Refuse what would leave one of these sets with a sampling that can't be."""
        for name in sorted(sets):
            try:
                self.sampling_of(name)
            except FieldError as error:
                given = {name: self.given_for(name) for name in self.sampling_by_set}
                rule = f"leaves {name} with {error}; give {{{name}: {{temperature: 0.6, top_p: 0.95}}}}, say"
                raise FieldError(f"{section}sampling_by_set", given, rule) from None

    def sampling_of(self, name: str) -> SamplingConfig:
        """The sampling of one set."""
        own: dict[str, Any] = {"num_samples": _num_samples(self, name)}
        return replace(self.sampling, **own, **self.given_for(name))

    def given_for(self, name: str) -> dict[str, Any]:
        """What a set has of its own, by field."""
        own = asdict(self.sampling_by_set.get(name, SetSampling()))
        return {field: value for field, value in own.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Budgets and how an answer is forced."""

    set: str = ""
    """A set by name (its local copy is looked for in evaluate.sets_dir) or a question file, as in evaluate.sets; empty:
    data.heldout."""
    budgets: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    """Thinking tokens after which a response is cut."""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.6, top_p=0.95, num_samples=1, max_new_tokens=16384)
    )
    """Of the long thinking; the forced answer is greedy."""
    end_of_thinking: str = "</think>"
    """Text that ends a thinking, beside the tags that the grader knows (</think>, </thinking>, </thought>)."""
    answer_opening: str = "</think>\\boxed{"
    """Put after a cut thinking, to force the answer."""
    max_answer_tokens: int = 64
    """Limit of a forced answer."""
    answer_model: str | None = None
    """Hugging Face folder of another model that gives the forced answers; null: the model that thought."""
    num_samples: dict[str, int] = field(default_factory=lambda: dict(NUM_SAMPLES))
    """Thinkings a question for single sets, in place of sampling.num_samples; aime2024 and aime2025 have 32 unless
    they are named."""
    summary: bool = False
    """Let a model also write the answer from the question and the cut thinking, as T1's paper does: a second curve. It
    is the one that gives the forced answers, or summary_endpoint."""
    summary_endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """An OpenAI-compatible endpoint that writes those answers."""
    summary_prompt: str = (
        "Question:\n{question}\n\nSomebody's thinking about it, which may be unfinished:\n{thinking}\n\nWrite a short "
        "solution of the question that follows this thinking. Where it does not reach an answer, give the one that it "
        "makes most likely. Put the final answer within \\boxed{}."
    )
    """What that model is asked; {question} and {thinking} are replaced."""
    summary_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.0, num_samples=1, max_new_tokens=1024)
    )
    """Of those answers."""

    def __post_init__(self) -> None:
        if not self.budgets or self.budgets[0] < 1 or tuple(sorted(set(self.budgets))) != tuple(self.budgets):
            raise FieldError("budgets", self.budgets, "must be numbers of tokens, at least 1, that rise")
        at_least(self, 1, "max_answer_tokens")
        if missing := [name for name in ("{question}", "{thinking}") if name not in self.summary_prompt]:
            raise FieldError("summary_prompt", self.summary_prompt, f"must hold {' and '.join(missing)}")
        if self.summary_sampling.num_samples != 1:
            raise FieldError("summary_sampling.num_samples", self.summary_sampling.num_samples, "must be 1")
        try:
            self.sampling_of_set()
        except FieldError as error:
            rule = f"leaves {set_name(self.set)} with {error}; give --scaling.sampling.temperature 0.6, say"
            raise FieldError("num_samples", self.num_samples, rule) from None

    def sampling_of_set(self) -> SamplingConfig:
        """The sampling of the thinkings."""
        return replace(self.sampling, num_samples=_num_samples(self, set_name(self.set)))


def _num_samples(cfg: EvaluateConfig | ScalingConfig, name: str) -> int:
    return (NUM_SAMPLES | cfg.num_samples).get(name, cfg.sampling.num_samples)
