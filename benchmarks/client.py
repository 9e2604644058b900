"""What a client costs: 5,000 requests against a CPU vLLM server at full concurrency, by each client in turn.

    python -m benchmarks.client [--model HF_FOLDER] [--requests 5000]

Shown for each: CPU seconds of the client and of the server's processes while the requests ran, their ratio, and the
client's resident memory after a fifth of the requests and at the end. CPU seconds, because wall time says little on a
shared machine. Every client runs in a process of its own, so that its CPU and memory are its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

MAX_TOKENS = 160  # as the evaluation of the quickstart asks
CLIENTS = ("evaluate, our servers", "evaluate, chat endpoint", "openai package, same requests")


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and all its living descendants."""
    root = psutil.Process(pid)
    return sum(sum(process.cpu_times()[:2]) for process in [root, *root.children(recursive=True)])


def measured(client: str, url: str, key_file: str, model: str, num_requests: int) -> dict[str, float]:
    """Run one client in this process; what it cost."""
    me, rss = psutil.Process(), []

    def done(count: int) -> None:
        if count in (num_requests // 5, num_requests):
            rss.append(me.memory_info().rss / 2**20)

    with {CLIENTS[0]: _servers, CLIENTS[1]: _chat, CLIENTS[2]: _openai}[client](url, key_file, model) as run:
        run(10, lambda count: None)  # connections, imports, the template: once for all
        before = sum(me.cpu_times()[:2])
        run(num_requests, done)
        return {"cpu_s": sum(me.cpu_times()[:2]) - before, "rss_fifth_mb": rss[0], "rss_end_mb": rss[1]}


Run = Callable[[int, Callable[[int], None]], None]


def _questions(num_requests: int) -> list:
    from megatron_t1.data.prompts import Question

    return [
        Question(
            id=f"q{i}", messages=[{"role": "user", "content": f"Find x: {i % 7 + 2}x+{i % 29 + 1}=0 mod 11"}], gold="1"
        )
        for i in range(num_requests)
    ]


def _sampler_run(sampler) -> Run:
    from megatron_t1.evaluation.samplers import Ask
    from megatron_t1.rollout.config import SamplingConfig

    sampling = SamplingConfig(temperature=1.0, num_samples=1, max_new_tokens=MAX_TOKENS)

    def run(count: int, done: Callable[[int], None]) -> None:
        asks, finished = [Ask(question, 0, 1) for question in _questions(count)], 0

        def on_done(*_: object) -> None:
            nonlocal finished
            finished += 1
            done(finished)

        sampler.sample(asks, sampling, 0, on_done)

    return run


class _NoGrader:
    """Grading has its own benchmark; here it would hide the client."""

    async def score(self, prompt, sample):
        from megatron_t1.types import Reward

        return Reward(value=0.0, correct=False, outcome="wrong", extracted=None, reason="")


@contextmanager
def _servers(url: str, key_file: str, model: str) -> Iterator[Run]:
    from megatron_t1.config import Config
    from megatron_t1.data.template import Template
    from megatron_t1.engine.config import ModelConfig
    from megatron_t1.evaluation.samplers import ServerSampler
    from megatron_t1.rank0 import Rank0, open_rank0
    from megatron_t1.servers.config import RolloutConfig

    template = Template(Path(model))
    with tempfile.TemporaryDirectory() as run_dir:
        rollout = RolloutConfig(urls=(url,), key_file=key_file)
        cfg = Config(run_dir=run_dir, model=ModelConfig(hf_path=model), rollout=rollout)
        with open_rank0(cfg, template) as rank0:
            rank0.servers.wait_ready()
            yield _sampler_run(ServerSampler(Rank0(rank0.servers, rank0.client, _NoGrader()), template))


@contextmanager
def _chat(url: str, key_file: str, model: str) -> Iterator[Run]:
    from megatron_t1.evaluation.samplers import EndpointSampler
    from megatron_t1.rollout.config import EndpointConfig

    yield _sampler_run(EndpointSampler(EndpointConfig(urls=(url,), key_file=key_file), _NoGrader()))


@contextmanager
def _openai(url: str, key_file: str, model: str) -> Iterator[Run]:
    import httpx
    from openai import AsyncOpenAI

    from megatron_t1.rollout.chat_endpoint import run_workers

    async def main(count: int, done: Callable[[int], None]) -> None:
        limits = httpx.Limits(max_connections=1024, max_keepalive_connections=1024)
        http = httpx.AsyncClient(limits=limits, timeout=3600)
        waiting, finished = iter(_questions(count)), 0
        async with AsyncOpenAI(base_url=url + "/v1", api_key=Path(key_file).read_text(), http_client=http) as client:

            async def work() -> None:
                nonlocal finished
                for question in waiting:
                    await client.chat.completions.create(
                        model="policy", messages=question.messages, max_tokens=MAX_TOKENS, temperature=1.0
                    )
                    finished += 1
                    done(finished)

            await run_workers(1024, work)

    yield lambda count, done: asyncio.run(main(count, done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder; default: the quickstart's model, and one of 3 million")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        client, url, key_file, model = args.one
        print(json.dumps(measured(client, url, key_file, model, args.requests)))
        return

    from megatron_t1.data.quickstart import QuickstartDataConfig, write
    from tests.tiny import make_tiny_qwen2

    columns = ("model", "client", "client CPU s", "server CPU s", "ratio", "client ms a request", "server ms",
               "RSS MiB after 1/5", "at the end")  # fmt: skip
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            compare(args.model, Path(folder), args.requests)
            return
        write(QuickstartDataConfig(out=Path(folder), num_sft_samples=1))
        compare(Path(folder) / "model", Path(folder), args.requests)
        large = make_tiny_qwen2(Path(folder) / "large", hidden_size=256, intermediate_size=1024, num_layers=3)
        compare(large, Path(folder), args.requests)


def compare(model: str | Path, folder: Path, num_requests: int) -> None:
    """Prints a row of the table for every client."""
    from megatron_t1.servers.config import RolloutConfig
    from megatron_t1.servers.keys import KEY_FILE
    from megatron_t1.servers.servers import open_servers

    cfg = RolloutConfig(device="cpu", dtype="float32", max_model_len=256, startup_timeout_s=1500)
    weights_mb = sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) / 1e6
    with open_servers(cfg, model, folder) as servers:
        server = servers.all[0]
        assert server.process is not None
        for client in CLIENTS:
            before = tree_cpu_s(server.process.pid)
            command = [sys.executable, "-m", "benchmarks.client", "--requests", str(num_requests)]
            command += ["--one", client, server.url, str(folder / KEY_FILE), str(model)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            server_s, client_s = tree_cpu_s(server.process.pid) - before, found["cpu_s"]
            per_request = (1000 * seconds / num_requests for seconds in (client_s, server_s))
            print(
                f"| {weights_mb:.1f} MB | {client} | {client_s:.2f} | {server_s:.1f} | {client_s / server_s:.1%} | "
                + " | ".join(f"{ms:.2f}" for ms in per_request)
                + f" | {found['rss_fifth_mb']:.0f} | {found['rss_end_mb']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
