"""Scorer and its pool: the reward rule, kills, random deaths, the sandbox, the alarm."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_t1.data.prompts import Question
from megatron_t1.files import append_jsonl
from megatron_t1.reward.config import PenaltyConfig, RewardConfig
from megatron_t1.reward.processes import pool
from megatron_t1.reward.processes.grader import Graded, Zygote
from megatron_t1.reward.processes.worker import encode
from megatron_t1.reward.score import Scorer
from megatron_t1.types import FinishReason, Message, text_sample
from tests.forks import ROOT
from tests.reward.burning import BURNS, BURNS_AT_ONCE, DIES, SLEEPS
from tests.reward.cases import pair, rows
from tests.reward.soak import soak

BURNING = "tests.reward.burning"


def test_rewards_are_one_zero_and_minus_one() -> None:
    with Scorer(RewardConfig(num_workers=1)) as scorer:
        right, wrong, none, loop, cut = scorer.score_all(
            [
                pair("4", r"\boxed{4}"),
                pair("4", r"\boxed{5}"),
                pair("4", "no idea, sorry\nreally"),
                pair("4", "wait " * 3000 + r"\boxed{4}"),
                pair("4", r"\boxed{4}", finish_reason="length"),
            ]
        )
    assert [r.value for r in (right, wrong, none, loop, cut)] == [1, 0, 0, -1, -1]
    assert [r.correct for r in (right, wrong, none, loop, cut)] == [True, False, False, True, True]
    assert [r.outcome for r in (right, wrong, none)] == ["correct", "wrong", "no_answer"]
    assert set(loop.penalties) == {"repetition"}
    assert set(cut.penalties) == {"overlong"}
    assert right.extracted == "4"
    assert scorer.outcomes == {"correct": 3, "wrong": 1, "no_answer": 1, "penalty/repetition": 1, "penalty/overlong": 1}


def test_a_bomb_is_killed_and_keeps_its_penalties() -> None:
    with Scorer(RewardConfig(num_workers=1, deadline_s=0.5), BURNING) as scorer:
        bomb = pair(BURNS, r"\boxed{x}", finish_reason="length")
        rewards = scorer.score_all([pair("4", r"\boxed{4}"), bomb, pair("x+1", r"\boxed{1+x}")])
        assert [r.outcome for r in rewards] == ["correct", "timeout", "correct"]
        assert set(rewards[1].penalties) == {"overlong"}
        assert rewards[1].value == -1
        assert scorer.num_kills == 1


@pytest.mark.parametrize(
    ("gold", "text", "outcome"),
    [
        (BURNS_AT_ONCE, r"\boxed{x}", "timeout"),
        (DIES, r"\boxed{x}", "crash"),
        ("4", " " * 4_100_000 + r"\boxed{4}", "no_answer"),
    ],
    ids=["late", "deadly", "unread"],
)
def test_how_it_ended_costs_minus_one_whatever_comes_of_the_text(
    gold: str, text: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MAX_ATTEMPTS", 2)
    with Scorer(RewardConfig(num_workers=1, deadline_s=0.1), BURNING) as scorer:
        endings: list[FinishReason] = ["length", "repetition", "stop"]
        rewards = scorer.score_all(pair(gold, text, finish_reason=ending) for ending in endings)
    assert [reward.outcome for reward in rewards] == [outcome] * 3
    assert [list(reward.penalties) for reward in rewards] == [["overlong"], ["repetition"], []]
    assert [reward.value for reward in rewards] == [-1, -1, 0]
    cfg = RewardConfig(num_workers=1, deadline_s=0.1, penalties=PenaltyConfig(enabled=("garbled",)))
    with Scorer(cfg, BURNING) as scorer:
        assert scorer.score_all([pair(gold, text, finish_reason="length")])[0].value == 0


def test_only_the_late_one_is_late() -> None:
    """Replies wait for each other: those behind and before a task that says nothing are not to be blamed for it."""
    pairs = [pair(str(i), rf"\boxed{{{i}}}") for i in range(60)]
    pairs[5] = pairs[40] = pair(BURNS_AT_ONCE, r"\boxed{x}")
    with Scorer(RewardConfig(num_workers=2, deadline_s=0.3), BURNING) as scorer:
        outcomes = [reward.outcome for reward in scorer.score_all(pairs)]
    assert [i for i, outcome in enumerate(outcomes) if outcome == "timeout"] == [5, 40]
    assert outcomes.count("correct") == 58


def test_only_the_deadly_one_crashes() -> None:
    pairs = [pair(str(i), rf"\boxed{{{i}}}") for i in range(60)]
    pairs[20] = pair(DIES, r"\boxed{x}")
    with Scorer(RewardConfig(num_workers=2), BURNING) as scorer:
        outcomes = [reward.outcome for reward in scorer.score_all(pairs)]
    assert [i for i, outcome in enumerate(outcomes) if outcome == "crash"] == [20]
    assert outcomes.count("correct") == 59


def test_a_stuck_task_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pool, "MIN_STUCK_S", 0.5)
    monkeypatch.setattr(pool, "STUCK_FACTOR", 0)
    monkeypatch.setattr(pool, "MAX_ATTEMPTS", 2)
    with Scorer(RewardConfig(num_workers=1), BURNING) as scorer:
        rewards = scorer.score_all([pair(SLEEPS, r"\boxed{x}", id="question 7"), pair("4", r"\boxed{4}")])
    assert [r.outcome for r in rewards] == ["crash", "correct"]
    assert "an answer to question 7 is stuck" in capsys.readouterr().err


def test_graders_are_replaced_after_their_last_task() -> None:
    with Scorer(RewardConfig(num_workers=2, tasks_per_worker=3)) as scorer:
        rewards = scorer.score_all(pair("x+1", rf"\boxed{{{i}+x}}") for i in range(40))
        assert [r.correct for r in rewards] == [i == 1 for i in range(40)]
        assert scorer.num_kills == 0


def test_a_reply_to_another_task_is_not_taken() -> None:
    """A grader that answers with a wrong identity is ended, and its tasks are given to another."""
    graders = pool.Pool("megatron_t1.reward.grading", 1, 0.5, 1 << 30, 500)
    try:
        jobs = [graders.submit({"gold_to_check": "4"}, "four") for _ in range(4)]
        assert [job.result().messages[-1]["problem"] for job in jobs] == [None] * 4
        (grader,) = graders._graders
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        ours.send(encode({"id": 10**9, "problem": "not yours", "done": True}))
        real, grader.connection = grader.connection, theirs
        graders._selector.unregister(real)
        theirs.setblocking(False)
        graders._selector.register(theirs, selectors.EVENT_READ, grader)
        later = graders.submit({"gold_to_check": "5"}, "five")
        assert later.result(60).messages[-1]["problem"] is None
        assert graders.num_lost == 1
    finally:
        graders.close()


def test_soak() -> None:
    report = soak(1500)
    assert report.wrong == []
    assert report.num_killed >= 3


def test_random_kills_lose_nothing_and_change_no_verdict() -> None:
    cases = [c for c in rows("cases") if c["kind"] in ("expression", "radical", "interval", "fraction", "number")][:500]
    pairs = [pair(c["gold"], c["prediction"], c["mode"]) for c in cases]
    with Scorer(RewardConfig(num_workers=2)) as scorer:
        calm = scorer.score_all(pairs)
    stop = threading.Event()
    generator = random.Random(1)
    with Scorer(RewardConfig(num_workers=2)) as scorer:
        kills: list[int] = []

        def killer() -> None:
            graded = 0
            while not stop.wait(0.005):
                pids = scorer.pids()
                if len(pids) > 1 and sum(scorer.outcomes.values()) >= graded + 5:  # never faster than they can work
                    graded = sum(scorer.outcomes.values())
                    victim = pids[0] if generator.random() < 0.05 else generator.choice(pids[1:])
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
                        kills.append(victim)

        thread = threading.Thread(target=killer)
        thread.start()
        try:
            stormy = scorer.score_all(pairs)
        finally:
            stop.set()
            thread.join()
    assert len(kills) >= 3
    assert [(r.outcome, r.extracted) for r in stormy] == [(r.outcome, r.extracted) for r in calm]


def test_a_zygote_that_is_about_to_end_is_replaced() -> None:
    """Between the end of a killed process's sockets and its own, asking it again and again would give up."""
    zygote = Zygote("megatron_t1.reward.grading", 2 << 30)
    zygote.fork()
    assert zygote._process is not None
    assert zygote._control is not None
    dying = zygote._process.pid
    zygote._control.shutdown(socket.SHUT_RDWR)  # it is importing still
    grader = zygote.fork()
    grader.connection.settimeout(120)
    assert grader.frames.feed(grader.connection.recv(1 << 16))[0] > 0
    assert zygote.pids() != [dying]
    zygote.close()


@pytest.mark.parametrize(("what", "number"), [("socket.socketpair", errno.EMFILE), ("subprocess.Popen", errno.EAGAIN)])
def test_graders_that_cannot_be_started_now_are_started_later(
    what: str, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And when they never can, what waits is told why, and the next task has its chance."""
    monkeypatch.setattr(pool, "START_PAUSE_S", 0.01)
    failures = 0

    def flaky(*args: Any, **more: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError(number, os.strerror(number))
        return real(*args, **more)

    graders = pool.Pool("megatron_t1.reward.grading", 1, 5.0, 1 << 30, 1)
    real = getattr(socket if "socket" in what else subprocess, what.split(".")[1])
    monkeypatch.setattr(what, flaky)
    try:
        failures = 2
        assert graders.submit({"gold_to_check": "4"}, "four").result(60).messages[-1]["problem"] is None
        assert capsys.readouterr().err.count(f"no grader can be started at present: [Errno {number}]") == 2
        os.kill(graders.pids()[0], signal.SIGKILL)
        failures = pool.MAX_FAILED_STARTS
        with pytest.raises(RuntimeError, match=rf"graders do not start \(\[Errno {number}\] .*\): `python -m"):
            graders.submit({"gold_to_check": "5"}, "five").result(60)
        assert graders.submit({"gold_to_check": "6"}, "six").result(60).messages[-1]["problem"] is None
    finally:
        graders.close()


def test_an_event_loop_stays_free_while_answers_are_graded() -> None:
    async def run(scorer: Scorer) -> tuple[list[str], float]:
        ticks, longest = 0, 0.0
        work = asyncio.gather(*(scorer.score(*pair(BURNS, r"\boxed{x}")) for _ in range(2)))
        while not work.done():
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)
            ticks += 1
        assert ticks > 10
        return [r.outcome for r in await work], longest

    with Scorer(RewardConfig(num_workers=1, deadline_s=0.5), BURNING) as scorer:
        for _ in range(2):  # two loops, one scorer
            outcomes, longest = asyncio.run(run(scorer))
            assert outcomes == ["timeout", "timeout"]
            assert longest < 0.5  # a blocked loop would wait for a whole deadline


def test_every_grader_ends_with_its_owner() -> None:
    code = (
        "import os, signal\n"
        "from megatron_t1.reward.score import Scorer, RewardConfig\n"
        "from tests.reward.cases import pair\n"
        "scorer = Scorer(RewardConfig(num_workers=2))\n"
        "scorer.score_all([pair('x+1', r'\\boxed{1+x}')] * 8)\n"
        "print(*scorer.pids(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pids = [int(p) for p in done.stdout.split()]
    assert len(pids) >= 2, done.stderr
    deadline = time.monotonic() + 20
    while any(_runs(p) for p in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_grader_can_open_nothing() -> None:
    """The same calls a grader makes before its first task, then the things hostile text would want."""
    code = (
        "import ctypes, socket, sys\n"
        "from megatron_t1.reward.processes import worker\n"
        "worker.leave_the_network(ctypes.CDLL(None)); worker.lock_down(1 << 30)\n"
        "def refused(action):\n"
        "    try: action()\n"
        "    except (OSError, MemoryError): return True\n"
        "    return False\n"
        "assert refused(lambda: open('/tmp/pwned_by_grader', 'w'))\n"
        "assert refused(lambda: open('/etc/passwd'))\n"
        "assert refused(lambda: socket.create_connection(('127.0.0.1', 9)))\n"
        "assert refused(lambda: bytearray(2 << 30))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_alarm_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with Scorer(RewardConfig(num_workers=1, alarm_after=8)) as scorer:
        scorer.score_all([pair("4", "I do not know\nat all")] * 7 + [pair("4", r"\boxed{3}")])
        (line,) = capsys.readouterr().err.splitlines()  # once for all of them
        assert "`perplexity` is left out" in line
        scorer.score_all([pair("4", "I do not know\nat all")] * 8)
        assert "boxed" in capsys.readouterr().err


def test_a_language_of_an_earlier_message_may_be_answered_in() -> None:
    messages: list[Message] = [
        {"role": "system", "content": "请用中文回答。"},
        {"role": "user", "content": "3x=6?"},
        {"role": "assistant", "content": "x=2"},
        {"role": "user", "content": "2x=4?"},
    ]
    chinese = text_sample("我们首先考虑这个方程的解，因此答案是显然的。" * 3 + r"\boxed{2}", "stop")
    with Scorer(RewardConfig(num_workers=1)) as scorer:
        told, untold = (
            scorer.score_all([(Question(id="q", messages=asked, gold="2").prompt(None), chinese)])[0]
            for asked in (messages, messages[1:])
        )
    assert told.value == 1
    assert untold.penalties.keys() == {"language"}


def test_right_answers_after_soup_or_without_text_are_penalized() -> None:
    """What characters do not show: random words (by the sample's own logprobs), and tokens that decode to nothing."""
    prompt, sample = pair("3", r"<think>pan dol ik sem</think>\boxed{3}")
    ids = np.arange(200)
    good = replace(sample, token_ids=ids, logprobs=np.full(200, -0.6, np.float32))
    soup = replace(good, logprobs=np.where(ids < 100, -0.6, -8.0).astype(np.float32))
    with Scorer(RewardConfig(num_workers=1), hidden_ids=range(190, 400)) as scorer:
        rewards = scorer.score_all(
            (prompt, one) for one in (good, soup, replace(good, token_ids=ids - 9), replace(good, token_ids=ids - 5))
        )
    assert [set(reward.penalties) for reward in rewards] == [{"garbled"}, {"garbled", "perplexity"}, set(), set()]
    assert [reward.value for reward in rewards] == [-1, -1, 1, 1]


@pytest.mark.parametrize(
    ("field", "value"), [("deadline_s", 0.0), ("num_workers", -1), ("memory_mb", 1), ("alarm_after", 0)]
)
def test_config_errors_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        RewardConfig(**{field: value})  # type: ignore[arg-type]


def test_a_response_of_100_mb_is_refused_unread() -> None:
    with Scorer(RewardConfig(num_workers=1)) as scorer:
        (reward,) = scorer.score_all([pair("4", "x" * 100_000_000 + r"\boxed{4}")])
    assert (reward.outcome, reward.value) == ("no_answer", 0)
    assert "characters" in reward.reason


HALF = "\ud800"


def test_every_reward_can_be_written(tmp_path: Path) -> None:
    """Half of a surrogate pair, in a text or in an exception's, comes again in what was extracted and why."""
    with Scorer(RewardConfig(num_workers=1, deadline_s=0.5), BURNING) as scorer:
        rewards = scorer.score_all(pair(gold, rf"\boxed{{x+{HALF}}}") for gold in ("4", "x+1", BURNS))
        failed = {"outcome": "crash", "extracted": None, "reason": HALF}
        rewards.append(
            scorer._reward(Graded([{"penalties": {"p": HALF}, "answer": None, "verdict": failed}], "done"), "stop")
        )
    assert [reward.extracted for reward in rewards] == ["x+?", "x+?", "x+?", None]
    assert (rewards[-1].reason, rewards[-1].penalties) == ("?", {"p": "?"})
    append_jsonl(tmp_path / "rewards.jsonl", map(asdict, rewards))


def test_penalties_can_be_switched_off() -> None:
    off = RewardConfig(num_workers=1, penalties=PenaltyConfig(enabled=()))
    with Scorer(off) as scorer:
        (reward,) = scorer.score_all([pair("4", "wait " * 3000 + r"\boxed{4}")])
    assert (reward.value, reward.penalties) == (1, {})


def test_graders_start_where_t1_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among files that are called like modules, and with a Python whose libraries an environment module brings."""
    for name in ("token", "random", "re", "json", "sympy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    passed = {"LD_LIBRARY_PATH": "/opt/python/lib", "PYTHONUSERBASE": "/opt/base"}
    for name, value in passed.items():
        monkeypatch.setenv(name, value)
    with Scorer(RewardConfig(num_workers=1)) as scorer:
        assert scorer.score_all([pair("4", r"\boxed{4}")])[0].correct
        environment = Path(f"/proc/{scorer.pids()[0]}/environ").read_bytes().decode().split("\0")
    assert {f"{name}={value}" for name, value in passed.items()} < set(environment)


@pytest.mark.parametrize("others", [None, "/opt/theirs"])
def test_graders_start_from_a_checkout_that_is_not_installed(others: str | None, tmp_path: Path) -> None:
    """Python finds it as the working directory, which graders have not on their path."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "megatron_t1", checkout / "megatron_t1", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (tmp_path / "in.jsonl").write_text('{"id": "a", "gold": "4", "prediction": "\\\\boxed{4}"}\n')
    code = (
        "import runpy, sys\n"
        "from megatron_t1.reward.processes import grader\n"
        "start = grader.subprocess.Popen\n"
        "grader.subprocess.Popen = lambda *a, **k: print(k['env']['PYTHONPATH']) or start(*a, **k)\n"
        "sys.argv = ['t1', 'grade', '../in.jsonl', '../out.jsonl', '--reward.num_workers', '1']\n"
        "runpy.run_module('megatron_t1', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300, cwd=checkout,
        env=environment | ({"PYTHONPATH": others} if others else {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 correct" in done.stdout
    assert done.stdout.split()[0] == os.pathsep.join(filter(None, [str(checkout), others]))
