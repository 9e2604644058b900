"""Scorer and its pool: the reward rule, kills, random deaths, the sandbox, the alarm."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from megatron_t1.reward.config import PenaltyConfig, RewardConfig
from megatron_t1.reward.processes.grader import Zygote
from megatron_t1.reward.score import Scorer
from tests.reward.cases import BOMB, BOMB_GOLD, pair, rows


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
    with Scorer(RewardConfig(num_workers=1, deadline_s=0.5)) as scorer:
        bomb = pair(BOMB_GOLD, "\\boxed{" + BOMB + "}", finish_reason="length")
        rewards = scorer.score_all([pair("4", r"\boxed{4}"), bomb, pair("x+1", r"\boxed{1+x}")])
        assert [r.outcome for r in rewards] == ["correct", "timeout", "correct"]
        assert set(rewards[1].penalties) == {"overlong"}
        assert rewards[1].value == -1
        assert scorer.num_kills == 1


def test_what_may_run_away_waits_until_the_others_are_graded() -> None:
    patient = [pair(BOMB_GOLD, answer) for answer in (rf"\boxed{{{BOMB}}}", r"\boxed{(x)\mod 3}", r"\boxed{x\mod 4}")]
    plain = [pair("x+1", r"\boxed{1+x}")] * 200
    order: list[int] = []

    async def one(scorer: Scorer, i: int) -> str:
        reward = await scorer.score(*(patient + plain)[i])
        order.append(i)
        return reward.outcome

    async def everything(scorer: Scorer) -> list[str]:
        return await asyncio.gather(*(one(scorer, i) for i in range(len(patient + plain))))

    with Scorer(RewardConfig(num_workers=1)) as scorer:
        assert asyncio.run(everything(scorer)) == ["timeout", "correct", "wrong"] + ["correct"] * 200
    assert set(order[200:]) == {0, 1, 2}


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
    zygote = Zygote(2 << 30)
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


def test_an_event_loop_stays_free_while_answers_are_graded() -> None:
    async def run(scorer: Scorer) -> tuple[list[str], float]:
        ticks, longest = 0, 0.0
        work = asyncio.gather(*(scorer.score(*pair(BOMB_GOLD, r"\boxed{" + BOMB + "}")) for _ in range(2)))
        while not work.done():
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)
            ticks += 1
        assert ticks > 10
        return [r.outcome for r in await work], longest

    with Scorer(RewardConfig(num_workers=1, deadline_s=0.5)) as scorer:
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


def test_the_alarm_names_what_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    with Scorer(RewardConfig(num_workers=1, alarm_after=8)) as scorer, caplog.at_level(logging.WARNING):
        scorer.score_all([pair("4", "I do not know\nat all")] * 7 + [pair("4", r"\boxed{3}")])
        assert not caplog.records
        scorer.score_all([pair("4", "I do not know\nat all")] * 8)
        assert "boxed" in caplog.text


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


def test_penalties_can_be_switched_off() -> None:
    off = RewardConfig(num_workers=1, penalties=PenaltyConfig(enabled=()))
    with Scorer(off) as scorer:
        (reward,) = scorer.score_all([pair("4", "wait " * 3000 + r"\boxed{4}")])
    assert (reward.value, reward.penalties) == (1, {})
