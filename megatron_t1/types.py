"""The carriers that travel through the loop: Prompt -> Sample -> Group -> TrainSequence -> Microbatch.

They hold data and no behaviour beyond a derived length. Arrays are numpy on the rollout side (they cross process
boundaries between our own ranks) and torch only in `Microbatch`, which is what the trainer consumes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # the grader's workers import this module and must stay light
    import torch

AnswerMode = Literal["answer", "response", "text", "mc"]
"""The built-in ones; plugins bring others (`reward.config`)."""
FinishReason = Literal["stop", "length", "repetition"]
"""By itself, at the limit, or by the detector of loops that vLLM has (`rollout.vllm_args` may switch it on)."""
Message = dict[str, str]
"""One turn of a conversation: `role` and `content`."""
Outcome = Literal["correct", "wrong", "no_answer", "timeout", "crash", "refused"]
"""`refused`: an endpoint would not answer this question; there was nothing to grade."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question, already tokenised by the chat template."""

    id: str
    """Unique within its data file."""
    text: str
    """What the person asks, before the chat template."""
    token_ids: np.ndarray
    """int64 [num_prompt_tokens], template applied, ready for the server."""
    gold: str
    """The reference answer."""
    mode: str = "response"
    """How a response to this prompt is graded; `response` reads the last \\boxed after the closed thinking."""
    choices: tuple[str, ...] = ()
    """Option texts, for `mode="mc"` only."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Whatever else the data line had (level, subject, source)."""
    before: str = ""
    """What was said before `text`, instructions included: a response may be in any of these languages."""


@dataclass(frozen=True)
class Verdict:
    """What the grader says about one response."""

    outcome: Outcome
    extracted: str | None
    """The answer text found in the response; None when there was none."""
    reason: str
    """One line for a person: why this outcome."""
    share: float | None = None
    """What a verifier of its own gives as the reward, from 0 to 1; None: 1 for `correct`, 0 for all else."""

    def __post_init__(self) -> None:
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"share = {self.share} must lie in 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A graded sample: the scalar the policy gradient sees and every reason for it."""

    value: float
    """1 correct, 0 not correct (or a verifier's share), -1 when any penalty hit (T1 replaces, it does not add)."""
    correct: bool
    outcome: Outcome
    extracted: str | None
    """The answer text found in the response; None when there was none."""
    reason: str
    """One line for a person: why this outcome."""
    penalties: dict[str, str] = field(default_factory=dict)
    """Penalty name -> why it hit. Empty when none did."""
    seconds: float = 0.0
    """Wall time of grading this sample."""


@dataclass(kw_only=True)
class Sample:
    """One response to one prompt, as the server returned it, then graded, then given an advantage."""

    token_ids: np.ndarray
    """int64 [num_response_tokens], the end token included when there is one."""
    logprobs: np.ndarray
    """float32 [num_response_tokens], of the sampled tokens AFTER temperature (and top_p, top_k, min_p)."""
    text: str
    """Detokenised response, special tokens left out; with the `<think>` before it that the prompt has opened."""
    finish_reason: FinishReason
    """`stop`: an end token was sampled; the others cut the response."""
    weight_versions: tuple[tuple[int, int, int], ...]
    """(version, start, end) spans over token_ids: which weights made which tokens. One span when nothing moved. -1:
    what the server started with."""
    server: str
    """Base URL of the server that made it."""
    reward: Reward | None = None
    advantage: float = 0.0
    """Leave-one-out advantage (same for every token of the sample)."""


def text_sample(text: str, finish_reason: FinishReason) -> Sample:
    """A sample of which only the text is known, for the grader."""
    return Sample(
        token_ids=np.zeros(0, np.int64),
        logprobs=np.zeros(0, np.float32),
        text=text,
        finish_reason=finish_reason,
        weight_versions=(),
        server="",
    )


@dataclass(kw_only=True)
class Group:
    """All samples of one prompt."""

    prompt: Prompt
    samples: list[Sample]


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """A prompt and its response, ready to be packed."""

    prompt_ids: np.ndarray
    """int64 [num_prompt_tokens]"""
    response_ids: np.ndarray
    """int64 [num_response_tokens], at least one"""
    advantage: float = 0.0
    rollout_logprobs: np.ndarray | None = None
    """float32 [num_response_tokens]; zeros when None"""
    group: int = 0
    """Number of its prompt within the step"""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(kw_only=True)
class Microbatch:
    """Sequences packed one after the other: what one forward pass of one rank sees.

    `num_tokens` (s) counts padding too and is equal for all microbatches of a step; `num_targets` (T) is the number of
    response tokens. Position p of the packed stream predicts token p + 1, so `target_positions` point one left of the
    tokens in `targets`, and never across a sequence boundary. Under context parallelism the rank has some rows of the
    stream (`data.packing.rows_of`), and the targets that these predict, wherever the next token is.
    """

    token_ids: torch.Tensor
    """int64 [s]"""
    position_ids: torch.Tensor
    """int64 [s], in the whole sequence: restarting at 0 in every one"""
    cu_seqlens: torch.Tensor
    """int32 [num_sequences + 1], boundaries in the packed stream of all ranks that share it; the last is s x their
    number (padding at the end is a sequence of its own)"""
    max_seqlen: int
    """Of the whole sequences."""
    target_positions: torch.Tensor
    """int64 [T], ascending: which of the s outputs predict a response token"""
    targets: torch.Tensor
    """int64 [T], the response tokens themselves"""
    advantage: torch.Tensor
    """float32 [T], 0 in SFT"""
    centered_kl: torch.Tensor
    """float32 [T], the sample's centred KL (`algo.kl`) repeated over its tokens; 0 in SFT"""
    rollout_logprob: torch.Tensor
    """float32 [T], 0 in SFT"""
    anchor_logprob: torch.Tensor
    """float32 [T], 0 in SFT"""
    sequence_log_ratio: torch.Tensor
    """float32 [T], the sample's sum of log policy/rollout repeated over its tokens, where the loss reads it; else 0"""
    geometric_log_ratio: torch.Tensor
    """float32 [T], the same by the number of its tokens"""
    sample_index: torch.Tensor
    """int64 [T], index of the sample in the step's flat list, to bring per-token results back to samples"""
    anchor_hidden: torch.Tensor | None = None
    """[s, H] ([s / tp, H] under sequence parallelism), the anchor's last hidden states in host memory; on the last
    pipeline stage, for a full-vocabulary KL only"""
