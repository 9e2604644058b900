#!/usr/bin/env python3
"""`t1 convert` from a checkout: `tools/convert_hf.py to-megatron HF_DIR OUT --tp 8`, `to-hf CKPT OUT`, `verify A B`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_t1.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
