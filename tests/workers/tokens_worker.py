"""Texts with a token that the model has no row for, by each way into a trainer; rank 0 prints what each says as JSON.

argv: folder of the model, folder of the run, that token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megatron_t1.platform.detect import setup


def main() -> None:
    model_dir, run_dir, token = sys.argv[1], sys.argv[2], int(sys.argv[3])
    platform = setup()
    from megatron_t1 import sft
    from megatron_t1.config import Config, SFTConfig
    from megatron_t1.engine.config import ModelConfig, ParallelConfig
    from megatron_t1.engine.parallel import initialize, is_main
    from megatron_t1.learner import Learner
    from megatron_t1.metrics import Stopwatch
    from megatron_t1.types import Prompt, TrainSequence

    parallel = ParallelConfig(tensor=2)
    initialize(parallel, platform, 0)
    cfg = Config(
        model=ModelConfig(hf_path=model_dir, dtype="float32"), run_dir=run_dir, parallel=parallel,
        sft=SFTConfig(batch_size=1, epochs=1),
    )  # fmt: skip
    learner = Learner(cfg, platform, Stopwatch())
    prompt = Prompt(id="0", text="", token_ids=np.array([5, token, 7]), gold="")
    asked, answered = (np.array([5, token, 7]), np.array([8])), (np.array([5]), np.array([token, 8]))
    ways: dict[str, Callable[[], object]] = {"prompts of RL": lambda: learner.resume([prompt])}
    for what, (prompt_ids, response_ids) in {"prompt": asked, "response": answered}.items():
        texts = [TrainSequence(prompt_ids=prompt_ids, response_ids=response_ids)]
        own = replace(cfg, run_dir=f"{run_dir}/{what}")
        ways[f"SFT, {what}"] = lambda own=own, texts=texts: sft.train(own, platform, texts)
        ways[f"logprobs, {what}"] = lambda texts=texts: learner.engine.logprobs(texts)
    said = {}
    for name, way in ways.items():
        try:
            way()
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    if is_main():
        print(json.dumps(said))


if __name__ == "__main__":
    main()
