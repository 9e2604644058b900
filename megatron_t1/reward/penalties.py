r"""T1's bad patterns: any hit replaces a sample's reward by -1 (`score.py`), so each function says why.

Adding a penalty is one function `name(cfg, response) -> reason | None` with `@penalty` on it, and its thresholds in
`PenaltyConfig`. All work in a few milliseconds on 10,000 tokens (benchmarks/long_samples.md): they run on every sample.

The separator for loops is how long an exactly periodic run of text pieces is (about one token each: a word, one digit,
one symbol). n-gram ratios alone hit LaTeX matrices and miss digit loops; compression ratios miss a loop after a long
good prefix. Mixing two languages of the Latin script, and words that make no sense, leave no trace in characters: they
show in how little the policy itself expected them, so `perplexity` reads the logprobs that came with the sample.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_t1.fields import FieldError, above, at_least, known, within
from megatron_t1.plugins import Registry
from megatron_t1.reward.answers import extract
from megatron_t1.types import FinishReason


@dataclass(kw_only=True, frozen=True)
class PenaltyConfig:
    """Which bad patterns cost -1, and from where on."""

    enabled: tuple[str, ...] = ("repetition", "overlong", "garbled", "language", "perplexity")
    """Penalties that count, by name; also available: `malformed`."""
    max_periodic_run: int = 500
    """Repetition: longest allowed run of pieces with one exact period and letters in it. Good texts reach 71 (agent
    traces 151), loops 1,000 and more."""
    max_periodic_digits: int = 3500
    """The same for runs without letters: 1/3 = 0.333... to 3,000 places is legitimate."""
    max_period: int = 400
    """Longest period looked for, in pieces: a paragraph."""
    max_line_repeats: int = 150
    """Repetition: most often one line of prose may come back when its digits and formulas are ignored ("17. I need to
    check the case again"). Honest enumerations stay below 100."""
    ngram_size: int = 12
    """Repetition: length in tokens of the n-grams counted for `max_ngram_repeats`."""
    max_ngram_repeats: int = 0
    """Repetition: times one n-gram of tokens may occur; 0 switches this off. For tiny models with short answers (3);
    long honest reasoning repeats n-grams often. It counts where token ids are known: samples of our own servers."""
    max_garbled_chars: int = 4
    """Garbled: replacement, control, private or unassigned characters allowed, and tokens that leave no text: control
    tokens inside a response, entries of the vocabulary that stand for nothing."""
    max_letters_without_space: int = 300
    """Garbled: longest run of Latin letters without anything between them."""
    max_foreign_share: float = 0.02
    """Language: share of letters, marks and emoji in scripts that the prompt does not use (Latin is always allowed:
    names, code)."""
    min_foreign_letters: int = 10
    """Language: fewer foreign letters than this never count (a quoted word)."""
    max_foreign_letters: int = 30
    """Language: more than this always count, however long the response."""
    max_nll: float = 3.5
    """Perplexity: mean -logprob of a response's tokens (nats, under the policy that sampled them, at its temperature)
    from which on it is soup. See benchmarks/penalties.md for what honest texts have. With sampling.top_p or min_p the
    logprobs are of what those leave, and higher: the same bounds let more pass."""
    nll_window: int = 64
    """Perplexity: tokens of the window whose mean -logprob counts too."""
    max_nll_window: float = 5.0
    """Perplexity: the same bound for the worst window, where a good response has run into soup."""

    def __post_init__(self) -> None:
        for name in self.enabled:
            known(self, "enabled", PENALTIES, name)
        least = {"max_garbled_chars": 0, "max_letters_without_space": 1}
        least |= dict.fromkeys(("max_periodic_run", "max_periodic_digits"), 24)  # 8-grams show three periods from there
        for name, value in least.items():
            if getattr(self, name) < value:
                rule = f"must be at least {value}; for no such penalty leave it out of reward.penalties.enabled"
                raise FieldError(name, getattr(self, name), rule)
        at_least(self, 1, "max_period", "max_line_repeats", "ngram_size")
        at_least(self, 1, "nll_window")
        at_least(self, 0, "max_ngram_repeats", "min_foreign_letters")
        if self.min_foreign_letters > self.max_foreign_letters:
            rule = f"must be at most max_foreign_letters = {self.max_foreign_letters}: raise both"
            raise FieldError("min_foreign_letters", self.min_foreign_letters, rule)
        above(self, 0, "max_nll", "max_nll_window")
        within(self, 0, 1, "max_foreign_share")


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a penalty or a verifier sees."""

    text: str
    prompt: str | None = None
    """Question text; None when unknown (then the response's own main script is taken as the prompt's)."""
    token_ids: Sequence[int] = ()
    finish_reason: FinishReason = "stop"
    num_hidden_tokens: int = 0
    """Tokens before the last one that leave no text."""
    nll: tuple[float, float] | None = None
    """`mean_and_worst_nll` of the response's logprobs; None where these aren't known."""


Penalty = Callable[[PenaltyConfig, Response], "str | None"]
PENALTIES: Registry[Penalty] = Registry("penalty", in_graders=True)
penalty = PENALTIES.add
"""Registers a penalty under its function's name."""


def find_penalties(cfg: PenaltyConfig, response: Response) -> dict[str, str]:
    """Name -> reason of every enabled penalty that hits.

    Raises:
        TypeError: one of a plugin returned neither text nor None.
    """
    reasons: dict[str, str] = {}
    for name in cfg.enabled:
        reason = PENALTIES[name](cfg, response)
        if not isinstance(reason, str | None):
            raise TypeError(f"the penalty {name} returned {reason!r:.80}; it must be the reason, or None")
        if reason:
            reasons[name] = reason
    return reasons


MAX_LOOP_CHARS = 100_000
"""Loops are looked for in this much of a response's end: about 30,000 tokens."""
_PIECE = re.compile(r"[A-Za-z]+|\S")


def periodic_runs(ids: np.ndarray, max_period: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """(length, start, period) of every stretch of `ids` that is longer than `longest` and one period three times or
    more.

    The periods tried are the distances between equal 8-grams, so the cost is one sort and a scan for each of these.
    ids: int64 [n].
    """
    k, n = 8, len(ids)
    if n < 2 * k:
        return
    multiplier = np.uint64(0x9E3779B97F4A7C15)
    hashes = np.zeros(n - k + 1, dtype=np.uint64)
    for i in range(k):
        hashes = hashes * multiplier + ids[i : n - k + 1 + i].astype(np.uint64)
    order = np.argsort(hashes, kind="stable")
    distance = np.diff(order)[hashes[order[1:]] == hashes[order[:-1]]]
    for period in np.flatnonzero(np.bincount(distance[distance <= max_period])):
        breaks = np.flatnonzero(np.concatenate(([True], ids[period:] != ids[:-period], [True])))
        lengths = np.diff(breaks) - 1 + period
        for i in np.flatnonzero(lengths > max(longest, 3 * period - 1)):
            yield int(lengths[i]), int(breaks[i]), int(period)


def _may_loop(text: str, longest: int, window: int = 8000) -> bool:
    """Whether some probe comes again twice, at equal distances within a window: true of every run that can be flagged
    (more than `longest` characters and three periods at least) with a period that fits into the window, false of nearly
    all honest texts, at a fraction of the cost. Spaces, which are no pieces, don't count."""
    stride, probe = min(100, longest // 5), min(40, longest // 12)  # together less than a period of the longest
    text = "".join(text.split())
    for start in range(0, len(text) - probe, stride):
        piece = text[start : start + probe]
        again = start
        while (again := text.find(piece, again + 1, start + window)) >= 0:
            if text.startswith(piece, 2 * again - start):
                return True
    return False


@penalty
def repetition(cfg: PenaltyConfig, response: Response) -> str | None:
    """Loops: an exactly periodic run, a prose line that only changes its numbers, (optional) token n-grams, or what the
    server itself ended as one."""
    if response.finish_reason == "repetition":
        return "the server ended it as a loop"
    text = response.text[-MAX_LOOP_CHARS:]
    longest = min(cfg.max_periodic_run, cfg.max_periodic_digits)
    if _may_loop(text, longest):
        pieces = _PIECE.findall(text)
        ids = np.fromiter(map(hash, pieces), dtype=np.int64, count=len(pieces))
        for length, start, period in periodic_runs(ids, cfg.max_period, longest):
            unit = " ".join(pieces[start : start + period])
            if length > (cfg.max_periodic_run if any(c.isalpha() for c in unit) else cfg.max_periodic_digits):
                return f"{length} pieces repeat with period {period}: {unit[:60]!r}"
    lines = response.text.splitlines()
    if len(lines) > cfg.max_line_repeats:
        prose: Counter[str] = Counter()
        for line, count in Counter(lines).items():
            if len(line) >= 11:  # six words
                prose[_prose(line)] += count
        line, count = max(
            ((t, c) for t, c in prose.items() if len(t.split()) >= 6), key=lambda x: x[1], default=("", 0)
        )
        if count > cfg.max_line_repeats:
            return f"one line came {count} times but for its numbers: {line[:60]!r}"
    tokens = response.token_ids
    if cfg.max_ngram_repeats and len(tokens) >= cfg.ngram_size:
        grams = Counter(tuple(tokens[i : i + cfg.ngram_size]) for i in range(len(tokens) - cfg.ngram_size + 1))
        gram, count = grams.most_common(1)[0]
        if count > cfg.max_ngram_repeats:
            return f"one {cfg.ngram_size}-gram of tokens came {count} times: {list(gram)}"
    return None


def _prose(line: str) -> str:
    return re.sub(r"\d+", "#", _without_math(line)).strip()


_MATH_ENDS = {"$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}
_MATH_BEGINS = re.compile("|".join(map(re.escape, _MATH_ENDS)))


def _without_math(text: str) -> str:
    """In one pass: a lazy regex would look for the end of each unclosed formula anew."""
    last = {end: text.rfind(end) for end in _MATH_ENDS.values()}
    kept, at, position = [], 0, 0
    while begin := _MATH_BEGINS.search(text, position):
        end, position = _MATH_ENDS[begin[0]], begin.end()
        if last[end] >= position:
            stop = text.index(end, position)
            if end != "$" or "\n" not in text[position:stop]:  # two amounts of money are no formula
                kept += [text[at : begin.start()], " "]
                at = position = stop + len(end)
    text = "".join([*kept, text[at:]])
    return re.sub(r"\\[a-zA-Z]+(?:\{[^{}]*\})?", " ", text)


@penalty
def overlong(cfg: PenaltyConfig, response: Response) -> str | None:
    """Cut at the length limit: no end token was sampled."""
    return "no end token before the length limit" if response.finish_reason == "length" else None


def _characters(text: str) -> Iterator[tuple[str, int]]:
    """Each character of a text and how often it is there; `Counter` takes ten times as long."""
    counts = np.bincount(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32))
    return ((chr(code), int(counts[code])) for code in np.flatnonzero(counts))


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_ENDLESS_SPACE = re.compile(r"(?<!\s)\s{1000,}")


@penalty
def garbled(cfg: PenaltyConfig, response: Response) -> str | None:
    """Text that no tokenizer round trip of honest writing gives: broken bytes, control characters, endless letters or
    space."""
    text = response.text
    if response.num_hidden_tokens > cfg.max_garbled_chars:
        return f"{response.num_hidden_tokens} tokens without text: control tokens or unused entries of the vocabulary"
    if not text.isascii() or _CONTROLS.search(text):
        bad = {
            c: count
            for c, count in _characters(text)
            if c == "\ufffd" or (c not in "\n\r\t" and unicodedata.category(c) in ("Cc", "Co", "Cn", "Cs"))
        }
        if (total := sum(bad.values())) > cfg.max_garbled_chars:
            return f"{total} broken or control characters, such as {next(iter(bad))!r}"
    if space := _ENDLESS_SPACE.search(text):
        return f"{space.end() - space.start()} spaces or line ends in a row"
    if max(map(len, text.split()), default=0) > cfg.max_letters_without_space:
        run = re.search(rf"(?<![A-Za-z])[A-Za-z]{{{cfg.max_letters_without_space + 1},}}", text)
        if run:
            return f"{run.end() - run.start()} letters without a space: {run.group()[:40]!r}"
    return None


_ONE_SCRIPT = {"IDEOGRAPHIC": "CJK", "HIRAGANA": "KANA", "KATAKANA": "KANA", "KATAKANA-HIRAGANA": "KANA"}
_GREEK, _MARKS = r"\u0370-\u03ff\u1f00-\u1fff", r"\u02b0-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe2f"
_GREEK_SIGNS = re.compile(  # begins with its first letter, which is faster than with what must not stand before it
    rf"[{_GREEK}](?<![{_GREEK}][{_GREEK}])(?:[{_GREEK}]?|(?<![{_GREEK}]\s[{_GREEK}])[{_GREEK}]{{2,3}}(?!\s+[{_GREEK}])"
    rf"|(?<=[\u0391-\u03a9])[\u0391-\u03a9]{{2,7}}|(?<=[_^{{][{_GREEK}])[{_GREEK}]{{2,7}})(?![{_GREEK}])"
)
"""Greek that is no word: one or two letters, four between other signs, a figure of eight, eight indices."""
_FEW_MARKS = re.compile(rf"[{_MARKS}](?<![{_MARKS}][{_MARKS}])[{_MARKS}]?(?![{_MARKS}])")
"""Accents, apostrophes, arrows over vectors."""
_MANY_MARKS = re.compile(r"([^\w\s\x00-\x7f]{30})")
"""And signs: what is neither letter nor digit."""
_SIGNS = re.compile(
    r"[\u2605\u2606\u2610-\u2612\u2640\u2642\u2654-\u2667\u266d-\u266f\u2680-\u2685\u26aa\u26ab\u2705\u2713-\u2718"
    r"\u274c\u274e\u2794-\u27bf\u2b00-\u2b1c\u2b50\u2b55\u3000-\u33ff]"
)
"""Emoji and dingbats that count things: ticks and crosses, stars, cards, chessmen, dice, arrows, squares, CJK units."""


@functools.lru_cache(maxsize=4096)
def script_of(char: str) -> str:
    """The script of a letter or mark by its Unicode name ("CYRILLIC", "CJK", ...), "EMOJI" for these, dingbats and
    Braille, and "" for all that belongs to no language: digits, signs, letters that are styled for mathematics."""
    category = unicodedata.category(char)
    if category == "So" and char >= "\u2600" and not _SIGNS.match(char):
        return "EMOJI"
    if category[0] not in "LM":
        return ""
    styled, _, plain = unicodedata.decomposition(char).partition("> ")
    if styled in ("<font", "<compat", "<super", "<sub"):
        return ""
    whole = unicodedata.normalize("NFKC" if plain else "NFC", char)  # "NFKC": wide, narrow and joined forms
    first = unicodedata.name(whole[0], "").partition(" ")[0]
    return _ONE_SCRIPT.get(first, first)


def letters_by_script(text: str) -> Counter[str]:
    """Number of letters of each script ("LATIN", "CJK", ...) but for those of mathematics: Latin in formulas and Greek
    that is no word."""
    counts = _by_script(text)
    counts["LATIN"] = _by_script(_without_math(text))["LATIN"]
    return counts


def _by_script(text: str) -> Counter[str]:
    counts = Counter({"LATIN": 0})
    if not text.isascii():
        # The sign of the ohm is an omega. Marks in a row take the square of their number: thirty at a time.
        text = "".join(unicodedata.normalize("NFC", piece) for piece in _MANY_MARKS.split(text))
        text = _FEW_MARKS.sub(" ", _GREEK_SIGNS.sub(" ", text))
    for char, count in _characters(text):
        if script := script_of(char):
            counts[script] += count
    return counts


@penalty
def language(cfg: PenaltyConfig, response: Response) -> str | None:
    """Letters of scripts that the prompt does not use: switching language in the middle."""
    if response.text.isascii():
        return None
    counts = letters_by_script(response.text)
    if response.prompt:
        own = {script for script, count in letters_by_script(response.prompt).items() if count}
    else:
        own = {counts.most_common(1)[0][0]}
    own.add("LATIN")
    if "KANA" in own:
        own.add("CJK")
    foreign = Counter({script: count for script, count in counts.items() if script not in own and count})
    total, letters = sum(foreign.values()), sum(counts.values())
    share = max(cfg.min_foreign_letters - 1, cfg.max_foreign_share * letters)
    if total > min(share, cfg.max_foreign_letters):
        return f"{total} of {letters} letters are {', '.join(foreign)}, which the prompt does not use"
    return None


def mean_and_worst_nll(logprobs: np.ndarray, window: int) -> tuple[float, float]:
    """Mean -logprob of all tokens, and of the worst `window` tokens in a row (of all, where there are fewer); nats.

    logprobs: float [num_response_tokens], at least one.
    """
    total = np.concatenate(([0.0], np.cumsum(-logprobs, dtype=np.float64)))
    size = min(window, len(logprobs))
    return float(total[-1] / len(logprobs)), float((total[size:] - total[:-size]).max() / size)


@penalty
def perplexity(cfg: PenaltyConfig, response: Response) -> str | None:
    """Tokens that the policy itself did not expect: random words, a thought that dissolves. Nothing where logprobs
    aren't known."""
    if response.nll is None:
        return None
    mean, worst = response.nll
    if mean > cfg.max_nll:
        return f"{mean:.2f} nats a token: the policy did not expect its own words"
    if worst > cfg.max_nll_window:
        return f"{worst:.2f} nats a token in {cfg.nll_window} tokens in a row: the policy did not expect its own words"
    return None


@penalty
def malformed(cfg: PenaltyConfig, response: Response) -> str | None:
    """Thinking never closed, or no complete box after it. Off by default: a missing answer already earns 0."""
    tail = extract.after_thinking(response.text)
    if tail is None:
        return "thinking never closed"
    return None if extract.last_box(tail[-extract.TAIL_CHARS :]) is not None else "no complete box after the thinking"
