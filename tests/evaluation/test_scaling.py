"""Inference scaling against a real vLLM server and the real grader."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_t1.asking import run_scaling
from megatron_t1.config import Config
from megatron_t1.data.config import DataConfig
from megatron_t1.data.prompts import Question
from megatron_t1.data.template import Template
from megatron_t1.engine.config import ModelConfig
from megatron_t1.evaluation.config import ScalingConfig
from megatron_t1.evaluation.scaling import Scaling, _thinking
from megatron_t1.rank0 import Rank0
from megatron_t1.reward.config import RewardConfig
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import EndpointConfig, SamplingConfig
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.server import ServerError
from megatron_t1.servers.servers import Servers
from megatron_t1.types import Prompt, Sample
from tests.scripted import ScriptedEndpoint, serving
from tests.tiny import make_tiny_tokenizer

QUESTIONS = [Question(id=f"q{i}", messages=[{"role": "user", "content": f"{i}+7?"}], gold="7") for i in range(4)]
# The answer is in the opening: exactly what was forced is right. A random model ends no thinking by itself.
CFG = ScalingConfig(
    budgets=(16, 200, 300, 420),
    sampling=SamplingConfig(temperature=1.2, num_samples=2, max_new_tokens=380),
    answer_opening="</think>\\boxed{7}",
    max_answer_tokens=2,
)


class CountingClient:
    """The real client; it remembers the prompts, and Ctrl-C comes once `max_results` results came."""

    def __init__(self, client: RolloutClient, max_results: int = 999) -> None:
        self.client, self.max_results = client, max_results
        self.prompts: list[Prompt] = []

    def generate_each(self, prompts: Sequence[Prompt], *more: Any) -> None:
        self.prompts += prompts
        *asked, on_done = more
        results = 0

        def limited(*result: Any) -> None:
            nonlocal results
            results += 1
            if results <= self.max_results:
                on_done(*result)
            elif results == self.max_results + 1:  # once: a second would cut the first
                os.kill(os.getpid(), signal.SIGINT)  # this is the client's thread: the main one gets it

        self.client.generate_each(prompts, *asked, limited)


@pytest.fixture(scope="module")
def template(tiny_dir: Path) -> Template:
    return Template(tiny_dir)


@pytest.fixture(scope="module")
def real(server: Servers, template: Template) -> Iterator[Rank0]:
    with Scorer(RewardConfig()) as scorer, RolloutClient(server, template.tokenizer, vocab_size=320) as client:
        yield Rank0(server, client, scorer)


def counting(real: Rank0, max_results: int = 999) -> Any:
    return Rank0(real.servers, CountingClient(real.client, max_results), real.scorer)  # type: ignore[arg-type]


def measure(cfg: ScalingConfig, rank0: Rank0, template: Template, folder: Path, **options: Any) -> Scaling:
    curve = Scaling(cfg, QUESTIONS, folder, {"weights": "abc"}, 3, **options)
    curve.think(rank0, template)
    curve.answer(rank0, template, template)
    curve.curve()
    return curve


def cached_tokens(server: Servers) -> tuple[float, float]:
    """(prompt tokens found in the prefix cache, prompt tokens looked up) of the server so far."""
    with urllib.request.urlopen(server.all[0].url + "/metrics", timeout=30) as reply:
        text = reply.read().decode()
    found = re.findall(r"^vllm:prefix_cache_(hits|queries)_total\S* (\S+)$", text, re.M)
    hits, queries = (sum(float(value) for kind, value in found if kind == name) for name in ("hits", "queries"))
    return hits, queries


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_cut_is_forced_from_its_very_tokens(real: Rank0, template: Template, tmp_path: Path) -> None:
    rank0 = counting(real)
    before = cached_tokens(real.servers)
    measure(CFG, rank0, template, tmp_path)
    hits, queries = (after - then for after, then in zip(cached_tokens(real.servers), before, strict=True))
    assert hits / queries > 0.5, "the thinking was computed again"
    thinkings = rows(tmp_path / "thinkings.jsonl")
    points = json.loads((tmp_path / "points.json").read_text())
    assert [point["budget"] for point in points] == [16, 200, 300, 420]
    assert {point["set"] for point in points} == {"held-out questions"}
    assert [point["accuracy"] for point in points] == [point["share_forced"] for point in points]
    assert points[0]["share_forced"] == 1
    used = [point["mean_thinking_tokens"] for point in points]
    assert used[0] == 16
    assert used == sorted(used)
    assert used[-1] <= 380
    asked = [prompt.token_ids.tolist() for prompt in rank0.client.prompts[4:]]  # after the four thinkings
    longest = max(thinkings, key=lambda row: (not row["ended"], row["thinking_tokens"]))
    start = next(q for q in QUESTIONS if q.id == longest["id"]).prompt(template).token_ids.tolist()
    opening = template.ids(CFG.answer_opening).tolist()
    for budget in CFG.budgets:
        assert [*start, *longest["token_ids"][:budget], *opening] in asked
    assert len(asked) == len(rows(tmp_path / "forced.jsonl"))


@pytest.mark.parametrize("results", [3, 7])
def test_a_cut_measurement_resumes_to_the_files_of_an_uncut_one(
    results: int, real: Rank0, template: Template, tmp_path: Path
) -> None:
    """Cut while thinking (4 groups in all) and while answering; nothing that was finished is asked again."""
    measure(CFG, real, template, tmp_path / "whole")
    curve = Scaling(CFG, QUESTIONS, tmp_path / "cut", {"weights": "abc"}, 3)
    cut = counting(real, results if results < 4 else 99)
    with pytest.raises(KeyboardInterrupt, match="are kept in"):  # noqa: PT012
        curve.think(cut, template)
        curve.answer(counting(real, results), template, template)
    finished = {path.name: len(rows(path)) for path in (tmp_path / "cut").glob("*.jsonl")}
    again = counting(real)
    measure(CFG, again, template, tmp_path / "cut", resume=True)
    for name in ("thinkings.jsonl", "forced.jsonl", "points.json", "majority.json", "settings.json"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    missing = len(rows(tmp_path / "whole/forced.jsonl")) - finished.get("forced.jsonl", 0)
    groups = 4 - finished.get("thinkings.part.jsonl", 0) // 2 if results < 4 else 0
    assert len(again.client.prompts) == groups + missing
    more = counting(real)
    measure(replace(CFG, budgets=(16, 48, 200, 300, 420)), more, template, tmp_path / "cut", resume=True)
    new = sum(row["thinking_tokens"] > 48 or not row["ended"] for row in rows(tmp_path / "cut/thinkings.jsonl"))
    assert len(more.client.prompts) == new > 0, "only the cuts of the new budget"
    with pytest.raises(ValueError, match="other max_answer_tokens"):
        measure(replace(CFG, max_answer_tokens=3), real, template, tmp_path / "cut", resume=True)


def test_a_curve_does_not_go_on_with_another_chat_template(tiny_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "q", "prompt": "1+7?", "answer": "8"}) + "\n")
    (tmp_path / "key").write_text("k")
    (tmp_path / "key").chmod(0o600)
    cfg = Config(
        run_dir=str(tmp_path / "run"),
        resume=True,
        model=ModelConfig(hf_path=str(model)),
        data=DataConfig(heldout=str(tmp_path / "q.jsonl")),
        scaling=CFG,
        rollout=RolloutConfig(urls=("http://127.0.0.1:9",), key_file=str(tmp_path / "key"), startup_timeout_s=0.1),
    )
    for _ in range(2):
        with pytest.raises(ServerError, match="was not healthy"):  # the folder is made, nobody is there to be asked
            run_scaling(cfg, "x")
    path = model / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    with pytest.raises(ValueError, match="holds results with other answer_prompts, prompts: give another --label"):
        run_scaling(cfg, "x")


def test_another_models_answer_gets_the_cut_as_text(real: Rank0, template: Template, tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path / "other")
    other = Template(tmp_path / "other")
    short = replace(CFG, budgets=(16,), sampling=replace(CFG.sampling, max_new_tokens=40))
    curve = Scaling(short, QUESTIONS, tmp_path / "curve", {}, 3)
    curve.think(real, template)
    rank0 = counting(real)
    curve.answer(rank0, other, template)
    thinking = rows(tmp_path / "curve/thinkings.jsonl")[0]
    cut = template.tokenizer.decode(thinking["token_ids"][:16], skip_special_tokens=True)
    asked = [prompt.token_ids.tolist() for prompt in rank0.client.prompts]
    assert [*QUESTIONS[0].prompt(other).token_ids, *other.ids(cut + CFG.answer_opening)] in asked


def test_a_summary_model_answers_beside_the_forced_box(real: Rank0, template: Template, tmp_path: Path) -> None:
    """A scripted endpoint sees question and cut, and answers right from 24 bytes of thinking on; the policy itself may
    be asked too. Added to a curve that is there, without thinking anew."""
    short = replace(CFG, budgets=(8, 48), num_samples={"x": 1}, set="x.jsonl")
    measure(short, real, template, tmp_path)
    thinkings = {(row["id"], row["sample"]): row for row in rows(tmp_path / "thinkings.jsonl")}
    seen: list[tuple[str, str]] = []

    def summarizer(body: dict[str, Any]) -> str:
        question, thinking = re.fullmatch(r"(?s)Q (.*?)\nT (.*)", body["messages"][0]["content"]).groups()
        seen.append((question, thinking))
        return r"So \boxed{7}" if len(template.ids(thinking)) > 24 else r"\boxed{8}"

    with serving(ScriptedEndpoint(summarizer)) as scripted:
        own = replace(
            short,
            summary=True,
            summary_prompt="Q {question}\nT {thinking}",
            summary_endpoint=EndpointConfig(urls=(scripted.url,)),
        )
        measure(own, real, template, tmp_path, resume=True)
        measure(own, real, template, tmp_path, resume=True)  # asks nobody
    answers = rows(tmp_path / "summaries.jsonl")
    assert len(thinkings) == 4  # one a question, as the set says
    assert len(seen) == len(answers) == len(rows(tmp_path / "forced.jsonl"))
    cut = thinkings["q0", 0]["token_ids"][:8]
    assert ("0+7?", template.tokenizer.decode(cut, skip_special_tokens=True)) in seen
    assert {row["correct"] for row in answers if row["budget"] == 8} == {False}
    assert {row["correct"] for row in answers if row["budget"] == 48} == {True}
    low, high = json.loads((tmp_path / "summary_points.json").read_text())
    assert (low["accuracy"], high["accuracy"]) == (0, high["share_forced"])
    with pytest.raises(ValueError, match="other extra_body, model, prompt"):
        measure(replace(short, summary=True), real, template, tmp_path, resume=True)
    policy = replace(
        short, summary=True, summary_sampling=SamplingConfig(temperature=0, num_samples=1, max_new_tokens=4)
    )
    measure(policy, real, template, tmp_path / "policy")
    assert len(rows(tmp_path / "policy/summaries.jsonl")) == len(rows(tmp_path / "policy/forced.jsonl"))


def test_a_summary_endpoint_that_refuses_makes_no_curve(
    real: Rank0, template: Template, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = replace(CFG, budgets=(8, 48), sampling=replace(CFG.sampling, max_new_tokens=60))
    measure(short, real, template, tmp_path)
    asked: list[str] = []

    def summarize(text: str) -> None:
        def answer(_: dict[str, Any]) -> str:
            asked.append(text)
            return text if len(asked) % 4 else "REFUSE"

        with serving(ScriptedEndpoint(answer)) as scripted:
            own = replace(short, summary=True, summary_endpoint=EndpointConfig(urls=(scripted.url,)))
            measure(own, real, template, tmp_path, resume=True)

    cuts = len(rows(tmp_path / "forced.jsonl"))
    with pytest.raises(ValueError, match=rf"summarize .*: {cuts} of {cuts} requests were refused, one of them: .*400"):
        summarize("REFUSE")
    summarize(r"\boxed{7}")
    assert len(asked) == 2 * cuts, "the refused ones are asked again"
    refused = sum(number % 4 == 0 for number in range(cuts + 1, 2 * cuts + 1))
    assert f": {refused} of {cuts} requests were refused, one of them: refused: 400" in capsys.readouterr().err
    assert sum(not row["correct"] for row in rows(tmp_path / "summaries.jsonl")) == refused


def test_majority_of_full_responses_stands_beside_the_curve(real: Rank0, template: Template, tmp_path: Path) -> None:
    measure(CFG, real, template, tmp_path)
    majority = json.loads((tmp_path / "majority.json").read_text())
    assert [point["num_samples"] for point in majority] == [1, 2]
    assert majority[1]["mean_tokens"] == 2 * majority[0]["mean_tokens"]


def test_thinking_tokens_are_counted_to_the_end_mark(template: Template) -> None:
    def counted(text: str, finish: str = "stop") -> tuple[int, bool]:
        ids = template.ids(text)  # one token a byte
        sample = Sample(
            token_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            text=template.tokenizer.decode(ids, skip_special_tokens=True),
            finish_reason=finish,
            weight_versions=(),
            server="",
        )
        return _thinking(sample, template, "</think>")

    assert counted("abc</think>\\boxed{7}") == (len("abc</think>"), True)
    assert counted("abcdef") == (6, True)
    assert counted("abcdef", "length") == (6, False)
    assert counted("a</think>b", "length") == (len("a</think>"), True)
    # As the grader reads: after the last one, and nothing while another thinking is open.
    assert counted("<think>a</think>b</think>\\boxed{2}") == (len("<think>a</think>b</think>"), True)
    assert counted("a</think>b</thinking>\\boxed{2}") == (len("a</think>b</thinking>"), True)
    assert counted("a</think>\\boxed{2}<think>b") == (len("a</think>\\boxed{2}<think>b"), True)
    assert counted("a</think>\\boxed{2}<think>b", "length") == (len("a</think>\\boxed{2}<think>b"), False)
