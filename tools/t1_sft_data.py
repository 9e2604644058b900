"""The SFT data that T1's authors released (dataset THUDM/T1 of the Hugging Face hub) as lines for `data.sft`.

    python tools/t1_sft_data.py runs/t1_sft.jsonl                        # from the hub, or what its cache has
    python tools/t1_sft_data.py runs/t1_sft.jsonl --source ~/data/T1     # a local copy: a folder, or a file of it

The files' layout is documented nowhere that we know of, so the usual ones are read: a conversation under "messages" or
"conversations", or a question and an answer under their usual names ("instruction" with its "input"), and "system"
before either. A row of none of them is an error that names it, as is a file of no rows but for those that describe a
dataset (dataset_infos.json).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_t1.data.sets import parse_file
from megatron_t1.files import write_jsonl

REPO = "THUDM/T1"
SUFFIXES = (".jsonl", ".json", ".parquet")
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "croissant.json")
CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "problem", "question", "instruction", "query", "input")
ANSWERS = ("response", "solution", "output", "completion", "answer")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, help="local copy; without it the hub is asked")
    args = parser.parse_args()
    try:
        rows = [row for path in files_of(args.source or fetched()) for row in parse_file(path, sft_row)]
    except (ValueError, OSError) as error:
        parser.exit(1, f"t1_sft_data: error: {error}\n")
    write_jsonl(args.out, rows)
    print(f"{len(rows)} chains: {args.out}")


def fetched() -> Path:
    """The dataset in the hub's cache on this machine."""
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    return Path(snapshot_download(REPO, repo_type="dataset", allow_patterns=patterns))


def files_of(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    found = sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.name not in DESCRIPTIONS)
    if not found:
        raise ValueError(f"{source} holds no file ending in {', '.join(SUFFIXES)}")
    return found


def sft_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """{"id", "messages", "response"}; the response has the thinking and the answer."""
    identity = str(row.get("id") or number)
    if row.get("history"):
        raise ValueError('earlier turns under "history", which is not read: make "messages" of them')
    if (turns := first(row, CONVERSATIONS)) is not None:
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("the conversation is no list of turns with a role and a text")
        messages = [{"role": role_of(turn), "content": text_of(turn)} for turn in turns]
    else:
        question, answer = first(row, QUESTIONS), first(row, ANSWERS)
        if not isinstance(question, str) or not isinstance(answer, str):
            raise ValueError(f"no question or no answer under a known name; the row has {sorted(row)}")
        if question == row.get("instruction") and row.get("input"):
            question += "\n\n" + text_of({"content": row["input"]})
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if row.get("system"):
        messages = [{"role": "system", "content": text_of({"content": row["system"]})}, *messages]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("the conversation does not end with an answer of the assistant")
    return {"id": identity, "messages": messages[:-1], "response": messages[-1]["content"]}


def first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name)), None)


def role_of(turn: dict[str, Any]) -> str:
    said = turn.get("role") or turn.get("from")
    if not isinstance(said, str) or said not in ROLES:
        raise ValueError(f"a turn of {said!r:.40}, which is none of {', '.join(ROLES)}")
    return ROLES[said]


def text_of(turn: dict[str, Any]) -> str:
    text = turn.get("content") or turn.get("value")
    if not isinstance(text, str):
        raise ValueError("a turn without text")
    return text


if __name__ == "__main__":
    main()
