"""TRL's part of `peers.py`, run in TRL's environment; of ours it needs `megatron_t1.reward` alone (numpy and sympy).

    torchrun --nproc_per_node 2 benchmarks/peers_trl.py train MODEL DATA OUT --seed 0 --steps 60 --every 10
    python benchmarks/peers_trl.py evaluate SNAPSHOTS HELDOUT

`train` is the quickstart's RL with GRPOTrainer; `evaluate` samples with transformers, from snapshots of either trainer,
and writes accuracy.json beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from megatron_t1.reward.config import RewardConfig
from megatron_t1.reward.penalties import PenaltyConfig
from megatron_t1.reward.score import Scorer
from megatron_t1.types import Prompt, Sample

MAX_NEW_TOKENS = 160
SAMPLING = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "num_return_sequences": 4,
    "max_new_tokens": MAX_NEW_TOKENS,
}
"""Of the evaluation."""
# The quickstart's, but for `perplexity`: TRL has no logprobs of what transformers samples.
REWARD = RewardConfig(
    num_workers=1,
    penalties=PenaltyConfig(enabled=("repetition", "overlong", "malformed"), max_ngram_repeats=3, ngram_size=12),
)


def graded(
    scorer: Scorer, rows: list[tuple[str, str]], token_ids: list[list[int]], tokenizer
) -> list[tuple[float, bool]]:
    """Reward and verdict of responses to (question, gold)."""
    pairs = []
    for number, ((question, gold), ids) in enumerate(zip(rows, token_ids, strict=True)):
        prompt = Prompt(id=str(number), text=question, token_ids=np.zeros(1, np.int64), gold=gold)
        sample = Sample(
            token_ids=np.array(ids, np.int64),
            logprobs=np.zeros(0, np.float32),
            text=tokenizer.decode(ids, skip_special_tokens=True),
            finish_reason="stop" if tokenizer.eos_token_id in ids else "length",
            weight_versions=(),
            server="",
        )
        pairs.append((prompt, sample))
    return [(reward.value, reward.correct) for reward in scorer.score_all(pairs)]


def questions(path: Path, tokenizer) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["question"] = row["prompt"]
        asked = [{"role": "user", "content": row["question"]}]
        row["prompt"] = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return rows


class Snapshots(TrainerCallback):
    """As `rl.snapshot_every` writes them; their times are the clock of both trainers."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every

    def on_step_end(self, args, state, control, model, processing_class, **_):
        if state.is_world_process_zero and state.global_step % self.every == 0:
            path = self.folder / f"step_{state.global_step:06d}"
            getattr(model, "module", model).save_pretrained(path)
            processing_class.save_pretrained(path)


def train(asked: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    with Scorer(REWARD) as scorer:

        def reward(prompts, completions, completion_ids, question, answer, **_):
            return [
                value
                for value, _ in graded(scorer, list(zip(question, answer, strict=True)), completion_ids, tokenizer)
            ]

        config = GRPOConfig(
            output_dir=str(asked.out),
            seed=asked.seed,
            max_steps=asked.steps,
            num_generations=8,
            per_device_train_batch_size=128,  # 32 prompts x 8 samples over two processes
            max_completion_length=MAX_NEW_TOKENS,
            temperature=1.2,
            learning_rate=1e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            scale_rewards="none",
            entropy_coef=0.01,
            # beta stays 0: without the reference model, whose forward pass a step of ours has
            gradient_checkpointing=False,  # its default is on: slower, and needless at this size
            bf16=False,
            use_cpu=True,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,  # as torch's warning advises
            report_to="none",
            save_strategy="no",
            logging_steps=1,
        )
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(questions(asked.data, tokenizer)),
            processing_class=tokenizer,
            callbacks=[Snapshots(asked.out / "snapshots", asked.every)],
        ).train()


def evaluate(asked: argparse.Namespace) -> None:
    """pass@1 of every snapshot at temperature 1, four samples a question."""
    found = {}
    with Scorer(REWARD) as scorer:
        for path in sorted(asked.snapshots.glob("step_*")):
            tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            rows = questions(asked.heldout, tokenizer)
            told = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
            set_seed(0)
            with torch.inference_mode():
                sampled = model.generate(
                    **told,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    num_return_sequences=4,
                    max_new_tokens=MAX_NEW_TOKENS,
                )
            new = sampled[:, told["input_ids"].shape[1] :].tolist()
            end = tokenizer.eos_token_id
            ids = [each[: each.index(end) + 1] if end in each else each for each in new]
            golds = [(row["question"], row["answer"]) for row in rows for _ in range(4)]
            found[path.name] = float(np.mean([correct for _, correct in graded(scorer, golds, ids, tokenizer)]))
    (asked.snapshots / "accuracy.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    job = jobs.add_parser("train")
    job.set_defaults(do=train)
    job.add_argument("model", type=Path)
    job.add_argument("data", type=Path)
    job.add_argument("out", type=Path)
    job.add_argument("--seed", type=int, required=True)
    job.add_argument("--steps", type=int, required=True)
    job.add_argument("--every", type=int, required=True)
    job = jobs.add_parser("evaluate")
    job.set_defaults(do=evaluate)
    job.add_argument("snapshots", type=Path)
    job.add_argument("heldout", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.do(asked)


if __name__ == "__main__":
    main()
