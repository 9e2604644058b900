"""Bad input, through the real command: one message with place, value and remedy; nothing half-written."""

from __future__ import annotations

import json
import re
import resource
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from tests.forks import environment
from tests.test_loop import options
from tests.tiny import make_tiny_qwen2


def test_a_rank_that_fails_beside_others_is_not_taken_for_a_killed_one(start_t1):
    """A launcher ends it while rank 0 speaks; the batch script starts again what was killed, and not what is wrong."""
    with start_t1("sft", "--sft.batch_size", 0, env=environment(RANK="1"), stderr=subprocess.DEVNULL) as rank:
        while not int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{rank.pid}/status").read_text())[1], 16) & 1 << 14:
            time.sleep(0.05)
        rank.terminate()
        assert rank.wait() == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    make_tiny_qwen2(folder / "model")
    question = {"id": "1", "prompt": "1+1?", "answer": "2"}
    (folder / "rl.jsonl").write_text("".join(json.dumps({**question, "id": str(i)}) + "\n" for i in range(8)))
    (folder / "heldout.jsonl").write_text(json.dumps({"id": "h", "prompt": "2+2?", "answer": "4"}) + "\n")
    example = {"prompt": "1+1?", "response": "<think>2</think>\\boxed{2}"}
    (folder / "sft.jsonl").write_text((json.dumps(example) + "\n") * 64)
    return folder


@pytest.fixture
def refused(t1, data, tmp_path):
    """The command's output; it must fail with 1, and without a traceback."""

    def run(command, **overrides):
        output = t1(command, *options(data, tmp_path, **overrides), expect=1)
        assert "Traceback" not in output, output[-3000:]
        return output

    return run


def test_malformed_lines_are_named_by_file_and_line(refused, data, tmp_path):
    bad = tmp_path / "bad.jsonl"
    good = (data / "sft.jsonl").read_text()
    bad.write_text(good + '{"prompt": "x"}\nnot json\n' + good)
    output = refused("sft", **{"data.sft": bad})
    assert f'{bad}:65: "response" is missing or empty' in output
    assert f"{bad}:66: not valid JSON" in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rl.stepps": 3}, "stepps"),
        ({"rl.steps": 0}, "rl.steps = 0 must be at least 1"),
        ({"model.transformer": "{hidden_size: 128}"}, "which the checkpoint's config.json decides"),
        ({"model.transformer": "{hiden_size: 128}"}, "hiden_size"),
        ({"sampling.temperature": 0, "sampling.num_samples": 1}, "sampling.temperature = 0"),
        ({"parallel.max_tokens_per_microbatch": 8}, "does not fit into a microbatch of 8"),
        ({"data.sft": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"model.hf_path": "nowhere"}, "nowhere"),
    ],
)
def test_bad_settings_are_refused_with_the_value(overrides, message, refused):
    assert message in refused("sft", **overrides)


def test_a_config_that_the_model_family_does_not_understand(refused, tmp_path):
    other = make_tiny_qwen2(tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "use_sliding_window": True}))
    assert "use_sliding_window = True is not supported" in refused("sft", **{"model.hf_path": other})
    (other / "config.json").write_text(json.dumps({**config, "logit_softcap": 30}))
    assert "logit_softcap = 30" in refused("sft", **{"model.hf_path": other})


def test_a_port_in_use(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        output = refused("rl", **{"rollout.ports": f"[{port}]", "parallel.max_tokens_per_microbatch": 512})
    assert str(port) in output


def test_a_server_that_does_not_come_up_shows_the_end_of_its_log(refused):
    output = refused("rl", **{"rollout.vllm_args": "{no-such-option: 1}"})
    assert "no-such-option" in output


def test_a_full_disk_leaves_no_half_written_checkpoint(start_t1, data, tmp_path):
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    arguments = options(data, tmp_path, **{"sft.max_steps": 4, "sft.checkpoint.every_steps": 2})
    process = start_t1("sft", *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=limit)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "Traceback" not in output, output[-3000:]
    assert "could not be written" in output
    finished = list((tmp_path / "sft/checkpoints").glob("step_????????"))
    assert not finished, "a checkpoint that could not be written whole must not look finished"
