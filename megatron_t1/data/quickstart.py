"""The quickstart's task: a tiny model half-learns it by SFT and masters it by RL, on two CPU cores in minutes.

Problem: `Find x: 9x+9=0 mod 8`. A response searches by trial, error and verification; thinking longer is trying more:

    <think>Try 4: 36+9=45 mod 8=5, no. Try 5: 45+9=54 mod 8=6, no. Try 7: 63+9=72 mod 8=0, yes. </think>\\boxed{7}

The SFT traces have no arithmetic slips but sometimes give up and guess, and jump about: about 56% of them are right. RL
has to find out that giving up does not pay. The task shows that the pipeline learns; it is too small to show what each
part of the recipe adds. Numbers are whole tokens (0..120): copying digits is what a model of this size cannot learn.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_t1.files import write_jsonl

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

NUM_HELD_OUT = 169
MAX_NUMBER = 120
"""The largest number of any trace: 9 * 10 + 30."""
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
WORDS = (
    "<think>", "</think>", "\\boxed{", "}", "Find x: ", "x+", "+", "=", " mod ",
    "Try ", ": ", ", no. ", ", yes. ", "Give up, guess ", ". ",
)  # fmt: skip
"""Tokens carry their own blanks, so that joining them gives the text back exactly."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(kw_only=True, frozen=True)
class QuickstartDataConfig:
    """What `write` makes; the seed decides the split, the traces and the initial weights."""

    out: Path
    """Folder that receives model/, sft.jsonl, rl.jsonl and heldout.jsonl."""
    num_sft_samples: int = 64_000
    """SFT traces, over the 641 training problems."""
    seed: int = 0
    """Same seed, same files."""

    def __post_init__(self) -> None:
        if self.num_sft_samples < 1:
            raise ValueError(f"num_sft_samples = {self.num_sft_samples} must be at least 1")


@dataclass(frozen=True)
class Problem:
    """Find x with a * x + b = 0 mod p; gcd(a, p) = 1, so there is exactly one in [0, p)."""

    a: int
    b: int
    p: int

    @property
    def id(self) -> str:
        return f"{self.a}x+{self.b}mod{self.p}"

    @property
    def text(self) -> str:
        return f"Find x: {self.a}x+{self.b}=0 mod {self.p}"

    @property
    def answer(self) -> int:
        return next(x for x in range(self.p) if (self.a * x + self.b) % self.p == 0)


def problems(seed: int) -> tuple[list[Problem], list[Problem]]:
    """(641 for training, 169 held out), disjoint."""
    every = [Problem(a, b, p) for p in range(7, 12) for a in range(2, 10) if math.gcd(a, p) == 1 for b in range(1, 31)]
    random.Random(seed).shuffle(every)
    return every[NUM_HELD_OUT:], every[:NUM_HELD_OUT]


def trace(problem: Problem, rng: random.Random) -> str:
    """One SFT response: from a random start one up each try; after a failed one 20% give up, 10% jump anywhere."""
    a, b, p = problem.a, problem.b, problem.p
    x = rng.randrange(p)
    tried: set[int] = set()
    steps = []
    while True:
        rest = (a * x + b) % p
        steps.append(f"Try {x}: {a * x}+{b}={a * x + b} mod {p}={rest}, {'no' if rest else 'yes'}. ")
        if rest == 0:
            break
        tried.add(x)
        if rng.random() < 0.2:
            x = rng.choice([guess for guess in range(p) if guess not in tried])
            steps.append(f"Give up, guess {x}. ")
            break
        x = rng.randrange(p) if rng.random() < 0.1 else (x + 1) % p
    return f"<think>{''.join(steps)}</think>\\boxed{{{x}}}"


def build_tokenizer() -> Qwen2Tokenizer:
    """One token a number or word, with the chat template; `decode` gives the text back without added blanks.

    `AutoTokenizer` reads the tokenizer of any Qwen2 checkpoint as a `Qwen2Tokenizer`, whose own splitting takes numbers
    apart. Every word is therefore an added token: those are matched first, the longest one at each place.
    """
    from transformers import AddedToken, Qwen2Tokenizer

    words = [*(str(number) for number in range(MAX_NUMBER + 1)), *WORDS]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*SPECIAL_TOKENS, *words])},
        merges=[],
        pad_token="<|pad|>",
        unk_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def _write_model(folder: Path, seed: int) -> None:
    """A random Qwen2 of 157,000 parameters in Hugging Face layout; a rerun replaces its files one by one."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    ids: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        dtype="float32",
        bos_token_id=None,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".model.") as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        for file in sorted(Path(tmp).iterdir()):
            file.replace(folder / file.name)


def write(cfg: QuickstartDataConfig) -> None:
    """Make `out`/model (tokenizer, config, random weights), sft.jsonl, rl.jsonl (train problems), heldout.jsonl."""
    train, held_out = problems(cfg.seed)
    _write_model(cfg.out / "model", cfg.seed)
    write_jsonl(cfg.out / "rl.jsonl", _questions(train))
    write_jsonl(cfg.out / "heldout.jsonl", _questions(held_out))
    rng = random.Random(cfg.seed + 1)
    picks = (rng.choice(train) for _ in range(cfg.num_sft_samples))
    write_jsonl(cfg.out / "sft.jsonl", ({"prompt": p.text, "response": trace(p, rng)} for p in picks))


def _questions(chosen: list[Problem]) -> Iterator[dict[str, str]]:
    for problem in chosen:
        yield {"id": problem.id, "prompt": problem.text, "answer": str(problem.answer)}
