"""T1's inference scaling: accuracy against the thinking budget, from one long thinking a question and sample.

    think:  what thinkings.jsonl lacks is generated, token ids kept
    answer: every thinking is cut at every budget, the answer forced from the cut by closing the thinking and opening
            the answer; the server continues from those very tokens, which its prefix cache still holds. Beside it, when
            asked for, a model writes the answer from question and cut: the paper's instrument, which may reason on
    curve:  accuracy against the mean thinking tokens that were used, and the majority of n full responses beside it

Nothing is generated twice, on resume neither, and budgets may be added later. A thinking that ended within the budget
keeps its own answer; one that the length limit cut has none and is forced at every budget.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from megatron_t1.data.config import set_name
from megatron_t1.data.prompts import Question
from megatron_t1.data.template import Template, opened_thinking
from megatron_t1.evaluation import stats
from megatron_t1.evaluation.config import ScalingConfig
from megatron_t1.evaluation.evaluate import missing, questions_digest, response_row
from megatron_t1.evaluation.figures import majority_interval, vote
from megatron_t1.evaluation.resume import ResponseRow, check_settings, collecting, open_folder
from megatron_t1.evaluation.samplers import Ask, EndpointSampler, Response, Sampler, ServerSampler, graded, sample_seed
from megatron_t1.files import iter_jsonl, sort_jsonl, write_json
from megatron_t1.rank0 import Rank0
from megatron_t1.reward.answers import extract
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.types import Prompt, Reward, Sample
from megatron_t1.warn import warn

_WINDOW = 1024
"""Cuts asked for at a time: each carries the whole thinking before it."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Accuracy when thinking may take at most `budget` tokens."""

    set: str
    """Name of the questions' set."""
    budget: int
    mean_thinking_tokens: float
    """What was really used, thinkings that ended early included."""
    accuracy: float
    interval: tuple[float, float]
    share_forced: float
    """Responses whose thinking was cut."""


@dataclass(frozen=True, kw_only=True)
class MajorityPoint:
    """Accuracy of the most frequent answer of n full responses."""

    num_samples: int
    mean_tokens: float
    """Of n responses together."""
    accuracy: float
    interval: tuple[float, float]


class _Thinking(ResponseRow):
    thinking_tokens: int
    ended: bool
    token_ids: list[int]


class _Answer(TypedDict):
    id: str
    sample: int
    budget: int
    correct: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class _ToSummarize(Question):
    """A question and a cut thinking in one message; its answers are graded as the question's."""

    question: Question

    @property
    def text(self) -> str:
        return self.question.text


class _Cut(NamedTuple):
    row: dict[str, Any]
    """The thinking, as stored."""
    budget: int


class Scaling:
    """One curve: `think`, then `answer`, then `curve`; each goes on where a killed one stopped."""

    def __init__(
        self,
        cfg: ScalingConfig,
        questions: Sequence[Question],
        folder: Path,
        settings: dict[str, Any],
        seed: int,
        *,
        resume: bool = False,
        replace_other: bool = False,
    ) -> None:
        """
        Args:
            folder: run_dir/scaling/<label>.
            settings: what decides the responses beside the config, seed and questions: weights, prompts, the grader.

        Raises:
            ValueError: the folder holds another curve, or this one and `resume` is not given.
        """
        cfg = replace(cfg, sampling=cfg.sampling_of_set())
        self.cfg, self.questions, self.folder, self.seed = cfg, questions, folder, seed
        own = {name: getattr(cfg, name) for name in ("end_of_thinking", "answer_opening", "max_answer_tokens")}
        own["sampling"] = cfg.sampling.identity()
        settings = {**settings, **own, "seed": seed, "questions": questions_digest(questions)}
        open_folder(folder, settings, resume=resume, replace_other=replace_other)
        self._place = {question.id: i for i, question in enumerate(questions)}

    def think(self, rank0: Rank0, template: Template) -> None:
        """Generate the long thinkings that are not there yet; token ids and verdicts go to thinkings.jsonl."""
        path, part = self.folder / "thinkings.jsonl", self.folder / "thinkings.part.jsonl"
        if path.exists():
            return
        sampling = self.cfg.sampling
        have = {(row["id"], row["sample"]) for row in iter_jsonl(part, _Thinking)}
        asks = [ask for question in self.questions for ask in missing(question, sampling.num_samples, have)]

        def row(question: Question, number: int, sample: Sample) -> dict[str, Any]:
            used, ended = _thinking(sample, template, self.cfg.end_of_thinking)
            own = {"thinking_tokens": used, "ended": ended, "token_ids": sample.token_ids.tolist()}
            return {**response_row(question, number, graded(sample)), **own}

        num_missing = sum(ask.count for ask in asks)
        name = f"think {self.folder.name}"
        with collecting(part, name, unit="thinking", num_kept=len(have), num_missing=num_missing) as add:
            rank0.client.generate_each(
                [ask.question.prompt(template) for ask in asks],
                [ask.count for ask in asks],
                [sample_seed(self.seed, ask.question.id) + ask.first for ask in asks],
                sampling,
                rank0.scorer.score,
                lambda i, j, samples: add(
                    [row(asks[i].question, asks[i].first + j + n, sample) for n, sample in enumerate(samples)],
                    sum(len(sample.token_ids) for sample in samples),
                ),
            )
        sort_jsonl(part, path, key=lambda row: (self._place[row["id"]], row["sample"]))
        part.unlink()

    def answer(self, rank0: Rank0, template: Template, thinker: Template) -> None:
        """Ask for the answers that are not there yet: forced ones, and the summaries when `cfg.summary` is set.

        Args:
            template: of the model that answers.
            thinker: of the model that thought; when it is another one, the cut travels as text.

        Raises:
            ValueError: the endpoint refused all that it was asked to summarize.
        """
        self._force(rank0, template, thinker)
        if self.cfg.summary:
            self._summarize(rank0, template, thinker)

    def _force(self, rank0: Rank0, template: Template, thinker: Template) -> None:
        path = self.folder / "forced.jsonl"
        cuts, num_kept = self._missing(path)
        asked = {question.id: question.prompt(template) for question in self.questions}
        opening, same = template.ids(self.cfg.answer_opening), template is thinker
        thought = asked if same else {question.id: question.prompt(thinker) for question in self.questions}
        sampling = SamplingConfig(temperature=0.0, num_samples=1, max_new_tokens=self.cfg.max_answer_tokens)

        def forced(cut: _Cut) -> Prompt:
            ids, prompt = cut.row["token_ids"][: cut.budget], asked[cut.row["id"]]
            opened = opened_thinking(thinker.tokenizer, thought[prompt.id].token_ids)
            before = opened + thinker.tokenizer.decode(ids, skip_special_tokens=True) + self.cfg.answer_opening
            tail = [ids, opening] if same else [template.ids(template.without_opening(before, prompt.token_ids))]
            return replace(prompt, token_ids=np.concatenate([prompt.token_ids, *tail]), meta={"before": before})

        async def score(prompt: Prompt, sample: Sample) -> Reward:
            return await rank0.scorer.score(prompt, replace(sample, text=prompt.meta["before"] + sample.text))

        name = f"answer {self.folder.name}"
        with collecting(path, name, unit="answer", num_kept=num_kept, num_missing=len(cuts)) as add:

            def force(window: list[_Cut]) -> None:
                rank0.client.generate_each(
                    [forced(cut) for cut in window],
                    [1] * len(window),
                    [0] * len(window),
                    sampling,
                    score,
                    lambda i, _, samples: add([_answer_row(window[i], graded(samples[0]))], len(samples[0].token_ids)),
                )

            for start in range(0, len(cuts), _WINDOW):
                force(cuts[start : start + _WINDOW])
        self._sort(path)

    def _summarize(self, rank0: Rank0, template: Template, thinker: Template) -> None:
        own, path = self.cfg, self.folder / "summaries.jsonl"
        endpoint = own.summary_endpoint
        who = {"model": endpoint.model, "extra_body": endpoint.extra_body} if endpoint.urls else {}
        settings = {"prompt": own.summary_prompt, "sampling": own.summary_sampling.identity(), **who}
        check_settings(self.folder / "summaries.json", settings, resume=True, elsewhere="another --label")
        sampler: Sampler = EndpointSampler(endpoint, rank0.scorer) if endpoint.urls else ServerSampler(rank0, template)
        cuts, num_kept = self._missing(path)
        asked = {question.id: question for question in self.questions}

        def ask(number: str, cut: _Cut) -> Ask:
            question = asked[cut.row["id"]]
            opened = opened_thinking(thinker.tokenizer, question.prompt(thinker).token_ids)
            thinking = opened + thinker.tokenizer.decode(cut.row["token_ids"][: cut.budget], skip_special_tokens=True)
            parts = {"{question}": question.text, "{thinking}": thinking}
            text = re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], own.summary_prompt)
            to_summarize = _ToSummarize(
                id=number,
                messages=[{"role": "user", "content": text}],
                gold=question.gold,
                mode=question.mode,
                choices=question.choices,
                question=question,
            )
            return Ask(to_summarize, 0, 1)

        name = f"summarize {self.folder.name}"
        with collecting(path, name, unit="answer", num_kept=num_kept, num_missing=len(cuts)) as add:
            for start in range(0, len(cuts), _WINDOW):
                window = {f"{cut.row['id']}/{cut.row['sample']}/{cut.budget}": cut for cut in cuts[start:][:_WINDOW]}

                def done(question: Question, _: int, responses: list[Response], window: Any = window) -> None:
                    add([_answer_row(window[question.id], responses[0])], responses[0].num_tokens)

                sampler.sample([ask(*item) for item in window.items()], own.summary_sampling, self.seed, done)
        reasons = [row["reason"] for row in iter_jsonl(path, _Answer)]
        if refused := [reason for reason in reasons if reason.startswith("refused: ")]:
            told = f"{name}: {len(refused)} of {len(reasons)} requests were refused, one of them: {refused[0]}"
            if len(refused) == len(reasons):
                path.unlink()  # what --resume asks again
                raise ValueError(told)
            warn(f"{told}; they count as wrong")
        self._sort(path)

    def _missing(self, path: Path) -> tuple[list[_Cut], int]:
        """The cuts whose answers are not in the file yet, and how many are."""
        have = {(row["id"], row["sample"], row["budget"]) for row in iter_jsonl(path, _Answer)}
        return [cut for cut in self._cuts() if (cut.row["id"], cut.row["sample"], cut.budget) not in have], len(have)

    def _sort(self, path: Path) -> None:
        sort_jsonl(path, path, key=lambda row: (self._place[row["id"]], row["sample"], row["budget"]))

    def curve(self) -> list[Point]:
        """Write points.json, summary_points.json and majority.json; returns the points of the forced answers."""
        thinkings = list(self._thinkings())
        points = self._points(thinkings, self.folder / "forced.jsonl")
        write_json(self.folder / "points.json", [asdict(point) for point in points])
        if self.cfg.summary:
            summarized = self._points(thinkings, self.folder / "summaries.jsonl")
            write_json(self.folder / "summary_points.json", [asdict(point) for point in summarized])
            for point in summarized:
                low, high = point.interval
                print(
                    f"budget {point.budget:>6}, summary: accuracy {point.accuracy:.3f} (95%: {low:.3f} to {high:.3f})"
                )
        write_json(self.folder / "majority.json", [asdict(point) for point in _majority(thinkings)])
        return points

    def _points(self, thinkings: Sequence[dict[str, Any]], answers: Path) -> list[Point]:
        forced = {(row["id"], row["sample"], row["budget"]): row["correct"] for row in iter_jsonl(answers, _Answer)}
        points = []
        for budget in self.cfg.budgets:
            correct: dict[str, list[bool]] = {}
            for row in thinkings:
                own = forced[row["id"], row["sample"], budget] if _is_cut(row, budget) else row["reward"]["correct"]
                correct.setdefault(row["id"], []).append(own)
            mean, low, high = stats.accuracy_interval(list(correct.values()))
            points.append(
                Point(
                    set=set_name(self.cfg.set) if self.cfg.set else "held-out questions",
                    budget=budget,
                    mean_thinking_tokens=float(np.mean([min(row["thinking_tokens"], budget) for row in thinkings])),
                    accuracy=mean,
                    interval=(low, high),
                    share_forced=float(np.mean([_is_cut(row, budget) for row in thinkings])),
                )
            )
        return points

    def _thinkings(self) -> Iterator[dict[str, Any]]:
        """Stored thinkings without their token ids."""
        for row in iter_jsonl(self.folder / "thinkings.jsonl", _Thinking):
            del row["token_ids"]
            yield row

    def _cuts(self) -> Iterator[_Cut]:
        """Every cut that needs a forced answer; those of one thinking follow each other: its prefix is still cached."""
        for row in iter_jsonl(self.folder / "thinkings.jsonl", _Thinking):
            del row["response"]  # all cuts are in memory at once
            row["token_ids"] = np.array(row["token_ids"], np.int32)
            yield from (_Cut(row, budget) for budget in self.cfg.budgets if _is_cut(row, budget))


def _is_cut(row: dict[str, Any], budget: int) -> bool:
    return bool(row["thinking_tokens"] > budget or not row["ended"])


def _answer_row(cut: _Cut, response: Response) -> dict[str, Any]:
    return {
        "id": cut.row["id"],
        "sample": cut.row["sample"],
        "budget": cut.budget,
        "answer": response.text,
        "extracted": response.reward.extracted,
        "correct": response.reward.correct,
        "reason": response.reward.reason,
    }


def _majority(thinkings: Sequence[dict[str, Any]]) -> Iterator[MajorityPoint]:
    answers: dict[str, list[str | None]] = {}
    for row in thinkings:
        answers.setdefault(row["id"], []).append(vote(row["reward"]))
    most = min(map(len, answers.values()))
    mean_tokens = float(np.mean([row["num_tokens"] for row in thinkings]))
    for n in islice((2**i for i in range(10) if 2**i <= most), 10):
        majority = majority_interval(answers, n)
        yield MajorityPoint(
            num_samples=n,
            mean_tokens=n * mean_tokens,
            accuracy=majority.value,
            interval=(majority.low, majority.high),
        )


def _thinking(sample: Sample, template: Template, end: str) -> tuple[int, bool]:
    """Tokens of the response up to the end of its thinking, and whether the model ended it (or the whole response).

    It ends where the grader begins to read: behind the last mark, if no thinking is opened after it.
    """
    decode = template.tokenizer.decode  # with special tokens, which the end of thinking may be
    mark = re.compile(f"{re.escape(end)}|{extract.THINK_CLOSE.pattern}", re.I)
    text = decode(sample.token_ids)
    count = len(mark.findall(text))
    if count == 0 or extract.after_thinking(text) is None:
        return len(sample.token_ids), sample.finish_reason == "stop"
    low, high = 0, len(sample.token_ids)
    while low < high:  # the smallest prefix whose text holds all marks
        middle = (low + high) // 2
        if len(mark.findall(decode(sample.token_ids[:middle]))) >= count:
            high = middle
        else:
            low = middle + 1
    return low, True
