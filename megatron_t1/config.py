"""The whole configuration: every part's own config, composed. Read by jsonargparse from YAML and dotted overrides."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_t1.algo.loss import LossConfig
from megatron_t1.curate import CurateConfig
from megatron_t1.data.prompts import DataConfig, Question
from megatron_t1.engine.anchor import AnchorConfig
from megatron_t1.engine.model import ModelConfig
from megatron_t1.engine.parallel import ParallelConfig
from megatron_t1.evaluation.evaluate import EvaluateConfig
from megatron_t1.evaluation.scaling import ScalingConfig
from megatron_t1.reward.score import RewardConfig
from megatron_t1.rl import RLConfig
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.sft import SFTConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a job of megatron_t1 is told."""

    model: ModelConfig
    run_dir: str = "runs/default"
    """Where this run's files go: metrics, checkpoints, exports, logs, report."""
    seed: int = 0
    """Data order and sampling seeds are functions of (seed, step)."""
    resume: bool = False
    """Go on from the newest checkpoint in run_dir; without it a run_dir that has one is refused."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    curate: CurateConfig = field(default_factory=CurateConfig)

    def question_sets(self, command: str) -> dict[str, list[Question]]:
        """The questions that `evaluate` or `scaling` asks, by the name of their set: the named ones, or `data.heldout`.

        Raises:
            ValueError: as `load_set` does, or there is neither.
        """
        named = self.evaluate.sets if command == "evaluate" else (self.scaling.set,) if self.scaling.set else ()
        return self.evaluate.load(named or (str(self.data.need("heldout")),), self.seed, self.data.system_prompt)

    def __post_init__(self) -> None:
        if self.sampling.temperature <= 0:
            raise ValueError(
                f"sampling.temperature = {self.sampling.temperature}: RL samples, so it must be above 0; "
                "evaluation has its own (evaluate.sampling.temperature)"
            )
