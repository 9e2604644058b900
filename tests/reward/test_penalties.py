"""Penalties: the shipped texts, every threshold's two sides, and T1's rule."""

from __future__ import annotations

import random
import time
import unicodedata
from fractions import Fraction

import pytest
import regex

from megatron_t1.reward.config import PenaltyConfig
from megatron_t1.reward.penalties import (
    PENALTIES,
    Response,
    find_penalties,
    language,
    letters_by_script,
    mean_and_worst_nll,
    np,
    periodic_runs,
    script_of,
)
from tests.reward.cases import rows

CONFIG = PenaltyConfig()


@pytest.mark.parametrize("case", rows("textquality"), ids=lambda c: c["name"])
def test_shipped_texts(case: dict) -> None:
    found = find_penalties(CONFIG, Response(text=case["text"]))
    assert bool(found) == case["expected_penalty"], found


def test_honest_solutions_are_not_flagged() -> None:
    for case in rows("cases"):
        assert not find_penalties(CONFIG, Response(text=case["prediction"], prompt=case.get("question"))), case["id"]


@pytest.mark.parametrize("period", [1, 2, 7, 40, 113, 399])
def test_periodic_runs_are_found_with_their_length(period: int) -> None:
    """Against the definition: the longest stretch in which every element equals the one `period` before."""
    generator = np.random.default_rng(period)
    unit = generator.integers(0, 5000, period)
    ids = np.concatenate(
        [generator.integers(5000, 9000, 3000), np.tile(unit, 1600 // period + 3), generator.integers(9000, 9999, 500)]
    )
    assert list(periodic_runs(ids, 400, 24)) == [(period * (1600 // period + 3), 3000, period)]


def test_random_text_has_no_long_run() -> None:
    ids = np.random.default_rng(0).integers(0, 50, 20_000)
    assert list(periodic_runs(ids, 400, 24)) == []


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_longer_run_that_is_allowed_hides_no_loop(place: int) -> None:
    """Digits may repeat for longer than words; nine such runs, each of another period, are more frequent than it."""
    cfg = PenaltyConfig(max_periodic_run=100)
    digits = [" ".join("0123456789"[:period] * (2000 // period)) for period in range(1, 10)]
    loop = "so we try again and again, and then once more. " * 30
    for parts in (digits[2:3], digits):
        texts = [f"the digits {run} ;" for run in parts]
        assert not find_penalties(cfg, Response(text="\n".join(texts)))
        texts.insert(place * len(texts) // 2, loop)
        assert "again" in find_penalties(cfg, Response(text="\n".join(texts)))["repetition"]


def test_a_paragraph_said_twice_is_no_loop() -> None:
    words = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300)]
    assert not find_penalties(CONFIG, Response(text=" ".join(words * 2)))
    assert "repetition" in find_penalties(CONFIG, Response(text=" ".join(words * 4)))


@pytest.mark.parametrize("longest", [24, 25, 50, 63, 100, 250, 499, 500, 2000])
@pytest.mark.parametrize("digits", [False, True])
def test_a_run_counts_from_where_the_config_says(longest: int, digits: bool) -> None:
    """Of words and of digits, whatever the other's limit; behind any text, with any period of which three fit."""
    name, other = ("max_periodic_digits", "max_periodic_run") if digits else ("max_periodic_run", "max_periodic_digits")
    generator = random.Random(longest)
    for least in (longest, 3500):
        cfg = PenaltyConfig(**{name: longest, other: max(least, longest)})  # type: ignore[arg-type]
        for _ in range(20):
            before = " ".join(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(generator.randrange(300)))
            period = generator.randint(1, min(longest // 3, 400))
            unit = generator.choices("0123456789" if digits else "abcdefghijklmnopqrstuvwxyz", k=period)
            run = unit * (longest // period + 2)
            for length, hit in ((longest, False), (longest + 1, True)):
                found = find_penalties(cfg, Response(text=f"{before} = {' '.join(run[:length])} ; the end"))
                assert ("repetition" in found) == hit, (period, length, before)


@pytest.mark.parametrize("lengths", [(24, 54), (54, 24), (34, 44)])
def test_a_loop_that_says_one_thing_at_uneven_distances_is_found(lengths: tuple[int, int]) -> None:
    """X Y X Z X Y X Z ...: what comes next after X is not where it comes again at the same distance."""
    generator = random.Random(0)
    same = "".join("".join(generator.choices("abcdefg", k=9)) + "," for _ in range(56))
    unit = "".join(same + "".join(generator.choices("abcdefg", k=length)) + "," for length in lengths)
    assert "repetition" in find_penalties(CONFIG, Response(text=unit * 6))


def test_ngrams_of_tokens_are_off_until_asked_for() -> None:
    tokens = list(range(12)) * 4
    assert not find_penalties(CONFIG, Response(text="short", token_ids=tokens))
    strict = PenaltyConfig(max_ngram_repeats=3)
    assert "12-gram" in find_penalties(strict, Response(text="short", token_ids=tokens))["repetition"]
    assert not find_penalties(strict, Response(text="short", token_ids=tokens[:36]))


def test_overlong_is_the_length_limit() -> None:
    assert "overlong" in find_penalties(CONFIG, Response(text="cut", finish_reason="length"))
    assert not find_penalties(PenaltyConfig(enabled=()), Response(text="cut", finish_reason="length"))
    assert set(find_penalties(CONFIG, Response(text="cut", finish_reason="repetition"))) == {"repetition"}


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("The answer is \ufffd\ufffd\ufffd\ufffd\ufffd 7", True),
        ("\x00\x01\x02\x03\x04\x05", True),
        ("One broken \ufffd character from a cut emoji", False),
        ("k" * 301, True),
        ("x = 2" + "\x02\x1c\x10" * 9, True),
        ("Two." + "\n\t " * 400 + r"\boxed{2}", True),
        ("Two." + "\u00a0" * 5000 + r"\boxed{2}", True),
        ("a |" + " " * 200 + "| b\r\n\f", False),
        (r"\begin{pmatrix}1&2\end{pmatrix} café naïve — “quoted” … ∑ ℝ ≤ 🙂", False),
    ],
)
def test_garbled(text: str, hit: bool) -> None:
    assert ("garbled" in find_penalties(CONFIG, Response(text=text, prompt="What is it?"))) == hit


CHINESE = "我们首先考虑这个方程的解,因此答案是显然的。"


@pytest.mark.parametrize(
    ("prompt", "text", "hit"),
    [
        ("Solve the equation.", "We get the root. " + CHINESE, True),
        ("解这个方程。", CHINESE + " so x = 2", False),
        ("解这个方程。", "The answer in English is 2.", False),
        ("Solve the equation.", r"Let $\text{解}$ be the root, and see 方程 once.", False),
        ("Solve the equation.", "Ответ: корень уравнения равен двум.", True),
        ("Решите уравнение.", "Ответ: корень уравнения равен двум.", False),
        ("方程式を解いてください。", "答えは二です。方程式の解は明らかです。", False),
    ],
)
def test_language_is_compared_with_the_prompt(prompt: str, text: str, hit: bool) -> None:
    assert ("language" in find_penalties(CONFIG, Response(text=text, prompt=prompt))) == hit


def test_malformed_is_optional() -> None:
    cfg = PenaltyConfig(enabled=("malformed",))
    assert find_penalties(cfg, Response(text="<think>never closed \\boxed{1}"))
    assert find_penalties(cfg, Response(text="<think>a</think> the answer is 1"))
    assert not find_penalties(cfg, Response(text="<think>a</think> \\boxed{1}"))
    assert not find_penalties(CONFIG, Response(text="no box"))


def _drawn(*spans: tuple[int, int], count: int, category: str = "") -> str:
    chars = [chr(code) for first, last in spans for code in range(first, last + 1)]
    return "".join(
        random.Random(count).choices([c for c in chars if unicodedata.category(c).startswith(category)], k=count)
    )


HAN = _drawn((0x4E00, 0x9FA5), count=300)


@pytest.mark.parametrize(
    "text",
    [
        f"He has $5 and {HAN} and then $6.",
        rf"\text{{{HAN}}}",
        rf"\[{HAN}\] $${HAN}$$",
        rf"$x = \mathrm{{{HAN[:40]}}}$",
        "$" + _drawn((0x3B1, 0x3C9), count=300) + "$",
        "η λύση δεν είναι αυτή και το άθροισμα είναι δύο",
        _drawn((0x2600, 0x27BF), count=3000, category="So"),
        _drawn((0x2800, 0x28FF), count=800),
        _drawn((0x4DC0, 0x4DFF), (0x1D100, 0x1D126), count=400),
        _drawn((0x300, 0x36F), count=3000),
        "".join(letter + _drawn((0x300, 0x36F), (0x20D0, 0x20DC), count=9) for letter in "noise" * 9),
        "\u0915" + _drawn((0x900, 0x94D), count=500, category="M"),
        _drawn((0x2B9, 0x2FF), count=400),
    ],
    ids=lambda text: text[:12].encode("unicode_escape").decode(),
)
def test_no_dress_hides_foreign_letters_signs_and_marks(text: str) -> None:
    prompt = "A man pays $5 for $x$ apples."
    assert set(find_penalties(CONFIG, Response(text=text, prompt=prompt))) == {"language"}
    assert "language" in find_penalties(CONFIG, Response(text="So he goes on and on. " * 50 + text, prompt=prompt))


@pytest.mark.parametrize(
    "line",
    [
        "R_{αβγδ} = g^{μνρσ} T_{αβ} ε^{κλμνρ} {}",
        "In the square ΑΒΓΔ and the hexagon ΑΒΓΔΕΖ, ΑΒΓ = {}, αβγδ = κλ",
        "α β γ δ ε ζ η θ = {}",
        "it\u02bcs {}° 18\u02b9 of O\u02bbahu",
        "v\u20d7 = x\u0302 + y\u0304\u0307 = {}, fac\u0327ade",
        "n = {}: ✓ ✅, not ✗ ❌ ➜",
        "{}: ♠♥♦♣ A♥, ♜♞♝♛♚, ⚀⚅, ★★|★★★, ⬛⬜⚫⚪ in ㎡, 1\ufe0f\u20e3",
    ],
)
def test_signs_of_mathematics_are_no_language(line: str) -> None:
    text = "\n".join(line.replace("{}", str(number * 37 % 101)) for number in range(140))
    assert not find_penalties(CONFIG, Response(text=text, prompt="What is it?"))


def test_fewer_foreign_letters_than_the_least_never_count() -> None:
    with pytest.raises(ValueError, match="min_foreign_letters = 31 must be at most max_foreign_letters = 30"):
        PenaltyConfig(min_foreign_letters=31)
    for least in (0, 50):
        cfg = PenaltyConfig(min_foreign_letters=least, max_foreign_letters=50)
        hits = [bool(language(cfg, Response(text=HAN[:count], prompt="What?"))) for count in range(1, 60)]
        assert hits == [count >= least for count in range(1, 60)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enabled", ("repetitoin",)),
        ("min_foreign_letters", -1),
        ("max_periodic_run", 23),
        ("max_periodic_digits", 0),
        ("max_garbled_chars", -1),
        ("max_letters_without_space", 0),
        ("max_letters_without_space", -1),
        ("max_ngram_repeats", -1),
        ("max_foreign_share", 2.0),
    ],
)
def test_config_errors_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        PenaltyConfig(**{field: value})  # type: ignore[arg-type]


def test_least_thresholds_punish_no_good_text() -> None:
    """A penalty is switched off by its name; what looks like `off` is refused with that."""
    with pytest.raises(ValueError, match=r"max_garbled_chars = -1 must .* leave it out of reward.penalties.enabled"):
        PenaltyConfig(max_garbled_chars=-1)
    cfg = PenaltyConfig(max_garbled_chars=0, max_periodic_run=24, max_periodic_digits=24)
    assert not find_penalties(cfg, Response(text=r"So we take the root, and the answer is \boxed{4}."))


@pytest.mark.parametrize("returned", [True, 1.5, ["x"]])
def test_a_penalty_that_gives_no_reason_is_an_error(returned: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PENALTIES._entries, "shouty", lambda cfg, response: returned)
    with pytest.raises(TypeError, match=r"the penalty shouty returned .*; it must be the reason, or None"):
        find_penalties(PenaltyConfig(enabled=("shouty",)), Response(text="x"))


def test_adding_a_penalty_is_one_function() -> None:
    assert set(PENALTIES) == {"repetition", "overlong", "garbled", "language", "perplexity", "malformed"}
    text = "".join(random.Random(0).choices("abcdefgh ", k=200))
    assert not find_penalties(PenaltyConfig(enabled=tuple(PENALTIES)[:4]), Response(text=text))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 900])
def test_perplexity_is_its_formula(length: int) -> None:
    """Against the definition, sum by sum in exact arithmetic."""
    logprobs = -np.random.default_rng(length).exponential(0.8, length).astype(np.float32)
    exact = [-Fraction(float(value)) for value in logprobs]
    size = min(64, length)
    mean, worst = mean_and_worst_nll(logprobs, 64)
    assert mean == pytest.approx(float(sum(exact) / length), rel=1e-12)
    windows = [sum(exact[i : i + size]) / size for i in range(length - size + 1)]
    assert worst == pytest.approx(float(max(windows)), rel=1e-12)


def test_soup_is_penalized_as_a_whole_and_in_a_window() -> None:
    good, soup = np.full(5000, -0.6), np.full(64, -7.0)
    for logprobs, hit in ((good, False), (np.r_[soup, soup], True), (np.r_[good, soup, good], True), (soup[:9], True)):
        nll = mean_and_worst_nll(logprobs, CONFIG.nll_window)
        assert ("perplexity" in find_penalties(CONFIG, Response(text="x", nll=nll))) == hit
    assert not find_penalties(CONFIG, Response(text="x"))


def test_tokens_without_text_are_garbled() -> None:
    assert "without text" in find_penalties(CONFIG, Response(text="x", num_hidden_tokens=5))["garbled"]
    assert not find_penalties(CONFIG, Response(text="x", num_hidden_tokens=4))


@pytest.mark.parametrize(
    "marks", ["\u0301\u0316", "\u093c\u094d", "\u05b0\u05c1", "\U0001d165\U0001d16d", "\u20d2\u20d0"]
)
def test_marks_in_a_row_are_read_in_time_and_all_of_them(marks: str) -> None:
    """Bringing them into order takes the square of their number."""
    before = time.process_time()
    counts = letters_by_script("a" + marks * 32_000)
    assert time.process_time() - before < 1
    assert sum(counts.values()) == 64_001


@pytest.mark.parametrize("letters", ["\u1782" * 300, "\u1208" * 300, "\u6211" * 300, "\u03b1\u03b2\u03b3\u03b4 " * 75])
def test_foreign_letters_count_however_long_the_response_is(letters: str) -> None:
    """Khmer, Ethiopic, Han and Greek words within 20,000 letters of English."""
    english = "So we take the root of both sides and go on. " * 500
    assert language(CONFIG, Response(text=english + letters, prompt="Solve it."))
    assert not language(CONFIG, Response(text=english + letters[:10], prompt="Solve it."))


def test_greek_of_mathematics_is_no_language() -> None:
    text = (
        "So \u03b1 + \u03b2 = \u03c0, \u0394ABC, \u03b8\u2081 = \u03c9t, \u211d, \u2135, \U0001d431, \u00b5, \u2126. "
        * 200
    )
    assert not language(CONFIG, Response(text=text, prompt="Find the angle."))
    assert "language" in find_penalties(CONFIG, Response(text="\U0001f600" * 3000, prompt="Find the angle."))


def test_scripts_are_those_of_unicode() -> None:
    """Two letters are of one script here exactly where Unicode's Script property says so: a library's table of it."""
    ours: dict[str, set[str]] = {}
    for code in range(0x80, 0x11000):
        if (char := chr(code)).isalpha() and not regex.match(r"[\p{Script=Common}\p{Script=Inherited}]", char):
            ours.setdefault(script_of(char), set()).add(char)
    names = {"CJK": "Han", "KANA": r"[\p{Hiragana}\p{Katakana}]", "LATIN": "Latin", "GREEK": "Greek"}
    names |= {name: name.title() for name in ("CYRILLIC", "ARABIC", "HEBREW", "THAI", "KHMER", "ETHIOPIC", "HANGUL")}
    for ours_name, theirs in names.items():
        one = theirs if theirs.startswith("[") else rf"\p{{Script={theirs}}}"
        wrong = {char for char in ours[ours_name] if not regex.match(one, char)}
        assert len(wrong) <= 0.01 * len(ours[ours_name]), (ours_name, wrong)
