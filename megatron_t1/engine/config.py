"""What a user says about the model, its layout, the optimizer, the anchor and the checkpoints.

Read by the command line before anything heavy is: neither torch nor Megatron is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_t1.fields import FieldError, above, at_least, within

Dtype = Literal["float32", "bfloat16"]
ATTENTION_BACKENDS = ("flash", "fused", "unfused", "local", "auto")
"""Megatron's `AttnBackend`, by name."""


FP8_MULTIPLES = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""Scaling recipe -> of which both dimensions of every matrix must be multiples, tokens included."""


TRANSFORMER_FIELDS = (
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
    *("distribute_saved_activations", "cpu_offloading", "cpu_offloading_num_layers", "cpu_offloading_activations"),
    *("cpu_offloading_weights", "cpu_offloading_double_buffering", "fine_grained_activation_offloading"),
    *("offload_modules", "min_offloaded_tensor_size", "deallocate_pipeline_outputs"),
    *("fp8", "fp8_recipe", "fp8_dot_product_attention", "fp8_multi_head_attention", "tp_only_amax_red"),
    *("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
    *("disable_bf16_reduced_precision_matmul", "deterministic_mode", "attention_backend"),
    *("apply_rope_fusion", "bias_activation_fusion", "masked_softmax_fusion"),
    *("persist_layer_norm", "memory_efficient_layer_norm"),
    "cp_comm_type",
    *("moe_token_dispatcher_type", "moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion"),
    *("moe_router_padding_for_fp8", "moe_shared_expert_overlap", "moe_flex_dispatcher_backend", "moe_deepep_num_sms"),
)
"""What `model.transformer` may set: speed and memory. The other fields of Megatron's config change what is computed or
how it is laid out; config.json, `parallel` and T1's loss decide those."""


_READ_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(
        ("recompute_method", "recompute_num_layers", "distribute_saved_activations"),
        ("recompute_granularity", ("full",)),
    ),
    "recompute_modules": ("recompute_granularity", ("selective",)),
    **dict.fromkeys(
        (f"cpu_offloading_{what}" for what in ("num_layers", "activations", "weights", "double_buffering")),
        ("cpu_offloading", (True,)),
    ),
    **dict.fromkeys(("offload_modules", "min_offloaded_tensor_size"), ("fine_grained_activation_offloading", (True,))),
    **dict.fromkeys(
        ("fp8_recipe", "fp8_dot_product_attention", "fp8_multi_head_attention", "first_last_layers_bf16"),
        ("fp8", ("e4m3", "hybrid")),
    ),
    **dict.fromkeys(("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"), ("first_last_layers_bf16", (True,))),
}
"""Field -> another one and its values, without which Megatron passes it by and says nothing."""


def fp8_multiple(transformer: Mapping[str, Any]) -> int:
    """What FP8 asks of a matrix's dimensions, with these fields of Megatron's config; 1 without FP8."""
    return FP8_MULTIPLES[transformer.get("fp8_recipe", "tensorwise")] if transformer.get("fp8") else 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained and in what precision."""

    hf_path: str = ""
    """Folder of the model: config.json, tokenizer, and safetensors (Hugging Face) or a Megatron checkpoint (from
    `t1 convert`, or a run's checkpoints/step_N). Training starts from either, evaluation needs safetensors."""
    dtype: Dtype = "bfloat16"
    """Precision of weights and activations; gradients and optimizer state are float32."""
    layers: Literal["auto", "local"] = "auto"
    """`auto` takes Transformer Engine's layers when installed, for bfloat16: in float32 they multiply in TF32, to three
    digits. `local` never does."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Fields of Megatron's TransformerConfig for speed and memory (TRANSFORMER_FIELDS): {fp8: hybrid}, whose
    fp8_recipe is tensorwise: a scale a tensor, from the tensor itself. What a sequence's numbers are then depends a
    little on what is packed with it; not so with {fp8: e4m3, fp8_recipe: blockwise}, for 5% more time a step."""

    def __post_init__(self) -> None:
        if refused := sorted(set(self.transformer) - set(TRANSFORMER_FIELDS)):
            raise FieldError(
                "transformer",
                self.transformer,
                f"sets {refused}, which the checkpoint's config.json decides, or parallel, or T1's loss, or which "
                f"Megatron does not know; it may set {', '.join(TRANSFORMER_FIELDS)}",
            )
        if (way := self.transformer.get("cp_comm_type", "p2p")) not in ("p2p", "a2a"):
            raise FieldError(
                "transformer.cp_comm_type",
                way,
                "must be p2p (the default: keys and values go round) or a2a (heads are exchanged for tokens): "
                "Transformer Engine has no other for packed sequences",
            )
        if (backend := self.transformer.get("attention_backend", "auto")) not in ATTENTION_BACKENDS:
            raise FieldError(
                "transformer.attention_backend", backend, f"must be one of {', '.join(ATTENTION_BACKENDS)}"
            )
        if (fp8 := self.transformer.get("fp8")) not in (None, False, "e4m3", "hybrid"):
            raise FieldError("transformer.fp8", fp8, "must be e4m3, or hybrid (gradients in e5m2); null: no FP8")
        for name, (other, values) in _READ_WITH.items():
            # Where the other is switched off by name, as over a file that sets both, nobody waits for it.
            off = self.transformer.get(other, "") in (None, False)
            if (given := self.transformer.get(name)) and not off and self.transformer.get(other) not in values:
                needed = " or ".join(map(str, values))
                raise FieldError(f"transformer.{name}", given, f"is not read without {other}: {needed}")
        if (recipe := self.transformer.get("fp8_recipe", "tensorwise")) not in FP8_MULTIPLES:
            raise FieldError(
                "transformer.fp8_recipe",
                recipe,
                "must be tensorwise (the default), blockwise or mxfp8: delayed scaling takes its scales from the "
                "training steps before, which a resumed run and the anchor's passes don't have",
            )

    def folder(self) -> Path:
        """
        Raises:
            ValueError: `hf_path` is not the folder of a model.
        """
        if not (Path(self.hf_path) / "config.json").is_file():
            raise FieldError(
                "model.hf_path",
                self.hf_path,
                "must be a folder with a config.json; a model of the Hugging Face hub is brought here by "
                "`hf download NAME --local-dir FOLDER`",
            )
        return Path(self.hf_path)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the trainer's processes share the model and the data. Data parallelism is what is left of the world."""

    nproc_per_node: int = 0
    """Trainer processes on this machine when `t1` starts them itself (0: one a GPU; on a CPU as few as the layout
    takes). Ignored under torchrun or srun, which have started them already."""
    tensor: int = 1
    """Tensor-parallel size."""
    context: int = 1
    """Context-parallel size: so many ranks share every sequence, a part of its tokens each. For samples that are too
    long for one rank; what is shorter is padded to a multiple of 2 x context tokens and cut all the same."""
    pipeline: int = 1
    """Pipeline-parallel size (stages)."""
    virtual_pipeline: int = 1
    """Chunks of the model that each stage holds, for the interleaved schedule; 1 is the plain one."""
    pipeline_layers: tuple[int, ...] = ()
    """Layers of each of the pipeline x virtual_pipeline chunks in the model's order; empty spreads them evenly, and
    what is left over to the middle first: the first chunk has the embedding too, the last one the head."""
    expert: int = 1
    """Expert-parallel size: the experts of a layer are spread over so many ranks, which for everything else are
    data-parallel ones (or tensor-parallel ones, as far as expert_tensor < tensor)."""
    expert_tensor: int = 0
    """Tensor-parallel size inside an expert; 0 is that of the rest. Another one needs expert > 1."""
    sequence_parallel: bool = False
    """Shard norms and residuals over the tensor-parallel group too; needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks bucket by bucket during the last backward, not after it."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What the trainer moves to pinned host memory while servers generate (`rollout.share_gpus`): optimizer state and
    the anchor, with `all` the weights too. Gradients and activations take no room then. Pays with `rollout.sleep`."""
    max_tokens_per_microbatch: int = 16384
    """Packing limit: tokens in one forward pass of one rank, prompts and padding included. A sequence of up to context
    times as many fits."""
    timeout_s: float = 21600.0
    """Deadline of a collective within the trainer. The other ranks wait in one while rank 0 generates or evaluates: it
    must exceed the longest of these. (A rank that dies is noticed at once.)"""

    def __post_init__(self) -> None:
        at_least(self, 1, "tensor", "context", "pipeline", "virtual_pipeline", "expert", "max_tokens_per_microbatch")
        at_least(self, 0, "nproc_per_node", "expert_tensor")
        above(self, 0, "timeout_s")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise FieldError("virtual_pipeline", self.virtual_pipeline, "needs parallel.pipeline > 1")
        if self.pipeline_layers and (
            len(self.pipeline_layers) != self.num_stages or min(self.pipeline_layers, default=0) < 1
        ):
            raise FieldError(
                "pipeline_layers",
                self.pipeline_layers,
                f"must be {self.num_stages} numbers above 0: one for each of pipeline x virtual_pipeline = "
                f"{self.pipeline} x {self.virtual_pipeline} chunks",
            )
        if self.sequence_parallel and self.tensor == 1:
            raise FieldError("sequence_parallel", True, "needs parallel.tensor > 1; turn it off")

    @property
    def num_stages(self) -> int:
        """Chunks that the layers are cut into, over all ranks of a pipeline."""
        return self.pipeline * self.virtual_pipeline

    @property
    def num_ranks(self) -> int:
        """The fewest processes that this layout takes."""
        return self.pipeline * math.lcm(self.tensor * self.context, (self.expert_tensor or self.tensor) * self.expert)

    def layers_of_stages(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each chunk, in the model's order. Raises ValueError when they can't be cut so."""
        if self.pipeline_layers:
            if sum(self.pipeline_layers) != num_layers:
                raise ValueError(
                    f"parallel.pipeline_layers = {list(self.pipeline_layers)} are {sum(self.pipeline_layers)} layers, "
                    f"the model has {num_layers}"
                )
            return self.pipeline_layers
        each, left = divmod(num_layers, self.num_stages)
        if each == 0:
            raise ValueError(
                f"{num_layers} layers are too few for parallel.pipeline x parallel.virtual_pipeline = "
                f"{self.pipeline} x {self.virtual_pipeline} chunks"
            )
        last = self.num_stages - 1
        roomiest = sorted(range(self.num_stages), key=lambda stage: (stage == last, stage == 0))[:left]
        return tuple(each + (stage in roomiest) for stage in range(self.num_stages))

    def multiple_of_rank(self, model: ModelConfig) -> int:
        """Of which the tokens are that a rank has of a microbatch."""
        return self.tensor * fp8_multiple(model.transformer)

    def check_fits(self, num_tokens: int, model: ModelConfig) -> None:
        """Raise ValueError, before any step, when `pack` would have no room for the longest sequence of a run."""
        multiple = math.lcm(self.multiple_of_rank(model) * self.context, 2 * self.context if self.context > 1 else 1)
        room = self.max_tokens_per_microbatch * self.context // multiple * multiple
        if num_tokens > room:
            ranks = f" on each of {self.context} ranks" if self.context > 1 else ""
            cut = room < self.max_tokens_per_microbatch * self.context
            raise ValueError(
                f"the longest sequence has up to {num_tokens} tokens and does not fit into a microbatch of "
                f"{self.max_tokens_per_microbatch}{ranks}{f' (room for {room}, by the {multiple})' if cut else ''}; "
                "raise parallel.max_tokens_per_microbatch or parallel.context"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule. The paper: SFT at 1e-5 with a cosine, RL at 1.5e-6 constant."""

    lr: float
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes on after the warm-up."""
    min_lr_ratio: float = 0.0
    """The schedule ends at this share of `lr`, in the step after the last."""
    warmup_steps: int = 0
    """Steps of linear warm-up; the last of them has `lr`."""
    adam_beta1: float = 0.9
    """Decay of the mean of gradients, a step."""
    adam_beta2: float = 0.95
    """Decay of the mean of their squares, a step."""
    adam_eps: float = 1e-8
    """Added to the root of that mean; without it a weight that no token has reached yet would become 0 / 0."""
    weight_decay: float = 0.0
    """Share of each matrix that a step takes off, times the learning rate; norms and biases are spared."""
    clip_grad: float = 1.0
    """Global gradient norm limit; 0 turns clipping off."""

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "warmup_steps", "weight_decay", "clip_grad")
        at_least(self, 1e-30, "adam_eps")  # in float32 it must be more than 0
        within(self, 0, 1, "min_lr_ratio")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise FieldError(name, getattr(self, name), "must lie in [0, 1)")
        if self.min_lr_ratio and self.schedule == "constant":
            rule = "is not read with schedule = constant; choose cosine or linear, or leave it out"
            raise FieldError("min_lr_ratio", self.min_lr_ratio, rule)

    def check_steps(self, total_steps: int, section: str = "optim") -> None:
        """Raises FieldError, by the section's name, when the warm-up leaves nothing of the steps for the schedule."""
        if total_steps <= self.warmup_steps and self.schedule != "constant":
            rule = f"leaves nothing of the {total_steps} steps for the {self.schedule} schedule; lower it"
            raise FieldError(f"{section}.warmup_steps", self.warmup_steps, rule)


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """The EMA anchor."""

    decay: float = 0.99
    """Share of the old anchor that a step keeps; 1 keeps the starting policy, 0 follows the policy at once. There is no
    anchor at loss.kl_coef = 0."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "decay")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every_steps: int = 50
    """Steps between checkpoints; 0 writes only the last one."""
    keep: int = 2
    """How many of the newest stay on disk."""
    keep_best: int = 1
    """How many of the best stay besides: by mean reward of the steps since the one before (RL), by loss (SFT)."""

    def __post_init__(self) -> None:
        at_least(self, 0, "every_steps", "keep_best")
        at_least(self, 1, "keep")  # the newest is what a run resumes from

    def due(self, step: int, last_step: int) -> bool:
        return step == last_step or (self.every_steps > 0 and step % self.every_steps == 0)
