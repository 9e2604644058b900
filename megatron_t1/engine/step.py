"""The engine: forward, fused loss, backward and optimizer over TP, CP, PP and DP, through Megatron's pipeline schedule.

A loss is a pointwise function of per-token tensors (`algo.loss`); SFT and RL differ in it and in nothing else. It is
divided by the global number of target tokens, which is fixed before the first microbatch, so neither the loss nor a
gradient depends on the layout, the packing or the number of microbatches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_t1.algo.head.fused import TokenLoss, fused_loss, logprob_entropy_nograd
from megatron_t1.algo.head.layout import AnchorHead, Head
from megatron_t1.algo.loss import Metrics, TokenFields
from megatron_t1.data.packing import pack
from megatron_t1.engine import stored
from megatron_t1.engine.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_t1.engine.cut import Cut, no_loss, zeros_onward
from megatron_t1.engine.model import T1GPTModel, build_model, output_head, packed_seq_params, takes_te_layers, wrap_ddp
from megatron_t1.engine.optimizer import build_optimizer
from megatron_t1.engine.parallel import is_main, shards
from megatron_t1.models import spec_of
from megatron_t1.models.sizes import Sizes
from megatron_t1.models.weight_map import Piece
from megatron_t1.platform.detect import Platform
from megatron_t1.types import Microbatch, TrainSequence
from megatron_t1.warn import warn
from megatron_t1.weights import hf_io
from megatron_t1.weights.hf_folder import is_torch_dist
from megatron_t1.weights.plan import local_pieces

_MAX_SKIPPED = 3
"""One bad batch must not end a run of weeks; a model that is beyond help must."""


class ForwardEngine:
    """A model on this rank's layout that is only asked. Every method is collective over the trainer's ranks, and those
    that pass microbatches through it raise Stopped between two of them (`engine.cut`)."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, platform: Platform, *, temperature: float) -> None:
        """`temperature` divides the logits: the sampling temperature in RL, 1 in SFT."""
        self.spec = spec_of(Path(model.hf_path))
        self.platform, self.parallel, self.model_config = platform, parallel, model
        self.temperature = temperature
        self.config, self.chunks = build_model(model, self.spec, parallel, platform)
        self.local_layers = not takes_te_layers(model, platform)

    def pieces(self, chunks: list[T1GPTModel] | None = None) -> list[Piece]:
        """This rank's Hugging Face pieces, aliasing the live weights (of the anchor, when its chunks are given)."""
        return local_pieces(chunks or self.chunks, self.spec, shards())

    def load_weights(self, folder: Path) -> None:
        """From a Hugging Face folder, or a Megatron checkpoint of any layout."""
        if is_torch_dist(folder):
            stored.load(self.chunks, self.spec, folder)
        else:
            hf_io.load(self.pieces(), folder, self.spec.carried)

    @contextlib.contextmanager
    def other_weights(self) -> Iterator[list[torch.Tensor]]:
        """Inside, the tensors of `tensors`, which it hands out, may be given other numbers; their
        own wait in host memory and come back. The optimizer is not told: no step may be taken meanwhile."""
        tensors = self.tensors()
        own = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
        try:
            with torch.no_grad():
                yield tensors
        finally:
            with torch.no_grad():
                torch._foreach_copy_(tensors, own)

    def tensors(self) -> list[torch.Tensor]:
        """The live parameters and buffers of this rank's chunks."""
        return [tensor for chunk in self.chunks for tensor in (*chunk.parameters(), *chunk.buffers())]

    def save_hf(self, out_dir: Path) -> None:
        hf_io.save(self.pieces(), Path(self.model_config.hf_path), out_dir, carried=self.spec.carried)

    def pack(self, sequences: list[TrainSequence]) -> list[Microbatch]:
        """This rank's microbatches of a step; every rank passes the same sequences."""
        interleaved = self.parallel.virtual_pipeline > 1
        return pack(
            sequences,
            max_tokens=self.parallel.max_tokens_per_microbatch,
            dp_rank=mpu.get_data_parallel_rank(),
            dp_size=mpu.get_data_parallel_world_size(),
            context_rank=mpu.get_context_parallel_rank(),
            context_size=self.parallel.context,
            multiple=self.parallel.multiple_of_rank(self.model_config),
            count_multiple=self.parallel.pipeline if interleaved else 1,
            device=self.platform.device,
        )

    def check_tokens(self, token_ids: Iterable[np.ndarray]) -> None:
        """Refuse tokens that the model has no row for: tensor-parallel ranks would take 0 for their embeddings.

        Raises:
            ValueError: there is one.
        """
        highest = max((int(ids.max()) for ids in token_ids if len(ids)), default=0)
        if highest >= self.spec.vocab_size:
            raise ValueError(
                f"a text has token {highest}, and the model has the vocab_size = {self.spec.vocab_size} of config.json "
                f"in {self.model_config.hf_path}: its tokenizer knows more; add rows to the embedding, or take "
                "away the tokens that were added"
            )

    def balance(self, microbatches: list[Microbatch], sequences: list[TrainSequence]) -> dict[str, float]:
        """How well `pack` has spread the sequences of a step. Collective.

        Returns:
            packing/imbalance: by which share the busiest data-parallel rank's work exceeds the mean; work is the flops
            of matrices and attention (`models.sizes`), of padding too. packing/padding: share of all tokens.
        """
        lengths = [microbatch.cu_seqlens.diff().double() for microbatch in microbatches]
        own = sum(float((n + Sizes.of(self.spec).attention * n**2).sum()) for n in lengths)
        work = torch.tensor([[own], [own]], dtype=torch.float64, device=self.platform.device)
        dist.all_reduce(work[0], dist.ReduceOp.MAX)
        dist.all_reduce(work[1])
        dp_size = mpu.get_data_parallel_world_size()
        num_tokens = dp_size * sum(int(n.sum()) for n in lengths)
        return {
            "packing/imbalance": float(work[0] * dist.get_world_size() / work[1]) - 1,
            "packing/padding": 1 - sum(sequence.num_tokens for sequence in sequences) / num_tokens,
        }

    @torch.no_grad()
    def map_hidden(
        self,
        chunks: list[T1GPTModel],
        microbatches: list[Microbatch],
        fn: Callable[[torch.Tensor, Head, Microbatch], Any],
    ) -> list[Any]:
        """Forward only: `fn` of each microbatch's last hidden states, on the last pipeline stage (elsewhere [])."""
        for chunk in chunks:
            chunk.eval()

        def loss_func(microbatch: Microbatch, hidden: torch.Tensor, non_loss_data: bool = True) -> Any:
            return fn(hidden.squeeze(1), output_head(chunks[-1], self.spec, self.temperature), microbatch)

        return self._run(chunks, microbatches, loss_func, forward_only=True)

    def logprobs(self, sequences: list[TrainSequence]) -> list[np.ndarray]:
        """float32 [num_response_tokens] of each sequence: the policy's logprobs after temperature, on every rank.

        Raises:
            ValueError: a token that the model has no row for.
        """
        self.check_tokens(ids for s in sequences for ids in (s.prompt_ids, s.response_ids))
        computed = self.map_hidden(self.chunks, self.pack(sequences), _token_logprobs)
        mine = computed if mpu.get_tensor_model_parallel_rank() == 0 else []
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        found = [np.full(len(s.response_ids), np.nan, np.float32) for s in sequences]
        for indices, positions, values in (part for of_rank in everyone for part in of_rank):
            for i in np.unique(indices):
                mine = indices == i  # a part of the sample, where ranks share it
                found[i][positions[mine] - (len(sequences[i].prompt_ids) - 1)] = values[mine]
        return found

    def _run(
        self,
        chunks: list[T1GPTModel] | list[DistributedDataParallel],
        microbatches: list[Microbatch],
        loss_func: Callable[..., Any],
        forward_only: bool,
    ) -> list[Any]:
        self.cut = cut = Cut()

        def forward_step(batches: Iterator[tuple[int, Microbatch]], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            number, microbatch = next(batches)
            if cut.leaves_out(number):
                return zeros_onward(chunk, self.config, microbatch), no_loss
            output = chunk(
                microbatch.token_ids[None],
                microbatch.position_ids[None],
                None,
                packed_seq_params=packed_seq_params(microbatch, self.config, self.local_layers),
            )
            return output, partial(loss_func, microbatch)

        with self._without_sync() if forward_only else contextlib.nullcontext():
            results: list[Any] = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(enumerate(microbatches)) for _ in chunks],
                model=list(chunks),
                num_microbatches=len(microbatches),
                seq_length=microbatches[0].token_ids.numel() * self.parallel.context,
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )
        cut.finish()
        return results

    @contextlib.contextmanager
    def _without_sync(self) -> Iterator[None]:
        """Megatron's schedule calls `no_sync_func` of the config that policy and anchor share; a forward pass alone
        has no gradients to hold back."""
        no_sync, self.config.no_sync_func = self.config.no_sync_func, contextlib.nullcontext
        try:
            yield
        finally:
            self.config.no_sync_func = no_sync


class Engine(ForwardEngine):
    """A trainable model: gradients, optimizer and learning-rate schedule around it."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optim: OptimConfig,
        platform: Platform,
        *,
        total_steps: int,
        temperature: float,
    ) -> None:
        super().__init__(model, parallel, platform, temperature=temperature)
        self.config.finalize_model_grads_func = self._finalize
        self.ddp = wrap_ddp(self.config, self.chunks, parallel)
        self.config.no_sync_func = self._no_sync
        self.optimizer, self.scheduler = build_optimizer(
            optim, self.ddp, self.config.params_dtype, parallel, total_steps
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self._num_skipped = 0

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for ddp in self.ddp:
                stack.enter_context(ddp.no_sync())
            yield

    def _finalize(self, model: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
        # The loss is over the global token count already; Megatron must not divide the gradients again.
        if not self.cut.made:
            finalize_model_grads(model, None, **kwargs)

    def load_weights(self, folder: Path) -> None:
        super().load_weights(folder)
        self.optimizer.reload_model_params()

    def step(
        self,
        microbatches: list[Microbatch],
        num_targets: int,
        token_loss: TokenLoss,
        anchor: list[T1GPTModel] | None = None,
    ) -> dict[str, float]:
        """One optimizer step. Returns the loss's metrics (means over tokens, maxima), gradient norm and learning rate.

        A loss or gradient that is not finite changes nothing: `skipped` is 1 then, and there is no `grad_norm`.

        Args:
            num_targets: response tokens of the whole step, over all ranks: the normaliser of loss and gradients.
            anchor: chunks of the model that made `anchor_hidden` of the microbatches; token_loss is given the
                full-vocabulary KL to it where there is one.

        Raises:
            FloatingPointError: loss or gradient are not finite for the third time running; no step was taken.
            Stopped: rank 0 was asked to stop before the last microbatch was begun: no step was taken.
        """
        for ddp in self.ddp:
            ddp.train()
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

        grad_scale = float(self.optimizer.scale_loss(torch.ones(1, device=self.platform.device))) / num_targets

        def anchor_head(microbatch: Microbatch) -> AnchorHead | None:
            if anchor is None or microbatch.anchor_hidden is None:
                return None
            return AnchorHead(
                hidden=microbatch.anchor_hidden.to(self.platform.device),
                head=output_head(anchor[-1], self.spec, self.temperature),
            )

        def loss_func(microbatch: Microbatch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
            total, metrics = fused_loss(
                hidden.squeeze(1),
                output_head(self.chunks[-1], self.spec, self.temperature),
                microbatch.target_positions,
                microbatch.targets,
                token_loss,
                TokenFields.of(microbatch),
                grad_scale=grad_scale,
                anchor=anchor_head(microbatch),
            )
            counted = torch.tensor(microbatch.targets.numel(), dtype=torch.int, device=total.device)
            # The schedule may go on to work on the loss in place: keep a number of our own.
            metrics.sums["loss"] = total.detach().clone()
            return total / num_targets, counted, metrics

        per_microbatch = self._run(self.ddp, microbatches, loss_func, forward_only=False)
        metrics = self._reduce(per_microbatch, num_targets)
        self.scheduler.step(increment=1)
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        # Megatron's own step clips by whatever the norm is, and writes it into weights and moments.
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if math.isfinite(metrics["loss"]) and math.isfinite(grad_norm):
            self.optimizer.step()
            self._num_skipped = 0
            return metrics | {"grad_norm": grad_norm, "skipped": 0.0}
        self._num_skipped += 1
        told = f"the loss is {metrics['loss']} and the gradient norm {grad_norm}"
        if self._num_skipped == _MAX_SKIPPED:
            raise FloatingPointError(
                f"{told}, in {_MAX_SKIPPED} steps one after another: resume with a lower optim.lr or without FP8"
            )
        if is_main():
            warn(f"{told}: this step changes nothing")
        return metrics | {"skipped": 1.0}

    def _reduce(self, per_microbatch: list[Metrics], num_targets: int) -> dict[str, float]:
        """Token sums and maxima of the last stage's ranks -> global means and maxima, the same on every rank."""
        merged = Metrics.merge(per_microbatch if mpu.get_tensor_model_parallel_rank() == 0 else [])
        local = tuple({name: float(value) for name, value in part.items()} for part in (merged.sums, merged.maxima))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, local)
        metrics: dict[str, float] = {}
        for sums, maxima in everyone:
            for name, value in sums.items():
                metrics[name] = metrics.get(name, 0.0) + value / num_targets
            for name, value in maxima.items():
                metrics[f"{name}_max"] = max(metrics.get(f"{name}_max", -math.inf), value)
        metrics["num_tokens"] = float(num_targets)
        if (squared := metrics.pop("weight_squared", None)) is not None:  # all are dropped: 0
            metrics["effective_sample_size"] = metrics["weight"] ** 2 / squared if squared else 0.0
        return metrics


def _token_logprobs(hidden: torch.Tensor, head: Head, microbatch: Microbatch) -> tuple[np.ndarray, ...]:
    """Sample, position in its sequence and logprob of every target."""
    values = logprob_entropy_nograd(hidden, head, microbatch.target_positions, microbatch.targets)[0]
    positions = microbatch.position_ids[microbatch.target_positions]
    return tuple(part.cpu().numpy() for part in (microbatch.sample_index, positions, values.float()))
