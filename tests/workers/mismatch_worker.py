"""`t1 rl` whose bound of |trainer - servers| shrinks below rounding once the first weights were pushed.

argv: the command's options.
"""

from __future__ import annotations

import sys

from megatron_t1 import rl
from megatron_t1.cli.main import main

push = rl.Trainer.push


def push_and_shrink(self: rl.Trainer) -> None:
    push(self)
    rl.max_logprob_diff = lambda *_, **__: 1e-12


if __name__ == "__main__":
    rl.Trainer.push = push_and_shrink  # type: ignore[method-assign]
    sys.exit(main(["rl", *sys.argv[1:]]))
