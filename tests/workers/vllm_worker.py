"""Loads one folder after the other into vLLM's engine, in this process, and writes the logprobs of given texts.

argv: {family: folder} as JSON, file for {family: [[logprob of every token but the first] of every text]} as JSON.
One process for all families: importing vLLM costs more than loading a tiny model.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from tests.engine.batch import make_sequences
from tests.models.families import VOCAB


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    texts = [[*s.prompt_ids.tolist(), *s.response_ids.tolist()] for s in make_sequences(VOCAB)]
    logprobs = {}
    for family, folder in json.loads(sys.argv[1]).items():
        llm = LLM(
            folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, kv_cache_memory_bytes=64 << 20,
            max_model_len=256, max_num_seqs=16, enable_prefix_caching=False, enable_chunked_prefill=False,
            max_num_batched_tokens=2048, disable_log_stats=True,
        )  # fmt: skip
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
        logprobs[family] = [
            [entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], text[1:], strict=True)]
            for out, text in zip(outputs, texts, strict=True)
        ]
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
    Path(sys.argv[2]).write_text(json.dumps(logprobs))


if __name__ == "__main__":
    main()
