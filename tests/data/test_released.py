"""The released SFT data, in the layouts that it may have, as lines that `t1 sft` reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from megatron_t1.data.config import DataConfig
from megatron_t1.data.prompts import load_sft
from megatron_t1.data.template import Template
from tests.forks import ROOT, environment

CHAIN = "<think>Try 3: no. Try 4: yes.</think>\\boxed{4}"
LAYOUTS = {
    "messages.jsonl": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": CHAIN}]},
    "sharegpt.json": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": CHAIN}]},
    "alpaca.parquet": {"instruction": "q", "input": "", "output": CHAIN},
    "alpaca.jsonl": {"instruction": "Add:", "input": "2 and 2", "output": CHAIN, "system": "Be short.", "history": []},
}


def converted(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, ROOT / "tools/t1_sft_data.py", out, "--source", source]
    return subprocess.run(words, capture_output=True, text=True, env=environment())


def test_every_layout_becomes_sft_lines(tmp_path: Path, tiny_dir: Path) -> None:
    source, out = tmp_path / "T1", tmp_path / "sft.jsonl"
    source.mkdir()
    (source / "dataset_infos.json").write_text(json.dumps({"default": {"splits": {"train": 3}}}))
    for name in ("messages.jsonl", "alpaca.jsonl"):
        (source / name).write_text(json.dumps(LAYOUTS[name]) + "\n")
    (source / "sharegpt.json").write_text(json.dumps([LAYOUTS["sharegpt.json"]]))
    parquet.write_table(pa.Table.from_pylist([LAYOUTS["alpaca.parquet"]]), source / "alpaca.parquet")
    done = converted(source, out)
    assert (done.returncode, done.stdout) == (0, f"4 chains: {out}\n"), done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    plain = [{"role": "user", "content": "q"}]
    joined = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Add:\n\n2 and 2"}]
    assert [(row["messages"], row["response"]) for row in rows] == [(asked, CHAIN) for asked in (joined, *[plain] * 3)]
    assert len(load_sft(out, Template(tiny_dir), DataConfig())) == 4


def test_a_row_of_another_layout_is_named(tmp_path: Path) -> None:
    bad = {
        "no question or no answer under a known name; the row has ['a']": {"a": 1},
        "no list of turns": {"messages": ["a", "b"]},
        "x.jsonl:3: the conversation is no list of turns": {"messages": "[]"},
        "a turn of ['user']": {"messages": [{"role": ["user"], "content": "q"}]},
        'earlier turns under "history"': {**LAYOUTS["alpaca.jsonl"], "history": [["q", "a"]]},
        "a turn without text": {**LAYOUTS["alpaca.jsonl"], "input": ["2"]},
    }
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad.values()))
    (tmp_path / "other.json").write_text("{}")
    done = converted(tmp_path / "x.jsonl", tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for message in bad:
        assert message in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
    assert "other.json can't be read as json" in converted(tmp_path, tmp_path / "out.jsonl").stderr
