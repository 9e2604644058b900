"""Where the numbers of a run go for people: TensorBoard always, Weights & Biases and MLflow when asked.

All stand behind `Tracker`, and are told each step once: what a killed run had told of steps after its last checkpoint
is not told again by the run that resumes from there, it would be the same numbers. A tracker that fails is said, one
whose service hangs is told in the background: both cost the run nothing.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron_t1.config import Config, plain
from megatron_t1.files import read_json, write_json
from megatron_t1.metrics import MetricsLog
from megatron_t1.platform.installed import versions
from megatron_t1.stop import EXIT_STOPPED, Stopped
from megatron_t1.warn import warn

TABLE_EVERY = 20
"""Steps from one table of samples to the next; the first step has one. `samples.jsonl` has all."""
PATIENCE_S = 60.0
"""At the end of a run, for a service that has not taken all of it yet."""
Rows = list[dict[str, Any]]


class Tracker(Protocol):
    """One place that numbers go to."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """The numbers of a step by name."""

    def table(self, step: int, rows: Rows) -> None:
        """Graded samples of a step, as lines of samples.jsonl."""

    def close(self, error: BaseException | None) -> None:
        """The run ended: well, by an error, or as it was asked to (`Stopped`) and to go on from there."""


class TensorBoard:
    """Files in the run's folder. The first that can't be written, by a quota or a disk's error, is the last one tried:
    its library would raise the same error for ever."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """`first_step`: what an earlier process wrote of later steps is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter | None = None
        with self._given_up():
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        with self._given_up():
            for name, value in values.items():
                if self._writer:
                    self._writer.add_scalar(name, value, step)

    def table(self, step: int, rows: Rows) -> None:
        pass  # it has no tables

    def close(self, error: BaseException | None) -> None:
        with self._given_up():
            if self._writer:
                self._writer.close()

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        """An OSError inside the block is said, and ends the writing."""
        try:
            yield
        except OSError as error:
            self._writer = None
            warn(f"TensorBoard is told no more: {error}; metrics.jsonl has all")


class WandB:
    """`log.wandb` names the project; all else is wandb's own environment (WANDB_MODE=offline, WANDB_ENTITY, ...)."""

    def __init__(self, project: str, identity: str, name: str, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        self._table = wandb.Table
        own: dict[str, Any] = {"console": "off", "silent": True}
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
            own["x_transaction_log_flush_interval"] = 1.0  # s; what is unwritten when a run is killed is lost
        self._run = wandb.init(
            project=project, id=identity, resume="allow", name=name, dir=str(folder), config=config,
            settings=wandb.Settings(**own),
        )  # fmt: skip

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step, commit=True)

    def table(self, step: int, rows: Rows) -> None:
        names, cells = _cells(rows)
        self._run.log({"samples": self._table(columns=names, data=cells)}, step=step, commit=False)

    def close(self, error: BaseException | None) -> None:
        stopped = isinstance(error, Stopped)
        if stopped:
            self._run.mark_preempting()
        self._run.finish(exit_code=EXIT_STOPPED if stopped else int(error is not None))


class MLflow:
    """`log.mlflow` names the experiment; MLFLOW_TRACKING_URI says where, as for all programs of MLflow."""

    def __init__(self, experiment: str, identity: str, name: str, config: dict[str, Any]) -> None:
        # Its calls are made between steps; by default a silent server is waited for, and asked again, for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        runs = self._client.search_runs([number], f"tags.t1_id = '{identity}'")
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(number, tags={"t1_id": identity}, run_name=name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in flat(config)]
            for start in range(0, len(params), 100):  # as many as a call may have
                self._client.log_batch(self._run, params=params[start : start + 100])

    def log(self, step: int, values: dict[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics)

    def table(self, step: int, rows: Rows) -> None:
        names, cells = _cells(rows)
        self._client.log_dict(self._run, {"columns": names, "data": cells}, f"samples/step_{step:08d}.json")

    def close(self, error: BaseException | None) -> None:
        ended = "KILLED" if isinstance(error, (Stopped, KeyboardInterrupt)) else "FAILED" if error else "FINISHED"
        self._client.set_terminated(self._run, ended)


class Once:
    """A tracker that is told no step twice, by a thread of its own, and whose failures are warnings. `path` keeps its
    run's id and last step."""

    def __init__(self, name: str, path: Path, resume: bool, start: Callable[[str], Tracker]) -> None:
        """`start(id)`: joins the run of that id, or begins it."""
        stored = read_json(path, dict[str, Any]) if resume and path.exists() else {}
        self._name, self._path = name, path
        self.identity = stored.get("id") or uuid.uuid4().hex[:12]
        self._told = int(stored.get("last_step", 0))
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._make_calls, name=name, daemon=True)
        self._tracker: Tracker | None = None
        if self._try(lambda: self._start(start)):
            self._keep()
            self._thread.start()

    def _start(self, start: Callable[[str], Tracker]) -> None:
        self._tracker = start(self.identity)

    def log(self, step: int, values: dict[str, float]) -> None:
        tracker = self._tracker

        def call() -> None:
            if tracker and step > self._told:
                tracker.log(step, values)
                self._told = step
                self._keep()

        if tracker:
            self._calls.put(call)

    def table(self, step: int, rows: Rows) -> None:
        tracker = self._tracker
        if tracker and (step == 1 or step % TABLE_EVERY == 0):
            self._calls.put(lambda: tracker.table(step, rows) if step > self._told else None)

    def close(self, error: BaseException | None) -> None:
        if tracker := self._tracker:
            self._calls.put(lambda: tracker.close(error))
            self._calls.put(None)
            self._thread.join(PATIENCE_S)
            if self._thread.is_alive():
                warn(f"{self._name} was not told all: it takes longer than {PATIENCE_S:.0f} s; metrics.jsonl has it")

    def _make_calls(self) -> None:
        while call := self._calls.get():
            self._try(call)

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # whatever a library of somebody's service raises
            warn(f"{self._name} was not told: {type(error).__name__}: {str(error)[:300]}")
            return False
        return True

    def _keep(self) -> None:
        write_json(self._path, {"id": self.identity, "last_step": self._told})


def open_log(cfg: Config, stage: str, first_step: int) -> MetricsLog:
    """The log of `sft` or `rl` with the trackers that the config asks for. Rank 0 only.

    Args:
        first_step: the step that this process goes on from.
    """
    run_dir = Path(cfg.run_dir)
    folder, name = run_dir / stage, f"{run_dir.name}/{stage}"
    told = {"config": plain(asdict(cfg)), "versions": versions()}
    trackers: list[Tracker] = [TensorBoard(run_dir / "tensorboard" / stage, first_step)]
    if cfg.log.wandb:
        trackers.append(
            Once(
                "Weights & Biases", folder / "wandb.json", cfg.resume,
                lambda identity: WandB(cfg.log.wandb, identity, name, folder, told),
            )
        )  # fmt: skip
    if cfg.log.mlflow:
        trackers.append(
            Once(
                "MLflow", folder / "mlflow.json", cfg.resume,
                lambda identity: MLflow(cfg.log.mlflow, identity, name, told),
            )
        )  # fmt: skip
    return MetricsLog(run_dir, stage, first_step=first_step, trackers=trackers)


def _cells(rows: Rows) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table; what is no text or number stands in it as JSON."""
    names = list(rows[0]) if rows else []

    def cell(value: Any) -> Any:
        return value if isinstance(value, (str, int, float)) or value is None else json.dumps(value)

    return names, [[cell(row[name]) for name in names] for row in rows]


def flat(config: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
