"""Rank 0's side of the loop that is not training: the vLLM servers, their client, and the grader.

The servers are started first and awaited late, so that they come up while the trainer is being built or fine-tunes. The
other ranks have none of this: they hold None and receive what rank 0 made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_t1 import status
from megatron_t1.config import Config
from megatron_t1.data.template import Template
from megatron_t1.data.tokenizer import hidden_ids
from megatron_t1.files import raise_open_files_limit
from megatron_t1.models import spec_of
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.client import RolloutClient
from megatron_t1.rollout.frozen_heap import frozen_heap
from megatron_t1.servers.servers import Servers
from megatron_t1.trace import Trace


@dataclass(frozen=True)
class Rank0:
    servers: Servers
    client: RolloutClient
    scorer: Scorer
    trace: Trace = field(default_factory=Trace)


@contextmanager
def open_rank0(
    cfg: Config, template: Template, *, trainer_gpus: int = 0, trace: Trace | None = None, status_in: Path | None = None
) -> Iterator[Rank0]:
    """Start servers (or take those of `rollout.urls`), client and grader; end all of them on the way out.

    Args:
        trainer_gpus: the first GPUs of this host, which trainer ranks use (`gpus.of_trainer`).
        trace: where generation and grading are noted.
        status_in: folder of the files that `t1 watch` reads.
    """
    raise_open_files_limit()
    model_dir = Path(cfg.model.hf_path)
    with ExitStack() as stack:
        vocab_size = spec_of(model_dir).vocab_size
        hidden = hidden_ids(template.tokenizer, vocab_size)
        scorer = stack.enter_context(Scorer(cfg.reward, hidden_ids=hidden))
        servers = stack.enter_context(Servers(cfg.rollout, model_dir, cfg.run_dir, trainer_gpus=trainer_gpus)).start()
        trace = trace or Trace()
        client = stack.enter_context(RolloutClient(servers, template.tokenizer, vocab_size=vocab_size, trace=trace))
        stack.enter_context(frozen_heap())
        if status_in is not None:
            stack.enter_context(status.kept(status_in, servers, client, scorer))
        yield Rank0(servers, client, scorer, trace)
