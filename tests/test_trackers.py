"""wandb and MLflow: a run that is killed and resumed is one run there, and no step comes twice.

The libraries are not installed by default, and their part is left out without them:

    pip install --target build/trackers -r requirements/trackers.txt
    T1_TRACKERS=build/trackers pytest tests/test_trackers.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_t1 import trackers
from megatron_t1.cli.options import parse
from megatron_t1.config import Config
from megatron_t1.stop import EXIT_STOPPED
from megatron_t1.trackers import Once
from tests.forks import ROOT, WORKERS, environment

INSTALLED = os.environ.get("T1_TRACKERS", "")
needs_them = pytest.mark.skipif(not INSTALLED, reason="T1_TRACKERS names no folder with wandb and mlflow")
READ_WANDB = """
import json, sys
sys.path.append(sys.argv[1])
from wandb.proto.wandb_internal_pb2 import Record

def records(data, block=1 << 15):  # LevelDB's log: blocks of pieces, each with checksum, length and kind
    at, whole = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the last piece of a record
            yield whole
            whole = b""

for path in sys.argv[2:]:
    for data in records(open(path, "rb").read()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            print(json.dumps({"id": record.run.run_id, "config": config}))
        elif record.WhichOneof("record_type") == "exit":
            print(json.dumps({"exit_code": record.exit.exit_code}))
        elif record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            print(json.dumps(row))
"""
READ_MLFLOW = """
import json, sys
sys.path.append(sys.argv[1])
from mlflow import MlflowClient
client = MlflowClient()
runs = client.search_runs([client.get_experiment_by_name("t1-tests").experiment_id])
for run in runs:
    number = run.info.run_id
    print(json.dumps({
        "status": run.info.status, "params": run.data.params,
        "reward": [(m.step, m.value) for m in client.get_metric_history(number, "reward")],
        "tables": [file.path for file in client.list_artifacts(number, "samples")],
    }))
"""


def run(*words: object, env: dict[str, str], expect: int = 0) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout


@needs_them
def test_a_killed_and_resumed_run_is_one_run_and_no_step_comes_twice(tmp_path: Path) -> None:
    store = (tmp_path / "mlruns").as_uri()
    env = environment(WANDB_MODE="offline", MLFLOW_TRACKING_URI=store, MLFLOW_ALLOW_FILE_STORE="true")
    folder = Path(INSTALLED).absolute()
    worker = [WORKERS / "tracked_worker.py", folder, tmp_path / "run"]

    def told_mlflow() -> dict:
        (row,) = run("-c", READ_MLFLOW, folder, env=env).splitlines()  # one run
        return json.loads(row)

    run(*worker, "new", 1, 23, "kill", env=env, expect=-9)
    for first, last, end, status in (
        (21, 24, "fail", "FAILED"),  # the last checkpoint before the kill was that of step 20
        (25, 26, "stop", "KILLED"),
        (27, 30, "close", "FINISHED"),
    ):
        run(*worker, "resume", first, last, end, env=env, expect=int(end == "fail"))
        assert told_mlflow()["status"] == status
    row = told_mlflow()
    assert row["reward"] == [[step, step / 10] for step in range(1, 31)]
    assert row["params"]["config.seed"] == "7"
    assert row["params"]["versions.torch"]
    assert row["tables"] == ["samples/step_00000001.json", "samples/step_00000020.json"]

    files = sorted(tmp_path.glob("run/rl/wandb/offline-run-*/*.wandb"))
    assert len(files) == 4, "one of each process; `wandb sync` joins those of one id"
    read = [json.loads(line) for line in run("-c", READ_WANDB, folder, *files, env=env).splitlines()]
    ids = {row["id"] for row in read if "id" in row}
    assert ids == {json.loads((tmp_path / "run/rl/wandb.json").read_text())["id"]}
    assert next(row for row in read if "id" in row)["config"]["config"]["seed"] == 7
    assert [(row["_step"], row["reward"]) for row in read if "reward" in row] == [(i, i / 10) for i in range(1, 31)]
    assert [row["_step"] for row in read if "samples" in row or "samples._type" in row] == [1, 20]
    assert [row["exit_code"] for row in read if "exit_code" in row] == [1, EXIT_STOPPED, 0]


def test_what_is_not_installed_is_refused_at_once() -> None:
    if not INSTALLED:
        assert parse(Config, ["--log.mlflow", "mine"])[1] == [
            "log.mlflow = 'mine' needs the package mlflow: pip install it here"
        ]


class Full:
    """A tracker whose service has no room at steps 2 and 3."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        if step in (2, 3):
            raise ConnectionError("no room")
        self.told.append(step)

    def table(self, step: int, rows: list) -> None: ...

    def close(self, error: BaseException | None) -> None: ...


def test_a_tracker_that_fails_is_said_and_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, ids = Full(), []

    def start(identity: str) -> Full:
        ids.append(identity)
        return full

    for resume, first in ((False, 1), (True, 4), (False, 1)):
        tracker = Once("It", tmp_path / "it.json", resume, start)
        for step in range(first, first + 5):
            tracker.log(step, {})
        tracker.close(None)
    assert full.told == [1, 4, 5, 6, 7, 8, 1, 4, 5]
    assert ids[0] == ids[1] != ids[2], "a run that begins anew in the folder is another"
    assert "It was not told: ConnectionError: no room" in capsys.readouterr().err


# A thread of its library writes, as a process does that has met its quota: EFBIG here.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from megatron_t1.trackers import TensorBoard
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
before = TensorBoard(Path(sys.argv[1]) / "before", 0)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
after = TensorBoard(Path(sys.argv[1]) / "after", 0)
for board in (before, after):
    for step in range(1, 200):
        board.log(step, {f"metric{i}": 1.0 for i in range(30)})
    board.close(None)
print("trained to its end")
"""


@pytest.mark.parametrize("num_bytes", [0, 10, 4096, 200_000])
def test_a_full_disk_under_tensorboard_is_said_once_and_ends_no_run(tmp_path: Path, num_bytes: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(num_bytes)],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout == "trained to its end\n", done.stderr[-3000:]
    assert done.returncode == 0
    assert done.stderr.count("warning: TensorBoard is told no more: [Errno 27] File too large") == 2, "one each"


def test_a_tracker_that_hangs_holds_no_step_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, told = threading.Event(), []

    class Slow(Full):
        def log(self, step: int, values: dict[str, float]) -> None:
            answers.wait()
            told.append(step)

    tracker = Once("It", tmp_path / "it.json", False, lambda identity: Slow())
    for step in range(1, 6):
        tracker.log(step, {})
    assert told == []
    with monkeypatch.context() as patch:
        patch.setattr(trackers, "PATIENCE_S", 0.1)
        tracker.close(None)
    assert "It was not told all" in capsys.readouterr().err
    answers.set()
    tracker.close(None)
    assert told == [1, 2, 3, 4, 5], "and loses none when it answers again"
