"""Supervised fine-tuning on chains of trial, error and verification: packed sequences, loss on response tokens only.

    for step: batch -> pack -> forward, negative log-likelihood, backward, optimizer -> log -> checkpoint

Which tokens are targets is decided in `data/packing.py`. The order of the examples is a function of (seed, epoch)
alone, so a resumed run sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_t1 import plugins
from megatron_t1.algo.loss import sft_token_loss
from megatron_t1.config import Config, keep
from megatron_t1.engine import checkpoint
from megatron_t1.engine.parallel import from_main, is_main
from megatron_t1.engine.resume_check import data_identity, model_identity, named
from megatron_t1.engine.saving import Saver
from megatron_t1.engine.step import Engine
from megatron_t1.metrics import Stopwatch
from megatron_t1.platform.detect import Platform
from megatron_t1.stop import Stopped
from megatron_t1.trackers import open_log
from megatron_t1.types import TrainSequence
from megatron_t1.weights.hf_folder import HFFolder, is_torch_dist


def batches(examples: list[TrainSequence], batch_size: int, seed: int, start: int) -> Iterator[list[TrainSequence]]:
    """Batch number `start` and those after it: each epoch a permutation, its incomplete last batch left out."""
    per_epoch = len(examples) // batch_size
    number = start
    while True:
        epoch, position = divmod(number, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(examples))
        while position < per_epoch:
            yield [examples[i] for i in order[position * batch_size : (position + 1) * batch_size]]
            position += 1
            number += 1


def _num_steps(cfg: Config, examples: list[TrainSequence]) -> int:
    """Of the whole run."""
    of_epochs = len(examples) // cfg.sft.batch_size * cfg.sft.epochs
    return min(of_epochs, cfg.sft.max_steps or of_epochs)


def _settings(cfg: Config, examples: list[TrainSequence]) -> dict[str, Any]:
    steps = None if cfg.sft.optim.schedule == "constant" else _num_steps(cfg, examples)
    rows = ((example.prompt_ids.tobytes(), example.response_ids.tobytes()) for example in examples)
    return named(
        **{"data.sft": data_identity(rows), "sft.batch_size": cfg.sft.batch_size, "sft.optim": cfg.sft.optim},
        **{"seed": cfg.seed, "model": model_identity(cfg.model), "model.dtype": cfg.model.dtype},
        **{"steps of sft.optim.schedule (by sft.epochs, sft.max_steps)": steps},
        plugins=plugins.identity(),
    )


def _split(cfg: Config, examples: list[TrainSequence]) -> tuple[list[TrainSequence], list[TrainSequence]]:
    """What is trained on, in its order, and the `sft.num_heldout` others."""
    heldout = set(np.random.default_rng(cfg.seed).permutation(len(examples))[: cfg.sft.num_heldout].tolist())
    return [e for i, e in enumerate(examples) if i not in heldout], [examples[i] for i in sorted(heldout)]


def check_finished(cfg: Config, examples: list[TrainSequence]) -> None:
    """Collective. The fine-tuned model in run_dir was made with these settings and examples, or what changed is said.

    Without its checkpoints nothing is known of how it was made, and it is taken as it is.

    Raises:
        ValueError: it was made with others, and `resume_with_changes` is not given.
    """
    folder = Path(cfg.run_dir) / "sft" / "checkpoints"
    if checkpoints := from_main(checkpoint.finished(folder) if is_main() else None):
        settings = _settings(cfg, _split(cfg, examples)[0]) if is_main() else {}
        checkpoint.check_made_with(checkpoints[-1], settings, may_change=cfg.resume_with_changes)


def train(cfg: Config, platform: Platform, examples: list[TrainSequence]) -> Path:
    """Fine-tune `model.hf_path` on the examples; returns the exported Hugging Face folder. Collective.

    Raises:
        ValueError: a batch larger than the data; a token that the model has no row for; a finished or begun run in
            run_dir without `resume`, or of other settings.
        Stopped: the run was asked to stop; a checkpoint of the steps done is written.
    """
    folder = Path(cfg.run_dir) / "sft"
    everything = examples
    examples, heldout = _split(cfg, everything)
    if len(examples) < cfg.sft.batch_size:
        raise ValueError(
            f"sft.batch_size = {cfg.sft.batch_size} is larger than the {len(everything)} examples less "
            f"sft.num_heldout = {cfg.sft.num_heldout}; lower it"
        )
    total = _num_steps(cfg, examples)
    cfg.sft.optim.check_steps(total, "sft.optim")
    cfg.parallel.check_fits(max(example.num_tokens for example in everything), cfg.model)
    if not is_torch_dist(Path(cfg.model.hf_path)):
        HFFolder(Path(cfg.model.hf_path))  # whole, or refused on every rank: rank 0 alone reads it below
    settings = _settings(cfg, examples) if is_main() else {}
    found = checkpoint.to_resume(
        folder / "checkpoints", allowed=cfg.resume, settings=settings, may_change=cfg.resume_with_changes
    )
    engine = Engine(cfg.model, cfg.parallel, cfg.sft.optim, platform, total_steps=total, temperature=1.0)
    engine.check_tokens(ids for example in everything for ids in (example.prompt_ids, example.response_ids))
    if found:
        done = int(checkpoint.load(found, engine, None)["step"])
    else:
        engine.load_weights(Path(cfg.model.hf_path))
        done = 0
    if is_main():
        keep(cfg)
    watch = Stopwatch()
    losses: list[float] = []  # of the steps since the last checkpoint that changed something
    saver = Saver(folder / "checkpoints", cfg.sft.checkpoint)

    def save(step: int) -> None:
        state = {"seed": cfg.seed, "settings": settings}
        saver.begin(step, engine, None, state, score=-float(np.mean(losses or [np.inf])))
        losses.clear()

    bar = tqdm(total=total, initial=done, desc="sft", unit="step", disable=not is_main())
    with open_log(cfg, "sft", done) if is_main() else nullcontext() as log:
        for step, batch in enumerate(batches(examples, cfg.sft.batch_size, cfg.seed, done), start=done + 1):
            if step > total:
                break
            num_targets = sum(len(sequence.response_ids) for sequence in batch)
            try:
                with watch("train"):
                    metrics = engine.step(engine.pack(batch), num_targets, sft_token_loss)
            except (Stopped, FloatingPointError) as error:
                if losses and isinstance(error, Stopped):
                    save(step - 1)
                saver.finish()
                raise
            if not metrics["skipped"]:
                losses.append(metrics["loss"])
            metrics["seconds/train"] = watch.lap()["train"]
            if heldout and (step % cfg.sft.measure_every == 0 or step == total):
                with suppress(Stopped):  # the next step, if there is one, sees it before anything is lost
                    metrics["heldout_nll"] = -float(np.concatenate(engine.logprobs(heldout)).mean(dtype=np.float64))
            metrics["tokens_per_s"] = sum(sequence.num_tokens for sequence in batch) / metrics["seconds/train"]
            if log:
                log.log(step, metrics)
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
                bar.update()
            saver.finish(wait=False)
            if cfg.sft.checkpoint.due(step, total):
                save(step)
        bar.close()
        saver.finish()
        engine.save_hf(folder / "hf")
    return folder / "hf"
