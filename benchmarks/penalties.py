"""How many honest texts, and how many samples of a model, the penalties hit: the table of penalties.md.

    python -m benchmarks.penalties MODEL --texts FILE.jsonl ... --questions FILE.jsonl --temperatures 0.7 1.0 1.2

MODEL is a Hugging Face folder, run by transformers. `--texts` are honest responses ("prediction" or "response", and
"question"), a row a file, that MODEL only scores, at temperature 1, as far as its context goes: an upper bound, because
a policy expects its own words more than another's. `--questions` ("problem" or "prompt") are answered by MODEL itself
at every temperature.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_t1.data.template import Template
from megatron_t1.reward.penalties import PenaltyConfig, Response, find_penalties, mean_and_worst_nll

CONFIG = PenaltyConfig()
MIN_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, nargs="*", default=[])
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--num_questions", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.7, 1.0, 1.2])
    parser.add_argument("--max_new_tokens", type=int, default=512)
    args = parser.parse_args()
    template, model = Template(args.model), AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    print(
        "| texts | number | tokens | nats a token: median, 99%, most | worst window: the same | perplexity | others |"
    )
    print("|---|---|---|---|---|---|---|")
    with torch.no_grad():
        for path in args.texts:
            show(path.stem, list(scored(model, template, rows(path))))
        if args.questions:
            asked = rows(args.questions)[: args.num_questions]
            for temperature in args.temperatures:
                own = sampled(model, template, asked, temperature, args.max_new_tokens)
                show(f"its own at {temperature}", list(own))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def asked_in(row: dict[str, Any]) -> str:
    return str(row.get("question") or row.get("problem") or row.get("prompt") or "Solve the problem.")


def scored(model: Any, template: Template, found: list[dict[str, Any]]) -> Iterator[tuple[Response, int]]:
    context = model.config.max_position_embeddings
    for row in found:
        text = str(row.get("prediction") or row.get("response") or "")
        question = template.prompt_ids([{"role": "user", "content": asked_in(row)}])
        answer = template.ids(text)[: context - len(question)]
        if len(answer) >= MIN_TOKENS:
            logits = model(torch.tensor(np.r_[question, answer][None])).logits[0, len(question) - 1 : -1]
            yield response(text, asked_in(row), logits, torch.tensor(answer)), len(answer)


def sampled(
    model: Any, template: Template, asked: list[dict[str, Any]], temperature: float, max_new_tokens: int
) -> Iterator[tuple[Response, int]]:
    torch.manual_seed(0)
    for row in asked:
        question = asked_in(row)
        ids = torch.tensor(template.prompt_ids([{"role": "user", "content": question}])[None]).repeat(16, 1)
        drawn = model.generate(
            ids, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
            output_logits=True, return_dict_in_generate=True, attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        for sample, logits in zip(drawn.sequences[:, ids.shape[1] :], torch.stack(drawn.logits, 1), strict=True):
            ends = (sample == template.eos_token_id).nonzero()
            length = int(ends[0]) + 1 if len(ends) else len(sample)
            text = template.tokenizer.decode(sample[:length], skip_special_tokens=True)
            yield response(text, question, logits[:length] / temperature, sample[:length]), length


def response(text: str, question: str | None, logits: torch.Tensor, tokens: torch.Tensor) -> Response:
    logprobs = torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None])[:, 0].numpy()
    return Response(text=text, prompt=question, nll=mean_and_worst_nll(logprobs, CONFIG.nll_window))


def show(name: str, found: list[tuple[Response, int]]) -> None:
    hits = Counter(hit for one, _ in found for hit in find_penalties(CONFIG, one))
    nll = np.array([one.nll for one, _ in found])
    quantiles = [", ".join(f"{value:.2f}" for value in np.percentile(each, [50, 99, 100])) for each in nll.T]
    others = ", ".join(f"{kind} {count}" for kind, count in hits.items() if kind != "perplexity")
    cells = [name, len(found), round(np.mean([length for _, length in found])), *quantiles, hits["perplexity"], others]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
