"""The job behind `t1 synthesize`: questions through the stages, many at a time, and the files at the end.

    out/sft.jsonl        what `t1 sft` reads: {"id", "messages", "response", "answer"}
    out/chains.jsonl     every question with its attempts, critiques, drafts, and the reason when it was left out
    out/summary.json     yield and cost by stage
    out/browse.html      a sample to read
    out/store.sqlite     every reply; the same command again asks only for what is missing

All but the store depend on the questions, prompts, config and replies alone: after a kill and a second run they are the
same. Memory does not grow with the number of questions.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_t1.data.prompts import Question
from megatron_t1.data.sets import load_set
from megatron_t1.data.template import Template, opened_thinking
from megatron_t1.files import write_json, write_jsonl
from megatron_t1.push.sync import serve_folder
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.chat_endpoint import ChatEndpoint, NoAnswerError, run_workers
from megatron_t1.rollout.config import EndpointConfig
from megatron_t1.servers.servers import Servers
from megatron_t1.synthesize import browse, prompts
from megatron_t1.synthesize.chain import Outcome, Workshop
from megatron_t1.synthesize.config import SynthesizeConfig
from megatron_t1.synthesize.filters import NO_CORRECTION
from megatron_t1.synthesize.store import Store
from megatron_t1.weights.folder_digest import weights_digest

STAGES = (*prompts.STAGES, "filter")


def synthesize(cfg: SynthesizeConfig) -> dict[str, Any]:
    """Make the chains; returns the summary.

    Raises:
        ValueError: bad questions, prompts, keys or config, before anything is asked.
        EndpointError: an endpoint can't be used, or many questions in a row, or all, got no answer. What came is kept.
    """
    out = Path(cfg.out)
    questions = load_set(cfg.questions, seed=cfg.seed, instruction=cfg.instruction)
    loaded = prompts.load(Path(cfg.prompts) if cfg.prompts else None)
    endpoints = {name: ChatEndpoint(config) for name, config in cfg.endpoints.items()}
    identities: dict[str, Any] = {n: [config.model, config.extra_body] for n, config in cfg.endpoints.items()}
    opened = {}
    with ExitStack() as stack:
        store = stack.enter_context(Store(out / "store.sqlite"))
        if cfg.model:
            template = Template(Path(cfg.model))
            identities["model"] = [weights_digest(Path(cfg.model)), template.tokenizer.chat_template]
            asked = template.prompt_ids([{"role": "user", "content": "?"}])
            opened["model"] = opened_thinking(template.tokenizer, asked)
            servers = stack.enter_context(Servers(cfg.rollout, cfg.model, out / "servers")).start()
            serve_folder(servers)
            served = EndpointConfig(urls=tuple(server.url for server in servers.usable()))
            endpoints = {"model": ChatEndpoint(served, servers.all[0].key, direct=True), **endpoints}
        scorer = stack.enter_context(Scorer(cfg.reward))
        try:
            asyncio.run(_run(Workshop(cfg, loaded, endpoints, identities, scorer, store, opened), questions))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"every reply so far is kept in {out / 'store.sqlite'}; the same command goes on from there"
            ) from None
        summary = _summarize(store.outcomes(), len(questions), rewrite=cfg.rewrite)
        write_jsonl(out / "chains.jsonl", store.outcomes())
        write_jsonl(out / "sft.jsonl", (_sft_row(row) for row in store.outcomes() if row["dropped"] is None))
        write_json(out / "summary.json", summary)
        browse.write(out / "browse.html", store.outcomes(), summary, cfg.num_browse)
    return summary


async def _run(workshop: Workshop, questions: list[Question]) -> None:
    cfg = workshop.cfg
    failures_in_a_row, most_failures = 0, min(cfg.max_failures_in_a_row, len(questions))
    totals: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        for endpoint in workshop.endpoints.values():
            await stack.enter_async_context(endpoint)
        waiting = iter(enumerate(questions))
        bar = stack.enter_context(tqdm(total=len(questions), desc="synthesize", unit=" question"))

        async def work() -> None:
            nonlocal failures_in_a_row
            for number, question in waiting:  # all workers share one iterator
                try:
                    row = (await workshop.make(question)).row()
                    failures_in_a_row = 0
                except NoAnswerError as error:
                    failures_in_a_row += 1
                    if failures_in_a_row >= most_failures:
                        raise NoAnswerError(
                            f"{failures_in_a_row} of {len(questions)} questions got no answer, one after the other; "
                            f"the last error: {error}\nWhat came is kept: the same command goes on"
                        ) from None
                    row = _failed_row(question, str(error))
                workshop.store.finish(number, row)
                totals["kept"] += row["dropped"] is None
                totals["tokens"] += sum(n for name, n in row["costs"].items() if name.endswith("/tokens"))
                rate = totals["tokens"] / max(1e-9, bar.format_dict["elapsed"])
                bar.set_postfix_str(f"{totals['kept']} kept, {rate:,.0f} tokens/s", refresh=False)
                bar.update()

        await run_workers(min(cfg.questions_in_flight, len(questions)), work)
        for name, endpoint in workshop.endpoints.items():
            said = ", ".join(f"{count} {event}" for event, count in endpoint.events.most_common())
            bar.write(f"{name}: {said or 'nothing was asked, all replies were stored'}")


def _failed_row(question: Question, reason: str) -> dict[str, Any]:
    """A question that an endpoint left without an answer; the next run asks again."""
    return Outcome(question=question, dropped=f"failed: {reason}").row()


def _sft_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "messages": row["messages"],
        "response": row["response"],
        "answer": row["gold"],
        "pass_rate": row["num_right"] / row["num_attempts"],
        "num_wrong": sum(not attempt["correct"] for attempt in row["attempts"]),
    }


def _summarize(rows: Iterable[dict[str, Any]], num_questions: int, *, rewrite: bool) -> dict[str, Any]:
    """Yield (how many questions began each stage, why they were left out) and cost by stage."""
    reached, dropped, costs = Counter[str](), Counter[str](), Counter[str]()
    num_kept, num_corrects = 0, 0
    for row in rows:
        num_corrects += row["corrects"]
        reached.update(name for name in STAGES[: STAGES.index(row["reached"]) + 1] if rewrite or name != "rewrite")
        if row["dropped"] is None:
            num_kept += 1
        else:
            reason = row["dropped"]
            dropped["failed: no answer from an endpoint" if reason.startswith("failed: ") else reason] += 1
        costs.update(row["costs"])

    def cost(stage: str) -> dict[str, Any]:
        counts = {name: costs[f"{stage}/{name}"] for name in ("requests", "prompt_tokens", "tokens")}
        return {**counts, "price": round(float(costs[f"{stage}/price"]), 6)}

    return {
        "num_questions": num_questions,
        "num_kept": num_kept,
        "share_with_correction": num_corrects / max(1, num_kept + dropped[NO_CORRECTION]),
        "reached": {stage: reached[stage] for stage in STAGES if rewrite or stage != "rewrite"},
        "dropped": dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0]))),
        "cost": {stage: cost(stage) for stage in prompts.STAGES},
        "price": round(sum(float(costs[f"{stage}/price"]) for stage in prompts.STAGES), 6),
    }


def describe(summary: dict[str, Any]) -> str:
    """The summary as lines for a terminal."""
    lines = [
        f"{summary['num_kept']} chains of {summary['num_questions']} questions; of the finished ones "
        f"{100 * summary['share_with_correction']:.1f}% hold a failure and its correction"
    ]
    for stage, count in summary["reached"].items():
        cost = summary["cost"].get(stage)
        spent = f", {cost['requests']:,} requests, {cost['tokens']:,} tokens, price {cost['price']:g}" if cost else ""
        lines.append(f"  {stage}: {count:,} questions{spent}")
    lines += [f"  left out: {count:,} {reason}" for reason, count in summary["dropped"].items()]
    return "\n".join(lines)
