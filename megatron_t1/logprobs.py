"""`t1 logprobs`: the logprob of every token of given texts, and how far transformers or a vLLM server is from it.

    texts -> packed -> forward over the trainer's ranks -> logprobs -> compared, token by token -> the worst shown

The trainer's own code at the trainer's own layout computes them, so that a difference is one that training would have.
At temperature 1, whatever the servers sample at.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_t1.config import LogprobsConfig
from megatron_t1.data.prompts import load_texts
from megatron_t1.data.tokenizer import load_tokenizer
from megatron_t1.engine.config import ModelConfig
from megatron_t1.engine.parallel import initialize, is_main
from megatron_t1.engine.step import ForwardEngine
from megatron_t1.files import write_jsonl
from megatron_t1.platform.detect import setup
from megatron_t1.servers.keys import REMOTE_KEY_ENV, read_key
from megatron_t1.servers.server import NO_LOGPROB, Server, ServerError
from megatron_t1.types import TrainSequence
from megatron_t1.weights.hf_folder import is_torch_dist

_REQUEST_TIMEOUT_S = 600.0
_CONTEXT_TOKENS = 8  # shown before a token
_ROWS = 1024  # of logits at a time in float32: those of a text of 16k tokens would be 10 GB, twice


@dataclass(frozen=True)
class Comparison:
    largest: float
    mean: float
    num_tokens: int
    worst: list[tuple[int, int]]
    """(text, token of its response), the largest difference first."""


def run(cfg: LogprobsConfig) -> Comparison | None:
    """Score, write and say. Collective over the trainer's ranks; the comparison is rank 0's.

    Raises:
        ValueError: malformed texts, or a text that is too long for a microbatch.
        ServerError: the server can't be reached, or answers nonsense.
        FloatingPointError: a logprob of either is not a finite number; all is written and said.
    """
    platform, model_dir = setup(), Path(cfg.model)
    initialize(cfg.parallel, platform, seed=0)
    texts = load_texts(Path(cfg.input), model_dir)
    model = ModelConfig(hf_path=cfg.model, dtype=cfg.dtype, layers=cfg.layers)
    cfg.parallel.check_fits(max(text.num_tokens for text in texts), model)
    engine = ForwardEngine(model, cfg.parallel, platform, temperature=1.0)
    engine.load_weights(model_dir)
    ours = engine.logprobs(texts)
    theirs: list[np.ndarray] | None = None
    if cfg.against == "transformers":
        theirs = _by_transformers(engine, texts, platform.device)
    elif cfg.against and is_main():
        theirs = [_by_server(_server(cfg), text) for text in tqdm(texts, desc=cfg.against, unit="text")]
    comparison = None
    if is_main():
        comparison = _report(cfg, texts, ours, theirs)
    dist.barrier()
    dist.destroy_process_group()
    if comparison:
        check_finite(comparison)
    return comparison


def compare(ours: list[np.ndarray], theirs: list[np.ndarray], num_worst: int) -> Comparison:
    """A token that one of them has at minus infinity, or not at all, differs infinitely."""
    with np.errstate(invalid="ignore"):  # of two infinite ones; what is no finite number is said below
        differences = [np.abs(a.astype(np.float64) - b) for a, b in zip(ours, theirs, strict=True)]
    flat = np.concatenate(differences)
    flat[np.isnan(flat)] = math.inf
    owners = np.concatenate([np.full(len(d), i) for i, d in enumerate(differences)])
    places = np.concatenate([np.arange(len(d)) for d in differences])
    order = np.argsort(-flat, kind="stable")[:num_worst]
    return Comparison(
        float(flat.max()), float(flat.mean()), len(flat), [(int(owners[i]), int(places[i])) for i in order]
    )


def check_finite(comparison: Comparison) -> None:
    """Raises FloatingPointError when a logprob of either is not a finite number."""
    if not math.isfinite(comparison.largest):
        raise FloatingPointError("a logprob is no finite number; the worst tokens show where")


def _report(
    cfg: LogprobsConfig, texts: list[TrainSequence], ours: list[np.ndarray], theirs: list[np.ndarray] | None
) -> Comparison | None:
    tokenizer = load_tokenizer(Path(cfg.model))
    if cfg.output:
        write_jsonl(Path(cfg.output), (_row(text, i, ours, theirs) for i, text in enumerate(texts)))
    every = np.concatenate(ours)
    print(f"{len(texts)} texts, {len(every)} scored tokens: mean logprob {every.mean():.4f}")
    if theirs is None:
        return None
    comparison = compare(ours, theirs, cfg.num_shown)
    print(f"against {cfg.against}: differences {comparison.largest:.2e} at most, {comparison.mean:.2e} in the mean")
    print("the worst tokens (text, token of its response: difference, ours, theirs, the token after its context):")
    for number, place in comparison.worst:
        text = texts[number]
        ids = [*text.prompt_ids.tolist(), *text.response_ids.tolist()]
        at = len(text.prompt_ids) + place
        before = tokenizer.decode(ids[max(0, at - _CONTEXT_TOKENS) : at])
        mine, other = ours[number][place], theirs[number][place]
        print(
            f"  {number}, {place}: {abs(float(mine) - float(other)):.2e}, {mine:.5f}, {other:.5f}, "
            f"{tokenizer.decode([ids[at]])!r} after {before!r}"
        )
    return comparison


def _row(text: TrainSequence, number: int, ours: list[np.ndarray], theirs: list[np.ndarray] | None) -> dict[str, Any]:
    row = {
        "token_ids": [*text.prompt_ids.tolist(), *text.response_ids.tolist()],
        "num_prompt_tokens": len(text.prompt_ids),
        "logprobs": ours[number].tolist(),
    }
    return row if theirs is None else {**row, "against": theirs[number].tolist()}


@torch.no_grad()
def _by_transformers(
    engine: ForwardEngine, texts: list[TrainSequence], device: torch.device
) -> list[np.ndarray] | None:
    """Rank 0's, from the same weights: those of a Megatron checkpoint are exported first. Collective."""
    folder = Path(engine.model_config.hf_path)
    with tempfile.TemporaryDirectory() as tmp:
        if is_torch_dist(folder):
            folder = Path(tmp) / "hf"
            engine.save_hf(folder)
        if not is_main():
            return None
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=engine.config.params_dtype, trust_remote_code=False, use_safetensors=True
        )
        model.to(device).eval()
        scored = []
        for text in tqdm(texts, desc="transformers", unit="text"):
            ids = torch.from_numpy(np.concatenate([text.prompt_ids, text.response_ids])).to(device)
            logits = model(ids[None]).logits[0, len(text.prompt_ids) - 1 : -1]
            targets = ids[len(text.prompt_ids) :, None]
            parts = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
            logprobs = [rows.float().log_softmax(-1).gather(1, wanted)[:, 0] for rows, wanted in parts]
            scored.append(torch.cat(logprobs).cpu().numpy())
        return scored


def _server(cfg: LogprobsConfig) -> Server:
    key = read_key(Path(cfg.key_file)) if cfg.key_file else os.environ.get(REMOTE_KEY_ENV, "")
    assert cfg.against
    return Server(url=cfg.against.rstrip("/"), key=key)


def _by_server(server: Server, text: TrainSequence) -> np.ndarray:
    """float32 [num_response_tokens], as the server's prefill has them."""
    ids = [*text.prompt_ids.tolist(), *text.response_ids.tolist()]
    try:
        name = server.call("GET", "/v1/models", timeout_s=30)["data"][0]["id"]
        body = {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        reply = server.call("POST", "/v1/completions", body, timeout_s=_REQUEST_TIMEOUT_S)
        entries = reply["choices"][0]["prompt_logprobs"]
        logprobs = [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], ids[1:], strict=True)]
        if not all(type(logprob) in (int, float) for logprob in logprobs):
            raise ValueError("a logprob is no number")
        with np.errstate(over="ignore"):  # an infinite one is shown as that
            scored = np.array(logprobs[len(text.prompt_ids) - 1 :], np.float32)
        scored[scored <= NO_LOGPROB] = -np.inf
        return scored
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ServerError(f"server {server.name} returned no prompt logprobs: {json.dumps(str(error))}") from None
