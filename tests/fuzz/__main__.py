"""The long run: `python -m tests.fuzz --count 10000 [--only NAME ...] [--show]`. Exits 1 when something leaked."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.readers import all_readers
from tests.fuzz.run import fuzz

parser = argparse.ArgumentParser()
parser.add_argument("--count", type=int, default=10_000)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--only", nargs="*", default=[])
parser.add_argument("--show", action="store_true", help="some accepted inputs of every kind of damage")
arguments = parser.parse_args()
leaked = False
with tempfile.TemporaryDirectory() as tmp:
    readers = {reader.name: reader for reader in all_readers(Path(tmp))}
    for name in arguments.only or readers:
        tally = fuzz(readers[name], arguments.count, arguments.seed, show=arguments.show)
        print(tally.line(), flush=True)
        leaked = leaked or bool(tally.leaks)
sys.exit(leaked)
