"""Which questions are the same: exactly, after what means nothing is left out, or nearly, by their n-grams of words.

Two tests, because they protect two things. A question of an *evaluation set* must not be trained on in any form: shared
8-grams find the candidates (an exact inverted index), and the share of the evaluation question's trigrams that come
back decides, so a question inside a longer one is found too, whatever its numbers. Among *training questions* a
near-duplicate only wastes samples, and a change of numbers makes another question: MinHash finds candidates, the
Jaccard similarity of their trigrams decides, and the answers must be the same.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from itertools import takewhile, zip_longest

from datasketch import MinHash, MinHashLSH

_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mbox|math(?:rm|bf|it|sf|bb|cal)|boldsymbol|operatorname\*?)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|q?quad)(?![a-zA-Z])|\\[,;!:> ()\[\]]|\\(?=[$%&])|\\\\|[$~&]"
)
_PRIMES = re.compile(r"\^\s*(?:\{\s*)?((?:\\prime\s*)+)\}?")
_TYPOGRAPHY = str.maketrans(
    dict(zip("’‘′“”！", "'''\"\"!", strict=True)) | {"？": "? ", "。": ". ", "，": ", ", "：": ": ", "…": "..."}
)
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_NUMERIC = re.compile("[₀-₉]+|[¼-¾⅐-⅞]")
_FRACTION = re.compile(r"\\[dt]?frac\s*(\d)(?=\d)|(?<![\w./])(\d+)\s?/\s?(?=\d+(?![\w./]))")
_COMMANDS = {
    "×": "times", "÷": "div", "·⋅∙": "cdot", "±": "pm", "∓": "mp", "≤⩽≦": "leq", "≥⩾≧": "geq", "≠": "neq",
    "≈": "approx", "≡": "equiv", "∼": "sim", "√": "sqrt", "∞": "infty", "∑": "sum", "∏": "prod", "∫": "int",
    "∂": "partial", "∠": "angle", "△": "triangle", "⊥": "perp", "∥": "parallel", "→": "to", "∈": "in", "∉": "notin",
    "∪": "cup", "∩": "cap", "⊂": "subset", "⊆": "subseteq", "∅": "emptyset", "⌊": "lfloor", "⌋": "rfloor",
    "⌈": "lceil", "⌉": "rceil",
}  # fmt: skip
_SYNONYMS = {
    "dfrac": r"\frac", "tfrac": r"\frac", "le": r"\leq", "leqslant": r"\leq", "ge": r"\geq", "geqslant": r"\geq",
    "ne": r"\neq", "lt": "<", "gt": ">", "rightarrow": r"\to", "degree": r"^\circ ",
    **dict.fromkeys(("dots", "ldots", "cdots", "dotsc", "dotsb"), "..."),
}  # fmt: skip
_SYNONYM = re.compile(rf"\\({'|'.join(_SYNONYMS)})(?![a-zA-Z])")
_SYMBOLS: dict[str, str | None] = {
    **{chr(code): None for code in range(0x10000) if unicodedata.category(chr(code)) == "Cf"},
    **{char: rf"\{name} " for chars, name in _COMMANDS.items() for char in chars},
    **{
        char: rf"\{unicodedata.name(char).split()[-1].lower().replace('lamda', 'lambda')} "
        for char in "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
    },
    **dict.fromkeys("−‐‑–", "-"),
    "°": r"^\circ ",
    "⋯": "...",
    "⁄": "/",
}
_SYMBOL = str.maketrans(_SYMBOLS)
_TOKEN = re.compile(
    r"\\[{}]|\\?[^\W\d_]+|\d+(?:\.\d+)?|(?<![\w.)}])\.\d+|\.{3}|:(?=\s*(?:[\d\\]|[^\W\d_](?![^\W\d_])))"
    r"|(?<=[\w)}'])(?<!\W'\w)'(?!(?:s|m|d|t|ll|re|ve)\b)|[^\s\w.,:;?'\"]"
)
_SIGNS = ("!", "'", ":", "...")
"""Mathematics behind a number, a variable or a parenthesis; punctuation behind a word."""
_WORD = re.compile(r"(?![A-Z]{2,3}\Z)[^\W\d_]{2,}")
_SENTENCE = re.compile(r"(?<=[.?!:])\s+|(?<=[.?!:][\"')\]$*])\s+|\n+")
_CLAUSE = re.compile(r"(?=[,;]\s)|\s(?=(?:and|then)\s|\()")
_LETTERS = re.compile(r"[a-z]+|[^\W_]")
_FORM = set(
    _LETTERS.findall(
        "a above after an and as at be before below box boxed by carefully choice correct decimal each enclose "
        "enclosed ensure exact exercise explain express final finally following for form format fraction give given "
        "here in inside integer into is it its last latex let letter line logically make math mathematical must "
        "notation now number numerical of on only option output own place please present problem provide put question "
        "quotes read reason reasoning remember report response result return right s should show simplest simplified "
        "single solution solve state step steps sure task that the then think thinking this to units us using value "
        "where with within without work wrap write you your answer "
        "请你您我们通过一逐步地推理思考来解答回问题并且把将最终后的案结果放置在写于中内里用给出"
    )
)
"""The words that ask for the form of an answer and say nothing of what is asked; Chinese by its characters."""
_ASKS_FORM = set(_LETTERS.findall("answer boxed carefully exercise problem question solution step steps 案步题"))
"""A sentence of `_FORM` without one of these ("As in the last line.") is left alone."""
_NUM_PERM = 64
_FEWEST = 10
"""Questions of a file: fewer that begin alike may be one story's."""
INDEX_WORDS = 8
"""Length of the n-grams that find candidates; shorter evaluation questions are only compared exactly."""


@functools.lru_cache(maxsize=1)  # a question is searched for in two collections
def words(question: str) -> tuple[str, ...]:
    """Its words, numbers and operators, without case, punctuation, layout and what asks for the form of the answer.

    Parentheses and braces count, as one, where they hold more than one of these: 2^{n+1} is not 2^n+1, 2^{10} is 2^10.
    So do the factorial, the prime and the ratio, which don't follow words: 5!, f'(3) and 3:4, not "How many!".
    """
    plain = _spelled_out(question)
    return _tokens(" ".join(map(_without_form, _SENTENCE.split(plain)))) or _tokens(plain)


def _spelled_out(text: str) -> str:
    """Symbols, primes, raised or lowered numbers, letters of other shapes in one spelling; nothing that is not seen."""
    text = _RAISED.sub(lambda m: f"^{{{m[0]}}}", text.translate(_TYPOGRAPHY))
    text = unicodedata.normalize("NFKC", _NUMERIC.sub(r" \g<0> ", text)).translate(_SYMBOL)
    text = _PRIMES.sub(lambda m: "'" * m[1].count("prime"), text)
    return _SYNONYM.sub(lambda m: _SYNONYMS[m[1]], _FRACTION.sub(lambda m: rf"\frac {m[1] or m[2]} ", text))


def _without_form(sentence: str) -> str:
    """Without its last clauses, when they hold only words of `_FORM` and a box, or are the whole of an instruction."""
    clauses = _CLAUSE.split(sentence)
    said = [{*_LETTERS.findall(clause.casefold())} for clause in clauses]
    kept = len(clauses)
    while kept and said[kept - 1] <= _FORM:
        kept -= 1
    dropped = set().union(*said[kept:])
    is_instruction = not kept and dropped & _ASKS_FORM and "?" not in sentence
    return " ".join(clauses[:kept]) if "boxed" in dropped or is_instruction else sentence


def _tokens(text: str) -> tuple[str, ...]:
    text = _LAYOUT.sub(" ", _TEXT.sub(r" \1 ", text))
    tokens: list[str] = []
    opened: list[tuple[str, int]] = []
    before = ""
    found = _TOKEN.findall(text)
    for token, after in zip_longest(found, found[1:], fillvalue=""):
        if token in _SIGNS and (not before or _WORD.fullmatch(before)):
            continue
        if token in "({":
            opened.append((token, len(tokens)))
            tokens.append("(")
        elif token not in ")}":
            tokens.append((token if token in (r"\{", r"\}") else token.removeprefix("\\")).casefold())
        elif opened:
            bracket, start = opened.pop()
            # (xy)^2 is not xy^2; in {xy}^2 the brace says so to LaTeX alone.
            has_power = bracket == "(" and after in ("^", "!") and len(tokens[-1]) > 1
            if len(tokens) - start > 2 or has_power:
                tokens.append(")")
            else:
                del tokens[start]
        before = token
    for _, start in reversed(opened):  # never closed
        del tokens[start]
    return tuple(tokens)


def refuse_shared(train: Iterable[str], heldout: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a held-out question is trained on, as far as `words` tells.
    """
    trained = {words(question) for question in train}
    if shared := [question for question in heldout if words(question) in trained]:
        raise ValueError(
            f"{len(shared)} held-out questions are in data.train too, for example {min(shared)!r}: take them out of "
            "one of the two (t1 curate does, given data.heldout as curate.evaluation)"
        )


def ngrams(tokens: tuple[str, ...], n: int) -> set[tuple[str, ...]]:
    """All runs of n words; the whole when it is shorter."""
    return {tokens[i : i + n] for i in range(max(1, len(tokens) - n + 1))}


def template_words(questions: Iterable[str]) -> tuple[int, int]:
    """How many words of a prompt's template all of them begin and end with; 0 where they share few, or are few."""
    every = [words(question) for question in questions]
    begin = _alike(every)
    end = _alike([tokens[begin:][::-1] for tokens in every])
    is_template = len(every) >= _FEWEST and begin + end >= INDEX_WORDS and begin + end < min(map(len, every))
    return (begin, end) if is_template else (0, 0)


def _alike(every: list[tuple[str, ...]]) -> int:
    """Words that all of them begin with."""
    columns = takewhile(lambda column: len({*column}) == 1, zip(*every, strict=False))
    return sum(1 for _ in columns)


class EvaluationQuestions:
    """Finds evaluation questions inside other questions."""

    def __init__(self, min_share: float):
        """`min_share`: share of an evaluation question's trigrams from which on it counts as contained."""
        self._min_share = min_share
        self._names: dict[tuple[str, ...], str] = {}
        self._trigrams: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        self._index: defaultdict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)

    def add(self, name: str, question: str, begin: int = 0, end: int = 0) -> None:
        """One more question; those of one row may share its name.

        Args:
            begin, end: words of a prompt's template around it, which other questions have too or have not.

        Raises:
            ValueError: a question without a word, which none could be compared with.
        """
        tokens = words(question)
        if not tokens:
            raise ValueError(f"{name} holds no question: {question!r}")
        self._names.setdefault(tokens, name)
        tokens = tokens[begin : len(tokens) - end]
        self._names.setdefault(tokens, name)
        self._trigrams[tokens] = ngrams(tokens, 3)
        if len(tokens) >= INDEX_WORDS:
            for gram in ngrams(tokens, INDEX_WORDS):
                self._index[gram].add(tokens)

    def find(self, question: str) -> tuple[str, float] | None:
        """(name, share) of the evaluation question that is in this one most; share 1 when it is the same."""
        tokens = words(question)
        if tokens in self._names:
            return self._names[tokens], 1.0
        candidates = {each for gram in ngrams(tokens, INDEX_WORDS) for each in self._index.get(gram, ())}
        trigrams = ngrams(tokens, 3)
        best, name = max(
            (
                (len(self._trigrams[each] & trigrams) / len(self._trigrams[each]), self._names[each])
                for each in candidates
            ),
            default=(0.0, ""),
        )
        return (name, min(best, 0.99)) if best >= self._min_share else None


class TrainingQuestions:
    """Finds questions that were seen before."""

    def __init__(self, min_similarity: float):
        """`min_similarity`: Jaccard similarity of trigrams from which on two questions with one answer are the same."""
        self._min_similarity = min_similarity
        self._exact: dict[tuple[str, ...], str] = {}
        self._seen: dict[str, tuple[tuple[str, ...], str]] = {}
        self._empty = MinHash(num_perm=_NUM_PERM)
        self._near = MinHashLSH(threshold=min_similarity, num_perm=_NUM_PERM)

    def find_or_add(self, name: str, question: str, answer: str) -> tuple[str, float] | None:
        """(name, similarity) of an earlier question that is the same; None, and this one is kept, when there is none.

        `answer` is compared as a string: give it normalised.
        """
        tokens = words(question)
        if tokens in self._exact:
            return self._exact[tokens], 1.0
        trigrams = ngrams(tokens, 3)
        sketch = self._empty.copy()
        sketch.update_batch([" ".join(gram).encode() for gram in trigrams])
        for earlier in sorted(self._near.query(sketch)):
            their_tokens, their_answer = self._seen[earlier]
            if their_answer == answer:
                theirs = ngrams(their_tokens, 3)
                similarity = len(trigrams & theirs) / len(trigrams | theirs)
                if similarity >= self._min_similarity:
                    return earlier, similarity
        self._exact[tokens] = name
        self._seen[name] = tokens, answer
        self._near.insert(name, sketch, check_duplication=False)
        return None
