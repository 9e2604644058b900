"""What `t1` says of itself: a line a command."""

from __future__ import annotations

USAGE = """\
usage: t1 COMMAND [--config FILE.yaml] [--section.field VALUE ...]

T1 reasoning RL (arXiv 2501.11651) on Megatron-Core and vLLM.

  run         SFT, evaluation, RL, evaluation, inference scaling and report, in one job
  sft         supervised fine-tuning of model.hf_path on data.sft
  rl          reinforcement learning of model.hf_path on data.train
  rollout     make and store the samples of rl.steps batches of data.train, without training
  replay      train a step of a run again, from its stored samples: `t1 replay runs/a --step 20`
  curate      make data.train: clean raw questions, keep those that model.hf_path solves in at most 30% of 16 samples
  evaluate    accuracy of model.hf_path (or an endpoint, or stored responses) on evaluate.sets or data.heldout
  compare     two evaluations, paired by question: `t1 compare runs/a/evaluate/sft runs/a/evaluate/rl`
  scaling     accuracy of model.hf_path on scaling.set or data.heldout against thinking budgets
  check       what would stop or spoil a run, and what it needs (`t1 check FILE.yaml --for rl --nodes 4 --vllm_nodes 2`)
  sync-check  push model.hf_path (--perturb: changed, and back) and hold every server's logprobs to the trainer's
  synthesize  SFT chains of trial, error and verification from questions, by any chat endpoints
  serve       start vLLM servers for model.hf_path and keep them up
  watch       a run on one page of the terminal, while it goes (`t1 watch RUN_DIR`)
  report      write the HTML report of a run; of several, one that compares them (`t1 report RUN_DIR ...`)
  grade       grade IN.jsonl into OUT.jsonl (`t1 grade IN.jsonl OUT.jsonl`), without any model
  convert     Hugging Face folder to Megatron checkpoint and back, and `verify`: compare two (`t1 convert --help`)
  logprobs    logprobs of given texts, and how far transformers or a server is (`t1 logprobs MODEL --input FILE`)
  quickstart-data   write the quickstart's task: questions, SFT traces, tokenizer, tiny model
  doctor      what is installed here, and what is missing for what

`t1 COMMAND --help` lists every option; `--print_config` after the options of a job shows what it would use.
"""


def line_of(command: str) -> str:
    return next(line.strip()[len(command) :].strip() for line in USAGE.splitlines() if line.split()[:1] == [command])
