"""What a user may say to each job: one class a job, made of the rooms' own configs.

Read by `cli.options` from YAML and dotted overrides. Neither torch nor Megatron is imported here, so that the command
line answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from megatron_t1.algo.config import LossConfig
from megatron_t1.data.config import INSTRUCTION, DataConfig, set_name
from megatron_t1.engine.config import AnchorConfig, CheckpointConfig, Dtype, ModelConfig, OptimConfig, ParallelConfig
from megatron_t1.evaluation.config import NUM_SAMPLES, EvaluateConfig, ScalingConfig
from megatron_t1.fields import FieldError, a_folder, another_file, at_least, within
from megatron_t1.files import dump_yaml, write_text
from megatron_t1.reward.config import RewardConfig
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.config import RolloutConfig

UNCORRECTED = (
    "rl.lag trains on samples of older weights, for which loss.importance = none does not correct, and a gradient that "
    "comes a step late bears less of a learning rate: lower rl.optim.lr and give --loss.importance token "
    "--loss.ratio_max 2 (docs/ahead.md shows a run that collapses without)"
)


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Reinforcement learning: one optimizer step a batch of prompts_per_step x sampling.num_samples."""

    steps: int = 500
    """Optimizer steps of the whole run; a resumed run goes on to the same number."""
    prompts_per_step: int = 32
    """Questions of a batch; each is asked sampling.num_samples times."""
    lag: int = 0
    """Steps that a batch is asked ahead of its training. 0, as T1 does: generation and training take turns. 1: a batch
    is made by the weights of the step before, while that batch trains; lower optim.lr then, and give loss.importance a
    correction: a run at its own rate may collapse (docs/ahead.md). More than 1 gains only with rollout.pause_mode:
    keep."""
    refill: float = 0.0
    """Groups whose samples are all right or all wrong teach nothing: up to refill x prompts_per_step more prompts are
    asked in their place. 0: none."""
    max_logprob_diff: float | None = None
    """Largest mean |trainer - servers| of logprobs; beyond it the run ends: when the servers got their first weights,
    or in a step, which is dropped. Rounding makes 3e-7 in float32 and 0.01 to 0.05 in bfloat16, more with FP8. null:
    0.01 where trainer and servers are set to float32, else 0.2; in the steps of a run with rl.lag, whose samples are
    not of the policy that trains, 1; in those with sampling.top_p, top_k or min_p, which part the two by what they
    cut, none. 0: no bound."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1.5e-6))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    measure_every: int = 0
    """Steps between measurements by the servers that are there: accuracy on evaluate.sets, or else data.heldout, and
    the KL to the starting policy, which is read from model.hf_path again each time (with rl.lag biased: the samples are
    of older weights). 0: none."""
    snapshot_every: int = 0
    """Steps between copies of the policy in Hugging Face format (2 bytes a parameter in bfloat16, where a checkpoint
    has 18) in run_dir/rl/snapshots: for scaling curves along the training. 0: none."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "prompts_per_step")
        at_least(self, 0, "lag", "refill", "measure_every", "snapshot_every")
        if self.max_logprob_diff is not None:
            at_least(self, 0, "max_logprob_diff")
        self.optim.check_steps(self.steps)

    def check_draws_from(self, num_questions: int) -> None:
        """Refuse a file that a batch can't be drawn from."""
        if num_questions < self.prompts_per_step:
            raise FieldError(
                "rl.prompts_per_step", self.prompts_per_step, f"is larger than the {num_questions} questions; lower it"
            )
        if self.refill and num_questions == self.prompts_per_step:
            raise FieldError(
                "rl.refill",
                self.refill,
                f"asks other questions in place of some, and rl.prompts_per_step = {self.prompts_per_step} are all "
                "there are; lower one of them",
            )


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning. The paper: 3 epochs at 1e-5, cosine."""

    batch_size: int = 64
    """Examples an optimizer step, over all ranks."""
    epochs: int = 3
    """Passes over the data."""
    max_steps: int | None = None
    """Stop (and end the schedule) here even if the epochs go on."""
    num_heldout: int = 0
    """Examples of data.sft, drawn by `seed`, that are not trained on."""
    measure_every: int = 50
    """Steps between measurements of their negative log-likelihood (`heldout_nll`), the last step's besides."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, schedule="cosine"))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every_steps=500))

    def __post_init__(self) -> None:
        at_least(self, 0, "num_heldout")
        at_least(self, 1, "batch_size", "epochs", "measure_every")
        if self.max_steps is not None and self.max_steps < 1:
            raise FieldError("max_steps", self.max_steps, "must be at least 1, or null for all epochs")
        if self.max_steps is not None:
            self.optim.check_steps(self.max_steps)


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """What becomes a prompt for RL."""

    inputs: tuple[str, ...] = ()
    """Raw questions: JSON lines, JSON, CSV or Parquet."""
    output: str = ""
    """File of prompts to write, for data.train; empty: run_dir/curate/prompts.jsonl."""
    evaluation: tuple[str, ...] = ()
    """Questions that may not come back in the output: sets by name or question files, as in evaluate.sets (whose local
    copies are looked for in evaluate.sets_dir). Name all that a model will be measured on."""
    id_field: str = "id"
    """Field of a question's name; where it is missing, file and line are its name."""
    question_field: str = "problem"
    """Field of the question in `inputs`, where the usual names are tried next, and in `evaluation`, where all that a
    row asks counts: this field, the usual ones, every message of the user."""
    answer_field: str = "answer"
    """Field of the answer; where it is missing or empty, the last box of the solution is the answer."""
    solution_field: str = "solution"
    """Field of the worked solution."""
    prompt_suffix: str = f"\n\n{INSTRUCTION}"
    """Put after every question."""
    keep_multiple_choice: bool = False
    """Keep questions with options to choose from."""
    min_evaluation_share: float = 0.6
    """Share of an evaluation question's trigrams of words in a question from which on the two overlap."""
    min_duplicate_similarity: float = 0.8
    """Jaccard similarity of trigrams from which on two questions with the same answer are one."""
    num_samples: int = 16
    """Samples a question for its pass rate, drawn as RL will draw them: by `sampling`."""
    max_pass_rate: float = 0.3
    """Questions solved more often are dropped."""
    drop_never_solved: bool = False
    """Drop questions that no sample solved: they teach nothing now, and hide wrong answers."""
    clean_only: bool = False
    """Stop before asking any server: all that is clean is kept."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "min_evaluation_share", "min_duplicate_similarity", "max_pass_rate")
        at_least(self, 1, "num_samples")
        named = [path for path in self.evaluation if Path(path).suffix]  # the others are sets, by name
        for name, paths in (("inputs", self.inputs), ("evaluation", named)):
            if missing := [path for path in paths if not Path(path).is_file()]:
                raise FieldError(name, missing, "must be files that are there")
        another_file(self, "output", (*self.inputs, *named))


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the numbers of a run go besides its files and TensorBoard. Nothing is installed for it: pip does."""

    wandb: str = ""
    """Project of Weights & Biases; empty: none. Its environment holds: WANDB_MODE=offline, WANDB_ENTITY, ..."""
    mlflow: str = ""
    """Experiment of MLflow; empty: none. Its environment holds: MLFLOW_TRACKING_URI, ..."""

    def __post_init__(self) -> None:
        for name in ("wandb", "mlflow"):
            if getattr(self, name) and find_spec(name) is None:
                raise FieldError(name, getattr(self, name), f"needs the package {name}: pip install it here")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a job of megatron_t1 is told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    run_dir: str = "runs/default"
    """Where this run's files go: metrics, checkpoints, exports, logs, report."""
    seed: int = 0
    """Data order and sampling seeds are functions of (seed, step)."""
    plugins: tuple[str, ...] = ()
    """Modules of yours, by their dotted names, that add penalties, answer modes, losses, advantages, model families,
    question sets or chat templates; see docs/extending.md."""
    label: str = ""
    """Name of the result of `t1 evaluate` or `t1 scaling` in run_dir; empty: the command's."""
    resume: bool = False
    """Go on from the newest checkpoint in run_dir; without it a run_dir that has one is refused."""
    resume_with_changes: bool = False
    """Go on although what decides the run (data, seed, batch size, model, optimizer, anchor, sampling, loss, grading,
    rl.lag, rl.refill, plugins) is not the checkpoint's; what changed is kept in changes.jsonl of the stage."""
    log: LogConfig = field(default_factory=LogConfig)
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

    def __post_init__(self) -> None:
        a_folder(self, "run_dir")
        within(self, 0, 2**32 - 1, "seed")  # what NumPy takes
        if self.resume_with_changes and not self.resume:
            raise FieldError("resume_with_changes", True, "needs --resume too")
        if self.rl.measure_every and not (self.evaluate.sets or self.data.heldout):
            raise FieldError("rl.measure_every", self.rl.measure_every, "needs data.heldout or evaluate.sets")
        measured = {set_name(name) for name in (*self.evaluate.sets, self.data.heldout) if name}
        for name, usual in (("num_samples", NUM_SAMPLES), ("sampling_by_set", {})):
            if measured and (others := sorted(getattr(self.evaluate, name).keys() - measured - usual.keys())):
                known = ", ".join(sorted(measured))
                raise FieldError(f"evaluate.{name}", others, f"must be of evaluate.sets or data.heldout: {known}")
        self.evaluate.check_samplings(measured if not self.evaluate.sets else (), "evaluate.")
        if self.takes_turns and not self.rollout.share_gpus:
            raise FieldError(
                "parallel.offload", self.parallel.offload, "needs rollout.share_gpus: nobody else would use the memory"
            )
        if self.takes_turns and self.rl.lag:
            raise FieldError(
                "rl.lag",
                self.rl.lag,
                "must be 0 with parallel.offload or rollout.sleep: servers generate while the trainer trains, and "
                "neither can give its memory to the other",
            )
        # Others would be folders: one in the other, the parent, a hidden one.
        if self.label and (self.label.startswith(".") or not self.label.isprintable() or {"/", "\\"} & set(self.label)):
            raise FieldError(
                "label", self.label, "must be a name without / and \\ that does not begin with a dot: it names a folder"
            )
        if self.sampling.temperature <= 0:
            raise FieldError(
                "sampling.temperature",
                self.sampling.temperature,
                "must be above 0, RL samples; evaluation has its own (evaluate.sampling.temperature)",
            )

    def of_answers(self) -> Config:
        """What `t1 scaling` forces the answers with: scaling.answer_model, when there is one, is served here.

        Raises:
            FieldError: it can't be, with these servers.
        """
        other = self.scaling.answer_model
        if not other:
            return self
        if self.rollout.await_servers:
            raise FieldError(
                "scaling.answer_model",
                other,
                f"can't be served with rollout.await_servers = {self.rollout.await_servers}: those servers are of "
                "model.hf_path. Leave it out (slurm/scaling.sh gives it): `t1 scaling` then serves both models on its "
                "own host, one after the other",
            )
        return replace(self, model=replace(self.model, hf_path=other), rollout=replace(self.rollout, urls=()))

    @property
    def takes_turns(self) -> bool:
        """Trainer and servers give each other GPU memory, and nothing is asked while the trainer has it."""
        return self.rollout.sleep or self.parallel.offload != "none"

    @property
    def server_dtype(self) -> str:
        return self.model.dtype if self.rollout.dtype == "auto" else self.rollout.dtype

    @property
    def trains_uncorrected(self) -> bool:
        """Samples are of older weights than those that they train, and nothing corrects for it."""
        return self.rl.lag > 0 and self.loss.importance == self.loss.mask == "none"

    @property
    def awaits_batches(self) -> bool:
        """Batches are asked ahead, and a push waits for them: none is of two weights."""
        return self.rl.lag > 0 and self.rollout.pause_mode == "wait"


def dump(config: Any) -> str:
    """A job's config as YAML that `--config` reads again."""
    return dump_yaml(plain(asdict(config)), sort_keys=False, allow_unicode=True, width=110)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def keep(cfg: Config) -> None:
    """Write run_dir/config.yaml, once nothing refuses the run any more: it is what the results there were made with."""
    # Whoever reads this file later says `--resume` again, and may serve a model that nobody pushes.
    kept = replace(cfg, resume=False, resume_with_changes=False, rollout=replace(cfg.rollout, load_weights=True))
    write_text(Path(cfg.run_dir) / "config.yaml", dump(kept))


@dataclass(frozen=True, kw_only=True)
class SyncCheckConfig(Config):
    """What the sync check is told."""

    perturb: bool = False
    """First push weights with a known change in every tensor, hold the servers to the trainer's logprobs on those, and
    put the weights back: a server that keeps something of its old weights passes any push that changes nothing."""


@dataclass(frozen=True, kw_only=True)
class LogprobsConfig:
    """Texts to score, the model, and what to compare it with."""

    model: str
    """Hugging Face folder, or Megatron checkpoint with config and tokenizer beside."""
    input: str
    """JSON lines: {"prompt" or "messages", "response"}, {"messages"} that end with the assistant, {"text"}, or
    {"token_ids", "num_prompt_tokens"}."""
    output: str | None = None
    """JSON lines to write: token_ids, num_prompt_tokens, logprobs and, when compared, against."""
    against: str | None = None
    """`transformers`, or the URL of a running vLLM server."""
    key_file: str | None = None
    """File with that server's key; otherwise the environment variable T1_SERVER_KEY."""
    num_shown: int = 10
    """The worst tokens that are printed."""
    plugins: tuple[str, ...] = ()
    """Modules of yours, by their dotted names, that add penalties, answer modes, losses, advantages, model families,
    question sets or chat templates; see docs/extending.md."""
    dtype: Dtype = "bfloat16"
    """Precision of weights and activations; transformers gets the same."""
    layers: Literal["auto", "local"] = "auto"
    """`auto` takes Transformer Engine's layers when installed, for bfloat16; `local` never does."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.against not in (None, "transformers") and not self.against.startswith(("http://", "https://")):
            raise FieldError("against", self.against, "must be `transformers`, or the server's http:// URL")
        another_file(self, "output", [self.input])


@dataclass(kw_only=True, frozen=True)
class GradeConfig:
    """What to grade and how."""

    input: Path
    """JSON lines: "id"; "gold", or else "answer" (text or number); "prediction", or else "response" (null: none was
    given); optionally "mode" (answer, response, text, mc or a plugin's; default response: the answer is looked for in
    a whole response), "choices" (option texts, for mc), "question" (its language is not penalized, its formulas are no
    answers) and "finish_reason" (stop, length or repetition; default stop)."""
    output: Path
    """JSON lines, one a prediction, in the same order: "id", "correct", "reward", "outcome", "extracted", "reason",
    "penalties", "seconds"."""
    explain: bool = False
    """Say in "reason" what was read from gold and answer, and by which rules they are equal or not."""
    labels: str | None = None
    """Key of your own verdicts in the input (true or false): accuracy, false positives and false negatives are printed
    by "kind", and every disagreement is named."""
    plugins: tuple[str, ...] = ()
    """Modules of yours, by their dotted names, that add penalties, answer modes, losses, advantages, model families,
    question sets or chat templates; see docs/extending.md."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The grader."""

    def __post_init__(self) -> None:
        if not Path(self.input).is_file():
            raise FieldError("input", str(self.input), "must be a file of JSON lines with id, gold and prediction")
        another_file(self, "output", [self.input])
