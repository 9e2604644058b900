"""What a user says about sampling: how responses are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, frozen=True)
class SamplingConfig:
    """How responses are drawn. T1: K = 64 at temperature 1.2; 0.9-1.0 collapses, above 1.2 degrades."""

    temperature: float = 1.2
    """The trainer computes its logprobs at this temperature too. 0 is greedy (evaluation only)."""
    top_p: float = 1.0
    """Below 1 the sampled distribution is not the one the trainer differentiates: a bias, for evaluation only."""
    min_p: float = 0.0
    """Cuts tokens below min_p x the most likely one's probability; biases the ratio as top_p does (T1 ablates it)."""
    num_samples: int = 64
    """K: samples a prompt."""
    max_new_tokens: int = 4096
    """Longest response, tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a response (besides the model's end token)."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response (besides the model's end token)."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature={self.temperature}: must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}: must be in (0, 1]")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"sampling.min_p={self.min_p}: must be in [0, 1)")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"sampling.num_samples={self.num_samples} at temperature 0: greedy samples are all the same; use 1"
            )
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling.{name}={getattr(self, name)}: must be at least 1")
