"""Every family through the engine, against transformers in the same precision and in float64: logprobs, gradients, and
the exported folder's bytes. With packed sequences, in several microbatches and in one, and in FP8."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.results import Check, relative
from benchmarks.gpu.trainer import engine_of, num_targets, start
from megatron_t1.algo.loss import sft_token_loss
from megatron_t1.platform.detect import Platform
from megatron_t1.weights.hf_folder import HFFolder
from megatron_t1.weights.plan import Plan
from tests.engine.batch import make_sequences
from tests.models.families import FAMILIES, VOCAB, chatglm_names, expert_names, load_model
from tests.tiny import make_tiny
from tests.workers.gradients import gradient_pieces

SMOKE_FAMILIES = {"qwen2 tied", "qwen3_moe"}
# Logprobs in the mean and gradients at worst, relative. In bfloat16 two experts may nearly tie for a token, and then a
# router's choice, and with it a gradient, jumps.
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (3e-2, 0.4)}


def families_bf16(check: Check) -> None:
    _families(check, "bfloat16", "auto")


def families_local(check: Check) -> None:
    for dtype in ("float32", "bfloat16"):
        _families(check, dtype, "local")


def _families(check: Check, dtype: str, layers: str) -> None:
    platform = start()
    for family, make in FAMILIES.items():
        if check.smoke and family not in SMOKE_FAMILIES:
            continue
        name = f"{family} {dtype}"
        with check.case(name):
            folder = check.work / name.replace(" ", "_")
            shutil.rmtree(folder, ignore_errors=True)
            make(folder, dtype=dtype)
            _family(check, name, platform, folder, dtype, layers, is_chatglm=family == "chatglm")


def _family(
    check: Check, name: str, platform: Platform, folder: Path, dtype: str, layers: str, *, is_chatglm: bool
) -> None:
    sequences = make_sequences(VOCAB)
    count = num_targets(sequences)
    engine = engine_of(platform, folder, dtype=dtype, layers=layers)
    ours = np.concatenate(engine.logprobs(sequences)).astype(np.float64)
    same, exact = (load_model(folder, kind).to(platform.device) for kind in (getattr(torch, dtype), torch.float64))
    theirs, wanted = [], []
    for s in sequences:
        ids = torch.tensor([*s.prompt_ids, *s.response_ids], device=platform.device)
        targets = ids[len(s.prompt_ids) :, None]
        predicting = slice(len(s.prompt_ids) - 1, -1)
        with torch.no_grad():
            theirs.append(same(ids[None]).logits[0, predicting].double().log_softmax(-1).gather(1, targets)[:, 0])
        logits = exact(ids[None]).logits[0, predicting]
        wanted.append(logits.detach().log_softmax(-1).gather(1, targets)[:, 0])
        (torch.nn.functional.cross_entropy(logits, targets[:, 0], reduction="sum") / count).backward()
    hf, want = (torch.cat(parts).cpu().numpy() for parts in (theirs, wanted))
    error, error_of_hf = float(np.abs(ours - want).mean()), float(np.abs(hf - want).mean())

    gradients = expert_names({n: p.grad for n, p in exact.named_parameters() if p.grad is not None})
    gradients = chatglm_names(gradients) if is_chatglm else gradients
    engine.step(engine.pack(sequences), count, sft_token_loss)
    mine = dict(Plan(gradient_pieces(engine)).gather())
    errors = {n: relative(mine[n], g) for n, g in gradients.items() if n in mine and g.norm() > 0}
    worst = max(errors, key=errors.__getitem__)

    exported = folder.with_name(folder.name + "_exported")
    shutil.rmtree(exported, ignore_errors=True)
    engine.save_hf(exported)
    one, two = HFFolder(folder), HFFolder(exported)
    equal = one.tensors.keys() == two.tensors.keys() and all(
        torch.equal(one.read(tensor), two.read(tensor)) for tensor in one.tensors
    )
    limit, gradient_limit = LIMITS[dtype]
    lacking = sorted(gradients.keys() - mine.keys())
    check.report(
        name,
        error <= max(limit, 2 * error_of_hf) and errors[worst] <= gradient_limit and equal and not lacking,
        logprob_error=error,
        logprob_error_of_transformers=error_of_hf,
        gradient_error=errors[worst],
        at=worst,
        gradient_error_median=float(np.median(list(errors.values()))),
        exported_equal=equal,
        lacking=lacking[:3],
    )


def packing(check: Check) -> None:
    """The same sequences in one microbatch and in many. With FP8 by tensor a scale is of all that are packed."""
    platform = start()
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    folder = make_tiny("Qwen2ForCausalLM", check.work / "hf", vocab_size=321, init_std=0.1, dtype="bfloat16", **sizes)
    sequences = make_sequences(321)
    recipes: dict[str, tuple[dict[str, Any], float]] = {
        "bf16": ({}, 0.03),
        "fp8 tensorwise": ({"fp8": "hybrid"}, 0.35),
        "fp8 blockwise": ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, 0.03),
    }
    for name, (fields, limit) in recipes.items():
        if check.smoke and fields:
            continue
        with check.case(name):
            whole = engine_of(platform, folder, max_tokens=1024, transformer=fields)
            cut = engine_of(platform, folder, max_tokens=96, transformer=fields)
            lengths = [microbatch.token_ids.numel() for microbatch in cut.pack(sequences)]
            one, many = (np.concatenate(engine.logprobs(sequences)) for engine in (whole, cut))
            difference = float(np.abs(one - many).mean())
            aligned = all(length % (16 if fields else 1) == 0 for length in lengths)
            check.report(name, aligned and difference < limit, microbatches=lengths, one_against_many=difference)
