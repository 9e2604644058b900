"""`t1 watch`: the page says what the files say, and follows them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from megatron_t1.files import append_jsonl, write_json, write_jsonl, write_text
from megatron_t1.report import watch
from megatron_t1.report.watch import Run


def step(number: int, **more: float) -> dict[str, float]:
    return {"step": number, "reward": number / 10, "seconds/generate": 60.0, "seconds/train": 30.0, **more}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_text(tmp_path / "config.yaml", "rl: {steps: 100}\nsft: {max_steps: null}\n")
    write_jsonl(tmp_path / "sft/metrics.jsonl", [{"step": 7, "nll": 1.5}])
    write_jsonl(tmp_path / "rl/metrics.jsonl", [step(i) for i in range(1, 41)])
    write_jsonl(
        tmp_path / "rl/warnings.jsonl", [{"time": time.time() - 600, "text": "a \x1b]0;title\x07 was lost [red]"}]
    )
    servers = [
        {"name": "node2:8000", "alive": True, "version": 40, "in_flight": 96, "cache": 0.631},
        {"name": "node3:8000", "alive": False, "version": 39, "in_flight": 0, "cache": None},
    ]
    graders = {"processes": 8, "kills": 1, "outcomes": {"correct": 90, "wrong": 10}}
    status = {"time": time.time(), "host": "node1", "servers": servers, "graders": graders, "gpus": [[40960, 81920]]}
    write_json(tmp_path / "rl/status.json", status)
    return tmp_path


def page(run: Run) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(run.page())
    return console.export_text()


def test_the_page_says_what_the_files_say(run_dir: Path) -> None:
    run = Run(run_dir)
    run.look()
    said = page(run)
    assert "rl step 40 of 100, 90 s a step; 90 min to the end" in said
    assert next(line.split() for line in said.splitlines() if line.startswith("reward"))[1:3] == ["4", "3.05"]
    assert [line.split()[:2] for line in said.splitlines() if line.startswith("generate")] == [["generate", "60"]]
    lines = {line.split()[0]: " ".join(line.split()) for line in said.splitlines() if line.startswith("node")}
    assert lines == {"node2:8000": "node2:8000 alive 40 96 63%", "node3:8000": "node3:8000 NOT THERE 39 0"}
    assert "graders: 8 processes, 1 killed; 90 correct, 10 wrong" in said
    assert "GPU memory on node1 (GiB): 40 of 80" in said
    assert "10 min ago: a  ]0;title  was lost [red]" in said, "a text cannot steer the terminal"


def test_it_follows_a_run_and_a_resumed_one(run_dir: Path) -> None:
    run = Run(run_dir)
    assert len(run.look()) == 41
    assert run.look() == []
    with (run_dir / "rl/metrics.jsonl").open("a") as file:
        file.write('{"step": 40.5, "re\n[]\n{"reward": 1}\n')  # damaged
    append_jsonl(run_dir / "rl/metrics.jsonl", [step(41)])
    with (run_dir / "rl/metrics.jsonl").open("a") as file:
        file.write('{"step": 42, "rew')  # being written
    assert [row["step"] for row in run.look()] == [41]
    write_jsonl(run_dir / "rl/metrics.jsonl", [step(i) for i in range(1, 31)])  # resumed from step 30
    run.look()
    assert run.recent[-1]["step"] == 30
    assert "rl step 30 of 100" in run.says()


def test_silence_and_the_end_are_said(run_dir: Path) -> None:
    run = Run(run_dir)
    run.look()
    long_ago = time.time() - 7200
    for name in ("metrics.jsonl", "status.json"):
        os.utime(run_dir / "rl" / name, (long_ago, long_ago))
    assert "SILENT for 2.0 h" in run.says()
    (run_dir / "rl/hf").mkdir()
    assert "SILENT" in run.says(), "the model of an earlier, shorter run"
    append_jsonl(run_dir / "rl/metrics.jsonl", [step(100)])
    run.look()
    assert run.says().endswith("finished")


def test_rl_is_waited_for_after_fine_tuning(run_dir: Path) -> None:
    (run_dir / "rl/metrics.jsonl").unlink()
    (run_dir / "sft/hf").mkdir()
    run = Run(run_dir)
    run.look()
    assert run.stage == "sft"
    assert not run.finished


def test_without_a_terminal_it_prints_a_line_a_step(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def while_asleep(seconds: float) -> None:
        append_jsonl(run_dir / "rl/metrics.jsonl", [step(100)])
        (run_dir / "rl/hf").mkdir()

    monkeypatch.setattr(watch.time, "sleep", while_asleep)
    watch.watch(run_dir)
    said = capsys.readouterr().out
    assert said.rstrip().endswith("rl step 100: reward 10")
    assert "\x1b" not in said
    with pytest.raises(ValueError, match="is not there"):
        watch.watch(run_dir / "nothing")


def test_an_empty_folder_is_waited_for(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.look()
    assert "no step yet" in page(run)
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl/status.json").write_text(json.dumps({"servers": []})[:5])
    run.look()
    assert "no step yet" in page(run)
