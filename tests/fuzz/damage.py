"""One generator of damaged inputs: bytes that a disk, an editor or a network spoils, values that a program gets wrong.

A structure is a JSON value; `spoil` changes one place in it, and `raw` keeps what no value can say (1e999, a key that
is there twice).
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

_RAW = re.compile(r'"@raw(.*?)@"')
_TWICE = "@twice@"
NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 40, "-" + "9" * 40, "9" * 5000, "-1", "0")
NUMBERS += ("1.5", "1e3", "2147483648", "9223372036854775808", "-9223372036854775809")
WORDS = ("", " ", "\0", "\ud800", "\ufeff", "é" * 3, "x" * 70_000, "true", "null", "1", "1e999", "../../etc/passwd")
WORDS += ("a\nb", "a\rb", "\u2028", "/", ".", "~", "${HOME}", "{{ 1 / 0 }}", "<think>", "%s%n", "１２")
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [None],
    {"a": 1},
    [[1]],
    [{}],
    {"content": []},
    ["x"],
    [1, 2],
    0.5,
)


def raw(text: str) -> str:
    """In a structure, `text` itself where the value would stand."""
    return f"@raw{text}@"


def dumps(value: Any, ensure_ascii: bool = True) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii)
    return _RAW.sub(lambda match: match[1], text).replace(_TWICE, "")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside, containers before what they hold."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [at] if at else []
    for key, each in list(inner)[:40]:
        found += places(each, (*at, key))
    return found


def spoil(value: Any, rng: random.Random) -> tuple[Any, str]:
    """The value with one place changed, and what was done."""
    value = copy.deepcopy(value)
    found = places(value)
    if not found or rng.random() < 0.02:
        return _other(rng), "whole value"
    *way, key = rng.choice(found)
    parent = value
    for step in way:
        parent = parent[step]
    old = parent[key]
    action = rng.choice(_ACTIONS if isinstance(parent, dict) else _ACTIONS[:5])
    if action == "other":
        parent[key] = _other(rng)
    elif action == "number":
        parent[key] = raw(rng.choice(NUMBERS))
    elif action == "word":
        parent[key] = rng.choice(WORDS)
    elif action == "wrapped":
        parent[key] = rng.choice([lambda: [old], lambda: {"a": old}, lambda: str(old), lambda: [old, old]])()
    elif action == "missing":
        del parent[key]
    elif action == "deep":
        depth = rng.choice((50, 900, 20_000))
        opening, closing = rng.choice((("[", "]"), ("{'a':", "}")))
        parent[key] = raw(opening * depth + "1" + closing * depth)
    elif action == "twice":
        parent[_TWICE + key] = rng.choice([old, _other(rng)])
    elif action == "renamed":
        parent[rng.choice((key + "s", key.upper(), "\ufeff" + key, key[1:], "", " " + key))] = parent.pop(key)
    elif action == "unknown":
        parent[rng.choice(WORDS)] = _other(rng)
    return value, action


_ACTIONS = ("other", "number", "word", "wrapped", "missing", "deep", "twice", "renamed", "unknown")


def _other(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(OTHERS))


def text_of(value: Any, rng: random.Random) -> bytes:
    """A structure as JSON bytes, non-ASCII escaped or not."""
    text = dumps(value, rng.random() < 0.5)
    text = re.sub(r"\{'a':", '{"a":', text)
    return text.encode("utf-8", "surrogatepass")


def flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _any_byte(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(1) + data[at + 1 :]


def _slice(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 1, 2, 7, 30, 300)))


def _deleted(data: bytes, rng: random.Random) -> bytes:
    start, end = _slice(data, rng)
    return data[:start] + data[end:]


def _doubled(data: bytes, rng: random.Random) -> bytes:
    start, end = _slice(data, rng)
    return data[:end] + data[start:]


def _inserted(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(_INSERTS) + data[at:]


def _zeroed(data: bytes, rng: random.Random) -> bytes:
    start, end = _slice(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def _recoded(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(rng.choice(("latin-1", "utf-16", "utf-16-le", "utf-32", "cp1252")), "replace")


def _line_ends(data: bytes, rng: random.Random) -> bytes:
    return data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"\x85", "\u2028".encode(), b"\x0b", b"")))


_INSERTS = (
    b"\0",
    b"\xff",
    b"\xe4",
    b"\xef\xbb\xbf",
    b'"',
    b"'",
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"\r",
)
_INSERTS += (
    b"\t",
    b"#",
    b"&a ",
    b"*a",
    b"!!python/object:os.system ",
    b"- ",
    b"NaN",
    b"1e999",
    b"\xed\xa0\x80",
    b"\x1a",
)
BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": lambda data, rng: data[: rng.randrange(len(data))],
    "bit flipped": flip,
    "other byte": _any_byte,
    "slice deleted": _deleted,
    "slice doubled": _doubled,
    "inserted": _inserted,
    "zeroed": _zeroed,
    "byte-order mark": lambda data, rng: b"\xef\xbb\xbf" + data,
    "other encoding": _recoded,
    "other line ends": _line_ends,
}


def spoil_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The bytes with one damage, sometimes several, and the name of the first."""
    names = rng.choices(tuple(BYTES), weights=(4, 4, 4, 4, 3, 5, 3, 1, 1, 1), k=rng.choice((1, 1, 1, 2, 5)))
    for name in names:
        data = BYTES[name](data, rng) if data else data
    return data, names[0]
