"""Fixtures of all test files: a tiny model, processes on it, and the tiers that their use puts a test into."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_t1.servers import launch, servers, sources
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.servers import Servers
from tests.forks import ROOT, Forks, environment
from tests.tiny import make_tiny_qwen2

# A shell ignores Ctrl-C for what it starts in the background, and children inherit that; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Graders of tests import modules of tests, and no process of ours has the current folder on its path.
os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]

TIERS = {
    "forks": {"ranks"},
    "te_forks": {"ranks"},
    "start_t1": {"ranks", "servers"},
    "open_servers": {"servers"},
    "vllm_forks": {"servers"},
    "slurm": {"slurm"},
}
"""Fixture -> marks of the tests that use it, directly or through other fixtures. All else is `make test-fast`."""
STARTED = {"megatron_t1", "megatron_t1.servers.die_with_parent", "torch.distributed.run", "tests.workers.zygote"}
"""Words of the command lines that start ranks and servers: no test does it but through those fixtures."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks them, leaves out slow ones that nobody asked for, and puts the files that start most at the front."""
    if "slow" not in config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    num_marks: Counter[Path] = Counter()
    for item in items:
        marks = {mark for fixture in getattr(item, "fixturenames", ()) for mark in TIERS.get(fixture, ())}
        for mark in marks:
            item.add_marker(mark)
        num_marks[item.path] = max(num_marks[item.path], len(marks))
    items.sort(key=lambda item: -num_marks[item.path])


_running: pytest.Item | None = None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _running
    _running = item
    try:
        return (yield)
    finally:
        _running = None


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "subprocess.Popen" or _running is None or not STARTED & set(map(str, arguments[1])):
        return
    if not any(_running.get_closest_marker(mark) for marks in TIERS.values() for mark in marks):
        raise RuntimeError(f"{_running.nodeid} starts ranks or servers without a fixture of {sorted(TIERS)}")


sys.addaudithook(_guard)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with tied embeddings, float32, vocabulary 320 (tests.tiny)."""
    return make_tiny_qwen2(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Trainer processes."""
    started = Forks(("transformers.models.auto.modeling_auto", "megatron_t1.rl", "megatron_t1.pipeline"), environment())
    yield started
    started.close()


@pytest.fixture(scope="session")
def run_ranks(forks: Forks) -> Callable[..., str]:
    """`run_ranks(script, num_ranks, *arguments)`: what it said, stdout last; it must succeed."""

    def run(script: Path, num_ranks: int, *arguments: object, timeout_s: float = 600) -> str:
        done = forks.run(script, *arguments, num_ranks=num_ranks, timeout_s=timeout_s)
        told = f"{script.name} {arguments} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        assert done.returncode == 0, told
        return done.stderr + done.stdout

    return run


@pytest.fixture(scope="session")
def t1(forks: Forks) -> Callable[..., str]:
    """`t1(*arguments)`: the command's output, run in a fork; `num_ranks` of them, as srun starts them."""

    def run(*arguments: object, num_ranks: int = 1, expect: int = 0, timeout_s: float = 800) -> str:
        done = forks.run("megatron_t1", *arguments, num_ranks=num_ranks, timeout_s=timeout_s)
        output = done.stdout + done.stderr
        assert done.returncode == expect, output[-6000:]
        return output

    return run


@pytest.fixture(scope="session")
def start_t1() -> Callable[..., subprocess.Popen[str]]:
    """`start_t1(*arguments, **options of Popen)`: the command as a user starts it, with all its imports.

    `within`: words of a command that starts it.
    """

    def start(*arguments: object, within: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
        words = [*within, sys.executable, "-m", "megatron_t1", *map(str, arguments)]
        return subprocess.Popen(words, **{"text": True, "env": environment(), "cwd": ROOT, **options})

    return start


@pytest.fixture(scope="session")
def open_servers() -> Callable[..., AbstractContextManager[Servers]]:
    """The package's own `open_servers`: vLLM as a user starts it."""
    return servers.open_servers


@pytest.fixture(scope="session")
def vllm_forks() -> Iterator[Forks]:
    """Processes that have imported vLLM."""
    env = environment(**launch.environment(RolloutConfig(device="cpu"), index=0, key="", device="cpu"))
    started = Forks(("vllm.entrypoints.launchers.api_server.entry", "vllm.v1.engine.async_llm"), env)
    yield started
    started.close()


@pytest.fixture(scope="session")
def fork_servers(vllm_forks: Forks) -> Callable[..., AbstractContextManager[Servers]]:
    """`open_servers` whose vLLM processes are forked; one that is started again is not."""

    def fork(cfg: RolloutConfig, model_dir: Path, *, index, host, port, key, device, log):
        log.parent.mkdir(parents=True, exist_ok=True)
        _, _, module, *options = launch.command(cfg, model_dir, host=host, port=port, device=device)
        env = launch.environment(cfg, index=index, key=key, device=device)
        return vllm_forks.start(module, *options, env=env, stdout=log)[0]

    @contextmanager
    def open_forked(cfg: RolloutConfig, model_dir: Path, run_dir: Path) -> Iterator[Servers]:
        with Servers(cfg, model_dir, run_dir) as opened:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(sources, "launch", fork)
                opened.start()
            yield opened.wait_ready()

    return open_forked


@pytest.fixture(scope="session")
def server(fork_servers, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One vLLM server on `tiny_dir`. Tests push weights into it: assume nothing about what it holds at first."""
    cfg = RolloutConfig(device="cpu", dtype="float32", max_model_len=512, sync_timeout_s=60)
    with fork_servers(cfg, tiny_dir, tmp_path_factory.mktemp("server")) as servers:
        yield servers
