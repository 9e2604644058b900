"""The trace opens in Perfetto, whatever threads wrote it and however its process ended."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from megatron_t1.metrics import Stopwatch
from megatron_t1.trace import Trace


def events(path: Path) -> list[dict]:
    """As readers of the format take it: a list whose end may be missing."""
    return json.loads(path.read_text().rstrip().removesuffix(",") + "]")


def spans(path: Path, track: str) -> list[dict]:
    (number,) = {e["tid"] for e in events(path) if e["ph"] == "M" and e["args"]["name"] == track}
    return [e for e in events(path) if e["ph"] == "X" and e["tid"] == number]


def test_what_overlaps_is_one_span(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "rl" / "trace.json")

    def ask(begin_s: float, end_s: float) -> None:
        time.sleep(begin_s)
        with trace.busy("server a", "generate", 3):
            time.sleep(end_s - begin_s)

    asked = [threading.Thread(target=ask, args=times) for times in ((0.0, 0.2), (0.1, 0.3), (0.5, 0.6))]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    first, second = (span["dur"] / 1e6 for span in spans(tmp_path / "rl" / "trace.json", "server a"))
    assert 0.3 <= first < 0.45
    assert 0.1 <= second < 0.2
    assert trace.take_busy_s() == {"server a": pytest.approx(first + second, abs=1e-3)}
    assert trace.take_busy_s() == {}


def test_stages_are_spans_by_the_wall_clock_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for _ in range(2):
        watch = Stopwatch(Trace(path))
        with watch("train"):
            time.sleep(0.01)
        assert spans(path, "trainer")[-1]["name"] == "train"
        assert spans(path, "trainer")[-1]["ts"] / 1e6 == pytest.approx(time.time(), abs=5)
        assert spans(path, "trainer")[-1]["dur"] / 1e6 == pytest.approx(watch.lap()["train"])
    assert len(spans(path, "trainer")) == 2


def test_tracks_keep_their_rows_whatever_came_first(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for order in (("push", "trainer"), ("trainer", "push")):
        trace = Trace(path)
        for track in order:
            trace.span(track, f"of {track}", 0.0, 1.0)
    for track in ("push", "trainer"):
        assert {span["name"] for span in spans(path, track)} == {f"of {track}"}


def test_what_cannot_be_written_is_said_once_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rl").write_text("")  # no folder
    trace = Trace(tmp_path / "rl" / "trace.json")
    for _ in range(2):
        trace.span("push", "write", 0.0, 1.0)
    assert capsys.readouterr().err.count("can't be written") == 1


def test_without_a_path_nothing_is_written() -> None:
    trace = Trace()
    with pytest.raises(RuntimeError), trace.busy("grading", "grade"):
        raise RuntimeError
    assert trace.take_busy_s().keys() == {"grading"}
