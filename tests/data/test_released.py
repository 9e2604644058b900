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
}


def converted(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, ROOT / "tools/t1_sft_data.py", out, "--source", source]
    return subprocess.run(words, capture_output=True, text=True, env=environment())


def test_every_layout_becomes_sft_lines(tmp_path: Path, tiny_dir: Path) -> None:
    source, out = tmp_path / "T1", tmp_path / "sft.jsonl"
    source.mkdir()
    (source / "messages.jsonl").write_text(json.dumps(LAYOUTS["messages.jsonl"]) + "\n")
    (source / "sharegpt.json").write_text(json.dumps([LAYOUTS["sharegpt.json"]]))
    parquet.write_table(pa.Table.from_pylist([LAYOUTS["alpaca.parquet"]]), source / "alpaca.parquet")
    done = converted(source, out)
    assert (done.returncode, done.stdout) == (0, f"3 chains: {out}\n"), done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["messages"], row["response"]) for row in rows] == [([{"role": "user", "content": "q"}], CHAIN)] * 3
    assert len(load_sft(out, Template(tiny_dir), DataConfig())) == 3


def test_a_row_of_another_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"a": 1}) + "\n")
    done = converted(tmp_path / "x.jsonl", tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert "no question or no answer under a known name; the row has ['a']" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
