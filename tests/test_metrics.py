"""What a run writes down: whole lines, nothing twice after a resume, numbers that add up."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_t1 import reasoning
from megatron_t1.metrics import MetricsLog, Stopwatch, rollout_metrics
from megatron_t1.trackers import TensorBoard
from megatron_t1.types import Group, Prompt, Reward, Sample


def sample(value: float, num_tokens: int, penalties: dict[str, str] | None = None, version: int = 3) -> Sample:
    return Sample(
        token_ids=np.arange(num_tokens),
        logprobs=np.zeros(num_tokens, np.float32),
        text="answer",
        finish_reason="length" if penalties else "stop",
        weight_versions=((version, 0, num_tokens),),
        server="",
        reward=Reward(
            value=value,
            correct=value == 1,
            outcome="correct" if value == 1 else "wrong",
            extracted=None,
            reason="",
            penalties=penalties or {},
        ),
    )


def group(identity: str, *samples: Sample) -> Group:
    prompt = Prompt(id=identity, text="question", token_ids=np.arange(3), gold="7")
    return Group(prompt=prompt, samples=list(samples))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resume_drops_what_came_after_its_step(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard/rl", 0)
    with MetricsLog(tmp_path, "rl", trackers=[board], groups_kept=1) as first:
        for step in (1, 2, 3):
            first.log(step, {"reward": step / 10})
            first.samples(step, [group("a", sample(1, 4)), group("b", sample(0, 4))])
    with (tmp_path / "rl/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while writing
    board = TensorBoard(tmp_path / "tensorboard/rl", 2)
    with MetricsLog(tmp_path, "rl", first_step=2, trackers=[board], groups_kept=1) as second:
        second.log(3, {"reward": 9.0})
    assert [(row["step"], row["reward"]) for row in rows(tmp_path / "rl/metrics.jsonl")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 9.0),
    ]
    assert [(row["step"], row["id"]) for row in rows(tmp_path / "rl/samples.jsonl")] == [(1, "a"), (2, "a")]
    read = EventAccumulator(str(tmp_path / "tensorboard/rl")).Reload()
    assert [(e.step, round(e.value, 3)) for e in read.Scalars("reward")] == [(1, 0.1), (2, 0.2), (3, 9.0)]


def test_resume_holds_no_more_than_a_line_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rl/samples.jsonl"
    path.parent.mkdir()
    line = json.dumps({"step": 0, "response": "x" * 100_000}) + "\n"  # longer than what is read at once
    path.write_text("".join(line.replace("0", str(step), 1) for step in range(1, 201) for _ in range(2)))
    tracemalloc.start()
    MetricsLog(tmp_path, "rl", first_step=150)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row["step"] for row in rows(path)] == [step for step in range(1, 151) for _ in range(2)]
    assert most < 2e6 < path.stat().st_size
    MetricsLog(tmp_path, "rl", first_step=0)
    assert path.read_bytes() == b""


def test_a_last_line_that_nobody_wrote_is_named(tmp_path: Path) -> None:
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl/metrics.jsonl").write_text('{"step": 1}\n{"step": "two"}\n')
    with pytest.raises(ValueError, match=r"rl/metrics\.jsonl: .*the line at byte 12 is not what was written"):
        MetricsLog(tmp_path, "rl", first_step=1)


def test_rollout_metrics_by_hand() -> None:
    groups = [
        group("mixed", sample(1, 10), sample(0, 20)),
        group("equal", sample(-1, 30, {"repetition": "why"}, version=2), sample(-1, 40, {"overlong": "why"})),
    ]
    metrics = rollout_metrics(groups)
    assert metrics["reward"] == pytest.approx(-0.25)
    assert metrics["pass_rate"] == pytest.approx(0.25)
    assert metrics["groups_all_equal"] == 0.5
    assert metrics["tokens_all_equal"] == 70
    assert (metrics["response_tokens_mean"], metrics["response_tokens_max"]) == (25, 40)
    assert metrics["share_cut"] == metrics["penalized"] == 0.5
    assert metrics["penalty/repetition"] == metrics["penalty/overlong"] == 0.25
    assert metrics["outcome/wrong"] == 0.75
    assert (metrics["response_tokens_right"], metrics["response_tokens_wrong"]) == (10, 30)

    assert metrics["oldest_version"] == 2
    assert all(math.isfinite(value) for value in metrics.values())


def test_words_of_reasoning_are_counted_by_correctness() -> None:
    right = replace(sample(1, 5), text="Try 4. Wait, that is a mistake; let me check. Alternatively, wait")
    metrics = rollout_metrics([group("a", right, sample(0, 5))])
    assert [metrics[f"words/{habit}"] for habit in ("wait", "mistake", "check", "alternatively", "perhaps")] == [
        *(1, 0.5, 0.5, 0.5, 0)
    ]
    assert (metrics["words_right"], metrics["words_wrong"]) == (5, 0)
    assert "words_wrong" not in rollout_metrics([group("a", right)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So, now we take x, note that it is not 3, not 4, nor 5: no two are equal, no matter how.", {}),
        ("A mighty terror, awaited on the checkerboard of unverified sites", {}),
        ("Try 4: 36+9=45 mod 8=5, no. Try 6: 63, no! Try 7: 72, yes.", {"mistake": 2}),
        ("WAIT. Mistakes? Wrong, incorrect, an error, actually.", {"wait": 1, "mistake": 5}),
        ("Hold on: I checked, verified and confirmed; recheck", {"wait": 1, "check": 4}),
        ("Maybe, perhaps, it might. Alternatively another way", {"perhaps": 3, "alternatively": 2}),
    ],
)
def test_words_of_reasoning_are_whole_words(text: str, expected: dict[str, int]) -> None:
    assert {name: count for name, count in reasoning.count(text).items() if count} == expected


def test_stopwatch_keeps_laps_and_totals_apart() -> None:
    watch = Stopwatch()
    with watch("a"):
        time.sleep(0.01)
    with pytest.raises(KeyError), watch("b"):
        raise KeyError
    assert set(watch.lap()) == {"a", "b"}
    assert watch.lap() == {}
    with watch("a"):
        pass
    assert watch.total["a"] >= 0.01
