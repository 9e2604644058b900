"""CPU seconds and memory of what happens to one sample of 16k and of 128k tokens: the table of long_samples.md.

    python -m benchmarks.long_samples

Each stage runs in a forked process of its own: CPU seconds of that process, and how far its peak memory is above what
it began with. A stage that reads a sample once takes 8 times the time for 8 times the tokens.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

from megatron_t1 import reasoning
from megatron_t1.data.packing import pack, sequences_of
from megatron_t1.data.template import Template
from megatron_t1.evaluation.evaluate import response_row
from megatron_t1.evaluation.questions import Question
from megatron_t1.evaluation.samplers import graded
from megatron_t1.evaluation.scaling import _thinking
from megatron_t1.files import append_jsonl, read_jsonl
from megatron_t1.metrics import sample_row
from megatron_t1.report.report import write_report
from megatron_t1.reward.config import RewardConfig
from megatron_t1.reward.grading import grade_task, warm_up
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.rollout.finished_samples import Bank
from megatron_t1.rollout.reply import Request, samples_of
from megatron_t1.servers.server import Server
from megatron_t1.types import Group, Prompt, Reward, Sample
from tests.tiny import make_tiny_tokenizer

SIZES = (16_384, 131_072)
REWARD = Reward(value=1.0, correct=True, outcome="correct", extracted="42", reason="equal")
PROMPT = Prompt(id="q", text="Find x.", token_ids=np.arange(20), gold="42")
_WORDS = (
    *("wait", "hold on", "perhaps", "maybe", "might", "alternatively", "another way", "different approach", "check"),
    *("verify", "confirm", "mistake", "error", "wrong", "incorrect", "actually"),
    *("sum", "prime", "number", "of", "holds", "x"),
)


def honest(rng: random.Random, num_chars: int, signs: str = "") -> str:
    """A chain of words, formulas and line breaks."""
    parts, length = ["<think>"], 0
    while length < num_chars:
        line = " ".join(rng.choices(_WORDS, k=rng.randint(4, 12)))
        line += rng.choice([f" $x^{{{rng.randint(1, 99)}}}+\\frac{{{rng.randint(1, 99)}}}{{7}}$.", ",", ".\n", "\n\n"])
        line += rng.choice(signs or " ")
        parts.append(line)
        length += len(line)
    return "".join([*parts, "\n</think>\nThe answer is \\boxed{42}."])


def texts(num_tokens: int) -> dict[str, str]:
    """By kind; a token is 4.5 characters of a chain, and one of Chinese."""
    rng, num_chars = random.Random(0), round(4.5 * num_tokens)

    def filled(unit: str) -> str:
        return "<think>" + (unit * (num_chars // len(unit) + 1))[:num_chars] + "\n</think>\n\\boxed{42}"

    return {
        "a chain of words and formulas": honest(rng, num_chars),
        "the same with signs beyond ASCII": honest(rng, num_chars, signs="≤→éπ“”  "),
        "Chinese": "<think>" + "".join(rng.choices("我们需要找到满足条件的最小正整数解因此可以得到结论", k=num_tokens)),
        "a loop of one line": filled("I need to check the case again. \n"),
        "random digits": filled("".join(rng.choices("0123456789", k=num_chars))),
        "line breaks": filled("\n"),
        "words of 290 letters": filled("a" * 290 + " "),
        "open formulas": filled("\\( "),
        "open boxes": filled("\\boxed{"),
        "closed thinkings": filled("</think>"),
    }


def reply(sample: Sample) -> bytes:
    """As vLLM writes it."""
    content = [
        {"token": "", "token_id": int(i), "logprob": float(p), "bytes": [65, 66, 67], "top_logprobs": []}
        for i, p in zip(sample.token_ids, sample.logprobs, strict=True)
    ]
    choice = {
        "index": 0, "finish_reason": "stop", "token_ids": sample.token_ids.tolist(), "logprobs": {"content": content},
        "weight_versions": [{"version": "0", "start": 0, "end": len(content)}],
    }  # fmt: skip
    return msgspec.json.encode({"id": "1", "choices": [choice]})


def stages(num_tokens: int, folder: Path, template: Template) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    ids = template.ids(honest(random.Random(0), num_tokens))[:num_tokens]
    sample = Sample(
        token_ids=ids,
        logprobs=-rng.exponential(0.3, len(ids)).astype(np.float32),
        text=template.tokenizer.decode(ids),
        finish_reason="stop",
        weight_versions=((0, 0, len(ids)),),
        server="",
        reward=REWARD,
    )
    server, raw = Server(url="http://x", key="", version=0), reply(sample)
    request = Request("q", PROMPT.token_ids.tolist(), 1, 0, SamplingConfig(num_samples=1, max_new_tokens=1 << 20))
    group = Group(prompt=PROMPT, samples=[sample])
    question = Question(id="q", messages=[{"role": "user", "content": "Find x."}], gold="42")
    bank = Bank(folder / f"bank_{num_tokens}")
    bank.step(0, "w").add("q", request.token_ids, 0, [sample])
    row = {"step": 1, **sample_row(group, sample)}
    for run in ("rl", "evaluate/after/set"):
        (folder / str(num_tokens) / run).mkdir(parents=True)
    append_jsonl(folder / str(num_tokens) / "rl/samples.jsonl", [row] * 4)
    append_jsonl(folder / str(num_tokens) / "rl/metrics.jsonl", [{"step": step, "reward": 0.5} for step in (1, 2)])
    with Scorer(RewardConfig(num_workers=1)) as scorer:
        tasks = {name: scorer.task(PROMPT, replace(sample, text=text)) for name, text in texts(num_tokens).items()}
    return {
        f"a reply of {len(raw) / num_tokens:.0f} bytes a token is read": lambda: samples_of(
            raw, server, request, 0, template.tokenizer, 1 << 20
        ),
        "the task of a grader is written": lambda: json.dumps(Scorer.task(scorer, PROMPT, sample)),
        **{f"graded, penalties too: {name}": lambda task=task: list(grade_task(task)) for name, task in tasks.items()},
        "words of reasoning are counted": lambda: reasoning.count(sample.text),
        "its line in samples.jsonl": lambda: append_jsonl(folder / "samples", [sample_row(group, sample)]),
        "into the bank": lambda: bank.step(1, "w").add("q", request.token_ids, 0, [sample]),
        "out of the bank": lambda: bank.step(0, "w").find(request.token_ids, 0, 1),
        "packed": lambda: pack(sequences_of([group]), max_tokens=1 << 20),
        "a line of an evaluation, written and read": lambda: (
            append_jsonl(folder / f"row_{num_tokens}", [response_row(question, 0, graded(sample))]),
            read_jsonl(folder / f"row_{num_tokens}", dict[str, Any]),
        ),
        "the end of its thinking is looked for (scaling)": lambda: _thinking(sample, template, "</think>"),
        "cut at half and decoded (scaling)": lambda: template.tokenizer.decode(ids[: num_tokens // 2]),
        "turned into tokens": lambda: template.ids(sample.text),
        "the report of four such": lambda: write_report(folder / str(num_tokens)),
    }  # fmt: skip


def measured(stage: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds and bytes, in a forked process."""

    def run() -> None:
        before = psutil.Process().memory_info().rss
        began = time.process_time()
        stage()
        took = time.process_time() - began
        pipe[1].send((took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))

    context = multiprocessing.get_context("fork")
    pipe = context.Pipe(duplex=False)
    process = context.Process(target=run)
    process.start()
    pipe[1].close()
    result = pipe[0].recv()
    process.join()
    return result


def main() -> None:
    warm_up()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_tokenizer(folder / "tokenizer")
        template = Template(folder / "tokenizer")
        found = {size: stages(size, folder, template) for size in SIZES}
        print("| stage | CPU ms at 16k | at 128k | ratio | MB at 128k |\n|---|---|---|---|---|")
        for (title, small), large in zip(found[SIZES[0]].items(), found[SIZES[1]].values(), strict=True):
            (short_s, _), (long_s, peak) = measured(small), measured(large)
            ratio = f"{long_s / short_s:.1f}" if short_s >= 0.001 else ""
            print(f"| {title} | {1000 * short_s:.1f} | {1000 * long_s:.0f} | {ratio} | {peak / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
