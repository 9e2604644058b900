"""Synthesis with scripted endpoints: every stage, every reason to leave a question out, trouble, kill and resume."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_t1.data.config import DataConfig
from megatron_t1.data.prompts import load_questions, load_sft
from megatron_t1.data.template import Template
from megatron_t1.reward.config import RewardConfig
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout import chat_endpoint
from megatron_t1.rollout.chat_endpoint import ChatEndpoint, EndpointError
from megatron_t1.rollout.config import EndpointConfig
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.servers import Servers
from megatron_t1.synthesize import prompts
from megatron_t1.synthesize.chain import Outcome, Workshop
from megatron_t1.synthesize.config import FilterConfig, SynthesizeConfig
from megatron_t1.synthesize.filters import chain_is_unfit, corrects, question_is_unfit
from megatron_t1.synthesize.run import describe, synthesize
from megatron_t1.synthesize.store import Store
from megatron_t1.types import Reward
from tests.forks import environment
from tests.scripted import ScriptedEndpoint, serving

HOSTILE = "{{ 7*7 }}{% raw %}<script>alert(1)</script>"


def solver(body: dict[str, Any]) -> str:
    """Adds numbers: attempts are right at random by their seed; the other stages do what their prompts ask for."""
    text = body["messages"][-1]["content"]
    a, b = map(int, re.search(r"What is (\d+) \+ (\d+)", text).groups())
    rng = random.Random(body["seed"])
    kind = a % 10  # what goes wrong with this question
    if "A solution that somebody wrote" in text:
        right = "Its final answer is right" in text
        verdict = "right" if right != (kind == 3) else "wrong"
        return f"<think>{HOSTILE}</think>Line 1 is {'fine' if right else 'off by one'}.\nVerdict: {verdict}"
    if "Write one continuous train" in text:
        wrong = a + b + 1 if kind != 4 else a + b
        told = " The reference answer agrees." if kind == 5 else ""
        final = a + b if kind != 6 else a + b + 7
        return f"I try {wrong}. Wait, {wrong} - {b} is not {a}. So {a + b}.{told} {HOSTILE} \\boxed{{{final}}}"
    if "A draft of somebody's thinking" in text:
        draft = text.split("thinking about it:\n", 1)[1].split("\n\nRewrite the draft", 1)[0]
        return "Let me see. " + (draft if kind != 7 else draft.replace("\\boxed", "boxed"))
    if kind == 1:
        return f"\\boxed{{{a + b}}}"  # too easy
    if kind == 2:
        return f"\\boxed{{{a + b + 1}}}"  # all agree on another answer: the reference is wrong
    if kind == 8:
        return f"\\boxed{{{a + b + rng.randint(1, 99)}}}"  # too hard
    if kind == 9:
        return "REFUSE"
    return f"<think>{HOSTILE}</think>It is \\boxed{{{a + b + rng.choice([0, 0, 1, 2])}}}."


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = ({"id": f"q{i}", "prompt": f"What is {i} + {i * 3}?", "answer": str(4 * i)} for i in range(100, 160))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(questions: Path, out: Path, url: str, timeout_s: float = 300.0, **more: Any) -> SynthesizeConfig:
    endpoint = EndpointConfig(urls=(url,), timeout_s=timeout_s, price_in=1.0, price_out=10.0)
    given: dict[str, Any] = {"endpoints": {"big": endpoint}, "num_attempts": 6, **more}
    return SynthesizeConfig(questions=str(questions), out=str(out), reward=RewardConfig(num_workers=1), **given)


def files(out: Path) -> dict[str, str]:
    return {name: (out / name).read_text() for name in ("sft.jsonl", "chains.jsonl", "summary.json", "browse.html")}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_chains_come_out_and_every_reason_counts(questions: Path, tmp_path: Path, tiny_dir: Path) -> None:
    with serving(ScriptedEndpoint(solver)) as server:
        summary = synthesize(config(questions, tmp_path / "out", server.url))
    dropped = summary["dropped"]
    assert summary["num_kept"] + sum(dropped.values()) == 60
    assert dropped["noisy: the attempts agree on an answer that is not the reference"] == 6
    assert dropped["too hard: no attempt is right"] >= 6
    assert dropped["attempt: refused by big"] == 6
    assert dropped["the critic does not find the right attempt right"] >= 3
    assert dropped["gives the answer or the attempts away"] >= 3
    assert dropped["the chain's answer is not right"] >= 3
    assert dropped["the chain has no boxed answer"] >= 3
    assert dropped["too easy"] >= 6
    kept = rows(tmp_path / "out/sft.jsonl")
    assert len(kept) == summary["num_kept"] > 5
    assert summary["share_with_correction"] == 1
    for row in kept:
        number = int(row["id"][1:])
        assert number % 10 in (0, 4)
        assert row["messages"] == [{"role": "user", "content": f"What is {number} + {3 * number}?"}]
        assert row["response"].startswith("<think>\nLet me see. I try ")
        assert row["response"].endswith(f"</think>\n\nThe final answer is $\\boxed{{{4 * number}}}$.")
        assert HOSTILE in row["response"], "a model's text is never a template"
    chain = next(row for row in rows(tmp_path / "out/chains.jsonl") if row["id"] == kept[0]["id"])
    assert [attempt["correct"] for attempt in chain["attempts"]][-1] is True
    assert all("Verdict" in attempt["critique"] and "think" not in attempt["critique"] for attempt in chain["attempts"])
    assert len(load_sft(tmp_path / "out/sft.jsonl", Template(tiny_dir), DataConfig())) == len(kept)
    asked = summary["cost"]["attempt"]
    assert asked["requests"] == 360
    assert asked["price"] == pytest.approx((asked["prompt_tokens"] + 10 * asked["tokens"]) / 1e6)
    assert summary["price"] == pytest.approx(sum(cost["price"] for cost in summary["cost"].values()))
    assert "attempt: 60 questions, 360 requests" in describe(summary)
    page = (tmp_path / "out/browse.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_wrong_answer_is_one_in_every_spelling(tmp_path: Path) -> None:
    """All agree on it: the reference is wrong; and a chain tries no way twice."""
    spelled = [r"\frac{1}{2}", "0.5", r"\dfrac12", ".50"]
    verdict = Reward(value=0.0, correct=False, outcome="wrong", extracted=None, reason="")
    rewards = [replace(verdict, extracted=answer) for answer in (*spelled, "3")]
    assert (question_is_unfit(FilterConfig(), rewards, True) or "").startswith("noisy")
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"id": "q", "prompt": "What is 100 + 300?", "answer": "400"}) + "\n")

    def attempts(body: dict[str, Any]) -> str:
        if body["messages"][-1]["content"] != "What is 100 + 300?":
            return solver(body)
        answer = ["400", "0.5", r"\frac12", "7", ".5"][len(seen) % 5]
        seen.append(answer)
        return rf"\boxed{{{answer}}}" + "." * len(seen)

    seen: list[str] = []
    with serving(ScriptedEndpoint(attempts)) as server:
        synthesize(config(path, tmp_path / "out", server.url, num_attempts=5))
    (chain,) = rows(tmp_path / "out/chains.jsonl")
    used = [attempt["answer"] for attempt in chain["attempts"]]
    assert len(used) == 3
    assert {"7", "400"} < set(used)


@pytest.mark.parametrize(
    ("thinking", "wrong", "expected"),
    [
        ("3x = 12, hence x = 4.", ["5"], False),
        ("3x = 12, hence x = 4.", ["12", "3"], False),
        ("x^2 = 16 so x=4.", ["2"], False),
        ("No two are equal, no matter which we take, note that none is 3, nor 5.", ["3"], False),
        ("He has 16 - 3 = 13 eggs. He does not sell 9 of them, so 4.", ["13"], False),
        ("Tom must wait 10 minutes, got 5 wrong with 3 mistakes, and actually paid 4.", ["5"], False),
        ("How many are incorrect? Since 2 is not zero, divide by it: 4.", ["2"], False),
        ("x = 9? Wait, 3 times 9 is 27. So 4.", [None], True),
        ("Try 4: 36+9=45 mod 8=5, no. Try 7: 63+9=72 mod 8=0, yes.", [], True),
        ("So x = 5. But 3*5 = 15, not 12. So x = 4.", ["9", "5"], True),
        ("So x = 5. But 3*5 = 15, not 12. So x = 4.", ["9"], False),
        ("Maybe the answer is 7.5 cm, which is too large. Take 4.", ["7.5"], True),
        ("Try 9: 27 ≠ 12. Try 4: 12.", ["9"], True),
        ("Hence $\\frac{1}{2}$ is not a solution. Then 4.", ["\\frac{1}{2}"], True),
        ("I get 30. Hmm, that can't be right. So 4.", [], True),
        ("I made a sign error: x = 4.", [], True),
        ("Half of it is 6; I forgot the minus. x = 4.", [], True),
    ],
)
def test_a_chain_holds_a_failure_and_its_correction(thinking: str, wrong: list[str | None], expected: bool) -> None:
    assert corrects(f"<think>{thinking}</think>Wait, 5. \\boxed{{4}}", wrong) == expected


def test_trouble_changes_nothing_and_a_second_run_asks_nothing(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_endpoint, "_MAX_PAUSE_S", 0.2)
    with serving(ScriptedEndpoint(solver)) as server:
        synthesize(config(questions, tmp_path / "calm", server.url))
    with serving(ScriptedEndpoint(solver, trouble=0.3)) as server:
        synthesize(config(questions, tmp_path / "rough", server.url, timeout_s=5.0))
        assert sum(server.troubles.values()) > 100
        assert files(tmp_path / "rough") == files(tmp_path / "calm")
        before = server.served.total()
        synthesize(config(questions, tmp_path / "rough", server.url))
        assert server.served.total() == before
        edited = tmp_path / "prompts"
        edited.mkdir()
        text = (Path(prompts.__file__).parent / "prompts/rewrite.yaml").read_text()
        (edited / "rewrite.yaml").write_text(text.replace("Write nothing but", "Write only"))
        synthesize(config(questions, tmp_path / "rough", server.url, prompts=str(edited)))
        asked = [name for name, _ in server.served.most_common() if "Write only" in name]
        assert server.served.total() - before == len(asked) > 0, "only the edited stage is asked again"


def test_a_reply_of_a_served_model_is_of_its_chat_template(server: Servers, tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "q", "prompt": "1+1?", "answer": "2"}) + "\n")
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    rollout = RolloutConfig(
        urls=(server.all[0].url,), key_file=str(server.run_dir / "server_key"), device="cpu", transport="shm"
    )

    def num_replies() -> int:
        out = tmp_path / "out"
        given = {"endpoints": {}, "model": str(model), "rollout": rollout, "num_attempts": 2}
        synthesize(config(tmp_path / "q.jsonl", out, "http://unused", **given))
        with contextlib.closing(sqlite3.connect(out / "store.sqlite")) as store:
            return store.execute("SELECT count(*) FROM replies").fetchone()[0]

    first = num_replies()
    assert num_replies() == first > 0
    path = model / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    assert num_replies() > first
    server.all[0].introduce()  # another list pushed into it
    server.required_version = server.all[0].version


def test_a_template_that_opens_the_thinking_leaves_no_answer_in_it(tmp_path: Path) -> None:
    """R1's distillates and QwQ: their replies begin inside it, and a box in a thinking that was cut is no answer."""
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"id": "q", "prompt": "What is 100 + 300?", "answer": "400"}) + "\n")
    replies = [r"Maybe \boxed{400}. Wait", r"Or \boxed{9}. Wait", r"a</think>\boxed{400}", r"<think>b</think>\boxed{7}"]

    def attempts(body: dict[str, Any]) -> str:
        if body["messages"][-1]["content"] != "What is 100 + 300?":
            return "I see.</think>" + solver(body)
        asked.append(body)
        return replies[len(asked) % 4]

    asked: list[Any] = []
    cfg = config(path, tmp_path / "out", "http://unused", num_attempts=8)
    with (
        serving(ScriptedEndpoint(attempts)) as server,
        Store(tmp_path / "store.sqlite") as store,
        Scorer(cfg.reward) as scorer,
    ):

        async def make() -> Outcome:
            async with ChatEndpoint(EndpointConfig(urls=(server.url,))) as endpoint:
                given = ({"big": endpoint}, {"big": "m"}, scorer, store, {"big": "<think>\n"})
                return await Workshop(cfg, prompts.load(None), *given).make(load_questions(path)[0])

        outcome = asyncio.run(make())
    found = Counter((attempt.answer, attempt.thinking, attempt.outcome) for attempt in outcome.attempts)
    assert {(answer, outcome): count for (answer, _, outcome), count in found.items() if answer} == {
        ("400", "correct"): 2,
        ("7", "wrong"): 2,
    }
    assert sum(count for (_, _, outcome), count in found.items() if outcome == "no_answer") == 4
    assert {thinking.strip() for answer, thinking, _ in found if answer} == {"a", "b"}
    assert outcome.dropped is None


def test_several_models_attempt_in_turns_and_others_write(questions: Path, tmp_path: Path) -> None:
    with serving(ScriptedEndpoint(solver)) as one, serving(ScriptedEndpoint(solver)) as other:
        endpoints = {name: EndpointConfig(urls=(s.url,), model=name) for name, s in (("a", one), ("b", other))}
        cfg = config(questions, tmp_path / "out", "http://unused", endpoints=endpoints, critique_with="b")
        summary = synthesize(replace(cfg, integrate_with="a", rewrite_with="b"))
    assert one.served.total() == 180 + summary["cost"]["integrate"]["requests"]
    cost = summary["cost"]
    assert other.served.total() == 180 + cost["critique"]["requests"] + cost["rewrite"]["requests"]
    used = Counter(a["model"] for row in rows(tmp_path / "out/chains.jsonl") for a in row["attempts"])
    assert set(used) == {"a", "b"}


_KILLED = """
import sys, json
from pathlib import Path
from tests.synthesize.test_synthesize import config
from megatron_t1.synthesize.run import synthesize
synthesize(config(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], questions_in_flight=8))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_it_goes_on_to_the_same_files(
    how: signal.Signals, questions: Path, tmp_path: Path
) -> None:
    with serving(ScriptedEndpoint(solver, delay_s=0.05)) as server:
        synthesize(config(questions, tmp_path / "whole", server.url))
        server.served.clear()
        arguments = [sys.executable, "-c", _KILLED, str(questions), str(tmp_path / "cut"), server.url]
        process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True)
        while server.served.total() < 150 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(how)
        _, said = process.communicate(timeout=120)
        assert process.returncode != 0
        if how == signal.SIGINT:
            assert "every reply so far is kept in" in said
        before = Counter(server.served)
        assert not (tmp_path / "cut/sft.jsonl").exists()
        synthesize(config(questions, tmp_path / "cut", server.url))
        assert files(tmp_path / "cut") == files(tmp_path / "whole")
        again = {name for name, count in server.served.items() if count > 1}
        assert len(again) <= 8 * 6, "at most what was in flight at the kill is asked again"
        assert before.total() >= 150


def test_a_dead_endpoint_stops_the_run_and_a_wrong_key_at_once(questions: Path, tmp_path: Path) -> None:
    gone = EndpointConfig(urls=("http://127.0.0.1:9",), max_retries=0)
    cfg = config(questions, tmp_path / "out", "http://unused", endpoints={"gone": gone}, max_failures_in_a_row=5)
    with pytest.raises(EndpointError, match=r"^5 of 60 questions got no answer.*Cannot connect"):
        synthesize(cfg)
    few = replace(cfg, max_failures_in_a_row=61)
    with pytest.raises(EndpointError, match=r"^60 of 60 questions got no answer.*Cannot connect"):
        synthesize(few)
    assert not (tmp_path / "out/sft.jsonl").exists()
    with serving(ScriptedEndpoint(solver, key="secret")) as server:
        with pytest.raises(EndpointError, match="401"):
            synthesize(config(questions, tmp_path / "out", server.url))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("attempt.yaml", "messages: [{role: user, content: '{{ question '}]", "attempt.yaml"),
        ("critique.yaml", "messages: []\nexpect: {right: '('}", "critique.yaml"),
        ("integrate.yaml", "messages: []\nmax_token: 3", "unknown keys.*max_token"),
        ("atempt.yaml", "messages: []", "atempt.yaml.* are none of"),
        ("attempt.yaml", "messages: []", r"attempt.yaml: .*length >= 1 - at `\$.messages`"),
        ("rewrite.yaml", "messages: [{role: user, content: x}]\nstop: '###'", r"rewrite.yaml: .* at `\$.stop`"),
        ("rewrite.yaml", "messages: [{role: user, content: x}]\ntemperature: hot", r"rewrite.yaml: .* at `\$.temp"),
        ("rewrite.yaml", "messages: [{role: user, content: x}]\nmax_tokens: -5", r"rewrite.yaml: .* at `\$.max_tok"),
        ("rewrite.yaml", "messages: [{role: user, content: x}]\nexpect: abc", r"rewrite.yaml: .* at `\$.expect`"),
    ],
)
def test_bad_prompt_files_are_named_before_anything_is_asked(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        prompts.load(tmp_path)


def test_the_last_verdict_of_a_critique_counts() -> None:
    expect = prompts.load(None)["critique"].expect
    said = "I wanted to write 'Verdict: wrong', but every step holds.\nVerdict: **right**"
    assert expect["right"].search(said)
    assert not expect["wrong"].search(said)
    assert expect["wrong"].search("It is not so.\nverdict: Wrong.")


@pytest.mark.parametrize(
    ("question", "chain", "is_told"),
    [
        ("How many has the student?", "the student has 5. The critique says no, as the verifier told me.", True),
        ("How many has the student?", "the student has 5, so 5.", False),
        ("Each student must be in a team. How many are there?", "Say the student is in 2 teams. No: 1.", False),
        ("A checkers board has 8 rows.", "The checker moves one row.", False),
        ("Each student must be in a team. How many are there?", "The critic says 1, so 1.", True),
        ("Solve it.", "Of its roots the solution 5 satisfies the equation.", False),
        ("Mix two liquids.", "Mix solution 1 with water.", False),
        ("Solve it.", "Solution 2 goes wrong where it divides.", True),
        ("Solve it.", "As solution #2 says, 4.", True),
        ("Solve it.", "as attempt 3 says, 4.", True),
    ],
)
def test_what_only_a_reader_of_attempts_can_say_gives_a_chain_away(question: str, chain: str, is_told: bool) -> None:
    cfg, reward = FilterConfig(min_chars=1), Reward(value=1, correct=True, outcome="correct", extracted="4", reason="")
    assert (chain_is_unfit(cfg, chain, reward, question) is not None) == is_told


def test_config_names_what_is_wrong(tmp_path: Path) -> None:
    for name, value in (("max_wrong", 0), ("num_attempts", 1)):
        with pytest.raises(ValueError, match=rf"{name} = {value} must be at least .* with require_wrong = true"):
            SynthesizeConfig(questions="q", out="o", endpoints={"a": EndpointConfig()}, **{name: value})
        SynthesizeConfig(
            questions="q", out="o", endpoints={"a": EndpointConfig()}, require_wrong=False, **{name: value}
        )
    with pytest.raises(ValueError, match=r"endpoints = \{\} must name one"):
        SynthesizeConfig(questions="q", out="o")
    with pytest.raises(ValueError, match=r"critique_with = 'c' must be of the endpoints \['a'\]"):
        SynthesizeConfig(questions="q", out="o", endpoints={"a": EndpointConfig()}, critique_with="c")
    with pytest.raises(ValueError, match="max_pass_rate"):
        FilterConfig(max_pass_rate=0)
