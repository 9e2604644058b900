"""A job that does not train asks the weights of its folder, whoever started the servers: held against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_t1.asking import run_curate, run_evaluate, run_rollout, run_scaling
from megatron_t1.config import Config, CurateConfig, RLConfig, ScalingConfig
from megatron_t1.data.config import DataConfig
from megatron_t1.engine.config import ModelConfig
from megatron_t1.evaluation.config import EvaluateConfig
from megatron_t1.fields import FieldError
from megatron_t1.push.sync import serve_folder
from megatron_t1.reward.config import RewardConfig
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.servers.config import RolloutConfig
from megatron_t1.servers.registry import Registry
from megatron_t1.servers.servers import Servers
from megatron_t1.synthesize.config import SynthesizeConfig
from megatron_t1.synthesize.run import synthesize
from tests.push import reference
from tests.tiny import make_tiny_qwen2
from tests.workers.trainer import NoText

SAMPLING = SamplingConfig(temperature=1.0, num_samples=2, max_new_tokens=8)


@pytest.fixture
def other(server: Servers, tmp_path: Path) -> Path:
    """A model that the server does not hold."""
    return make_tiny_qwen2(tmp_path / "other", seed=sum(map(ord, tmp_path.name)))


def given(server: Servers, folder: Path, how: str, **options: object) -> RolloutConfig:
    """The running server as `rollout.urls` or `rollout.await_servers` bring it to a job with `folder` for servers."""
    options = {"device": "cpu", "key_file": str(server.run_dir / "server_key"), **options}
    if how == "urls":
        return RolloutConfig(urls=(server.all[0].url,), **options)
    Registry(folder / "servers").announce("node_0", server.all[0].url, Path("x.log"))
    return RolloutConfig(await_servers=1, **options)


def assert_holds(server: Servers, folder: Path) -> None:
    server.all[0].introduce()  # another list pushed into it
    server.required_version = server.all[0].version
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with RolloutClient(server, NoText(), vocab_size=320) as client:
        ((sample, _),) = client.complete_tokens([[40, 50, 60]], SAMPLING, seed=0)
    expected = reference.logprobs(model, [40, 50, 60], sample.token_ids.tolist(), SAMPLING.temperature)
    np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("how", ["urls", "awaited"])
def test_servers_that_were_not_started_here_get_the_folder(
    how: str, server: Servers, other: Path, tmp_path: Path
) -> None:
    cfg = given(server, tmp_path, how, device="cuda" if how == "awaited" else "cpu")
    servers = Servers(cfg, other, tmp_path).start()
    serve_folder(servers)
    assert servers.transport == {"urls": "shm", "awaited": "tcp"}[how], "this process has no GPU to push from"
    assert len(servers.usable()) == 1
    assert_holds(server, other)


def test_what_servers_read_by_themselves_is_not_pushed(tiny_dir: Path, tmp_path: Path) -> None:
    assert Servers(RolloutConfig(device="cpu"), tiny_dir, tmp_path).read_model_dir
    assert not Servers(RolloutConfig(device="cpu", load_weights=False), tiny_dir, tmp_path).read_model_dir
    assert not Servers(RolloutConfig(device="cpu", await_servers=1), tiny_dir, tmp_path).read_model_dir
    assert not Servers(RolloutConfig(device="cpu", urls=("http://h",)), tiny_dir, tmp_path).read_model_dir


JOBS: dict[str, Callable[[Config], None]] = {
    "evaluate": lambda cfg: run_evaluate(cfg, "x"),
    "scaling": lambda cfg: run_scaling(cfg, "x"),
    "rollout": run_rollout,
    "curate": run_curate,
}


@pytest.mark.parametrize("job", JOBS)
def test_every_job_asks_awaited_servers_its_own_model(job: str, server: Servers, other: Path, tmp_path: Path) -> None:
    rows = [{"id": f"q{i}", "prompt": f"{i}+7?", "answer": "7"} for i in range(2)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = tmp_path / "run"
    cfg = Config(
        run_dir=str(run_dir),
        model=ModelConfig(hf_path=str(other), dtype="float32"),
        data=DataConfig(train=str(tmp_path / "q.jsonl"), heldout=str(tmp_path / "q.jsonl")),
        rollout=given(server, run_dir, "awaited"),
        sampling=SAMPLING,
        reward=RewardConfig(num_workers=1),
        rl=RLConfig(steps=1, prompts_per_step=2),
        evaluate=EvaluateConfig(sampling=SAMPLING),
        scaling=ScalingConfig(sampling=SAMPLING, budgets=(4,), max_answer_tokens=2),
        curate=CurateConfig(inputs=(str(tmp_path / "q.jsonl"),), num_samples=2),
    )
    JOBS[job](cfg)
    assert_holds(server, other)


@pytest.mark.parametrize("how", ["urls", "awaited"])
def test_synthesis_asks_its_own_model(how: str, server: Servers, other: Path, tmp_path: Path) -> None:
    questions, out = tmp_path / "q.jsonl", tmp_path / "out"
    questions.write_text(json.dumps({"id": "q", "prompt": "1+1?", "answer": "2"}) + "\n")
    rollout = given(server, out / "servers", how)
    synthesize(
        SynthesizeConfig(
            questions=str(questions),
            out=str(out),
            model=str(other),
            rollout=rollout,
            num_attempts=2,
            reward=RewardConfig(num_workers=1),
        )
    )
    assert_holds(server, other)


def test_another_model_does_not_answer_from_awaited_servers(tiny_dir: Path, tmp_path: Path) -> None:
    """Nor is anything asked before that is said."""
    cfg = Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(hf_path=str(tiny_dir)),
        rollout=RolloutConfig(await_servers=2),
        scaling=ScalingConfig(answer_model="other"),
    )
    with pytest.raises(FieldError, match=r"scaling.answer_model = 'other' .*rollout.await_servers = 2.* Leave it out"):
        run_scaling(cfg, "x")
    assert not (tmp_path / "run").exists()
