"""Readers of what a run left: checkpoints, verdicts, registries, keys, locks."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_t1 import lock
from megatron_t1.evaluation import results
from megatron_t1.evaluation.resume import check_settings
from megatron_t1.files import read_jsonl
from megatron_t1.rollout.finished_samples import Bank
from megatron_t1.servers.keys import read_key
from megatron_t1.servers.registry import Entry, Orders, Registry
from megatron_t1.servers.server import ServerError
from megatron_t1.types import Sample
from tests.fuzz.reader import (
    Damage,
    Reader,
    ToldError,
    bytes_damage,
    check_ids,
    from_file,
    is_text,
    json_damage,
    jsonl,
    jsonl_damage,
    must,
)


def state_readers(tmp: Path) -> list[Reader]:
    from megatron_t1.engine import checkpoint

    folder = tmp / "rl" / "step_00000003"
    folder.mkdir(parents=True)
    (folder / "a.distcp").write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    state = {"step": 3, "score": -1.5, "files": {"a.distcp": [3, digest]}, "experts_apart": False, "seed": 1}
    state |= {"settings": {"seed": 1, "rl.optim": {"lr": 1e-6}}}
    metrics = [{"step": 1, "loss": 1.5}, {"step": 2, "loss": float("nan")}]
    responses = [
        {"id": "a", "sample": 0, "gold": "7", "response": "x", "reward": {"correct": True, "outcome": "correct"}},
        {"id": "a", "sample": 1, "gold": "7", "response": "y", "reward": {"correct": False, "outcome": "wrong"}},
    ]
    settings = {"weights": "ab", "sampling": {"temperature": 1.2}, "seed": 1}
    summary = {
        "settings": {"step": 3}, "label": "rl", "set": "x", "num_samples": 4, "pass_at_1": 0.5, "interval": [0.4, 0.6],
    }  # fmt: skip
    entry = {"url": "http://host:8000", "start": "ab", "log": "/logs/x"}
    orders = {"trainers_turn": True, "given_up": ["ab", "cd"]}
    key = b"abcdefghijklmnopqrstuvwxyz_-012345"
    owner = {
        "host": "h",
        "boot": "b",
        "processes": "pid:[1]",
        "process": 1,
        "started": 2,
        "job": "",
        "turn": "",
        "id": "ab",
    }
    (tmp / "registry").mkdir()
    (tmp / "eval").mkdir()
    set_folder = tmp / "evaluate" / "rl" / "x"
    set_folder.mkdir(parents=True)

    def read_state(path: Path) -> Any:
        state = checkpoint.state_of(path.parent)
        return state, checkpoint._spoiled(path.parent, state.get("files", {}), 0, 1)

    def check_state(found: tuple[dict[str, Any], dict[str, str]]) -> None:
        state, problems = found
        if not state or problems:
            raise ToldError
        must(type(state["step"]) is int and state["files"], state)
        assert type(state.get("settings", {})) is dict
        assert type(state.get("experts_apart", False)) is bool
        assert type(state.get("score", 0)) in (int, float)

    def check_rows(found: list[dict[str, Any]]) -> None:
        assert type(found) is list
        assert all(type(row) is dict for row in found)

    def check_verdicts(found: dict[str, dict[str, list[bool]]]) -> None:
        for name, verdicts in found["eval"].items():
            is_text(name)
            assert all(type(verdict) is bool for verdict in verdicts)

    def check_entries(found: dict[str, Entry]) -> None:
        for entry in found.values():
            must(type(entry) is Entry and (not entry.url or entry.url.startswith("http://")), entry)
            is_text(entry.url), is_text(entry.log), is_text(entry.start)

    def check_orders(found: Orders) -> None:
        must(type(found.trainers_turn) is bool and all(type(start) is str for start in found.given_up), found)

    def check_key(found: str) -> None:
        assert re.fullmatch(r"[!-~]+", found), found

    def read_lock(path: Path) -> Any:
        other = lock._read(path)
        return other, lock._describe(other), lock._why_gone(path, other, lock._me())

    def check_lock(found: Any) -> None:
        if found[0] is None:
            raise ToldError
        is_text(found[1])

    bank = Bank(tmp / "bank")
    sample = Sample(
        token_ids=np.array([1, 2]),
        logprobs=np.array([-1.0, -2.0], np.float32),
        text="x",
        finish_reason="stop",
        weight_versions=((0, 0, 2),),
        server="http://x",
    )
    bank.step(1, "same").add("p", [5], 0, [sample])
    banked = (tmp / "bank" / "step_00000001.jsonl").read_bytes()
    banked_rows = [json.loads(banked)]

    def check_banked(found: list[Sample] | None) -> None:
        for sample in found or ():
            check_ids(sample.token_ids)
            assert sample.logprobs.dtype == np.float32
            assert len(sample.logprobs) == len(sample.token_ids)
            assert np.isfinite(sample.logprobs).all()
            is_text(sample.text)
            assert sample.finish_reason in ("stop", "length")

    def reader(name: str, damaged: Damage, path: Path, read: Any, check: Any, seed: bytes, **more: Any) -> Reader:
        return Reader(
            name=name,
            damaged=damaged,
            read=from_file(path, read),
            check=check,
            seeds=[seed],
            **{"says": path.name, **more},
        )

    def dumped(value: Any) -> bytes:
        return json.dumps(value).encode()

    return [
        reader("state.json", json_damage(state), folder / "state.json", read_state, check_state, dumped(state)),
        reader("metrics", jsonl_damage(metrics), tmp / "metrics.jsonl", read_jsonl, check_rows, jsonl(metrics),
               says=r"metrics\.jsonl:\d+: "),
        reader("responses", jsonl_damage(responses), tmp / "eval" / "responses.jsonl",
               lambda path: results._by_set(path.parent), check_verdicts, jsonl(responses),
               says=r"responses\.jsonl:\d+: "),
        reader("settings.json", json_damage(settings), tmp / "settings.json",
               lambda path: check_settings(path, settings, resume=True, elsewhere="another"),
               lambda found: None, dumped(settings), says=re.escape(str(tmp))),
        reader("summary.json", json_damage(summary), set_folder / "summary.json",
               lambda path: results.table(results.read_summaries(tmp)), is_text, dumped(summary)),
        reader("bank", jsonl_damage(banked_rows), tmp / "bank" / "step_00000001.jsonl",
               lambda path: bank.step(1, "same").find([5], 0, 1), check_banked, banked,
               says=r"step_00000001\.jsonl(:\d+: | holds damaged samples)"),
        reader("registry", json_damage(entry), tmp / "registry" / "s.json",
               lambda path: Registry(path.parent).entries(), check_entries, dumped(entry), errors=(ServerError,)),
        reader("orders", json_damage(orders), tmp / "registry" / "orders",
               lambda path: Registry(path.parent).orders(), check_orders, dumped(orders), errors=(ServerError,)),
        reader("key", bytes_damage(key), tmp / "server_key", read_key, check_key, key, errors=(ServerError,)),
        reader("lock", json_damage(owner), tmp / "lock.json", read_lock, check_lock, dumped(owner)),
    ]  # fmt: skip
