r"""Values with units.

What follows a number is a unit when it is in the table below (units of one kind convert), or when it is a plain noun
("10 weeks", "3 red", 5个): words that change the value ("million") are multiplied in, and any other word ("or more",
"is wrong", "squared") leaves a text, which equals no number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_t1.reward.answers.normalize import untexted
from megatron_t1.reward.answers.numbers import exact_number
from megatron_t1.reward.answers.words import CJK, NOT_COUNTED, PARTS, is_prose


@dataclass(frozen=True)
class Unit:
    """One unit, or a noun that is counted."""

    factor: Fraction = Fraction(1)
    kind: tuple[tuple[str, int], ...] = ()
    """Powers of basic units; () for a noun."""
    noun: str = ""
    """What is counted, or behind a unit its direction."""


PERCENT, DEGREES, NO_UNIT = Unit(kind=(("%", 1),)), Unit(kind=(("deg", 1),)), Unit()
RADIANS = Unit(kind=(("rad", 1),))
_TEMPERATURES = {("celsius", 1), ("fahrenheit", 1)}
_PREFIXES = {"f": -15, "p": -12, "n": -9, "μ": -6, "m": -3, "c": -2, "d": -1, "": 0, "k": 3, "M": 6, "G": 9, "T": 12}
_PREFIX_NAMES = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9, "": 0}
_PREFIXED = """
m meter metre = 1 m; g gram = 1/1000 kg; s sec second = 1 s; l L liter litre = 1/1000 m^3; mol mole = 1 mol;
N newton = 1 kg m s^-2; J joule = 1 kg m^2 s^-2; W watt = 1 kg m^2 s^-3; Pa pascal = 1 kg m^-1 s^-2; Hz hertz = 1 s^-1;
A ampere = 1 A; V volt = 1 kg m^2 s^-3 A^-1; ohm = 1 kg m^2 s^-3 A^-2; T tesla = 1 kg s^-2 A^-1; K kelvin = 1 kelvin;
coulomb C = 1 A s; farad F = 1 A^2 s^4 kg^-1 m^-2; cal calorie = 4184/1000 kg m^2 s^-2; bar = 100000 kg m^-1 s^-2;
eV = 1602176634/10000000000000000000000000000 kg m^2 s^-2; Wh = 3600 kg m^2 s^-2; Wb weber = 1 kg m^2 s^-2 A^-1;
H henry henries = 1 kg m^2 s^-2 A^-2; M molar = 1000 mol m^-3; B byte = 8 bit; bit = 1 bit
"""
"""Units that take the prefixes of the SI: before a sign, those of a letter."""
_OTHERS = """
秒 = 1 s; min minute 分钟 = 60 s; h hr hrs hour 小时 = 3600 s; day 天 日 = 86400 s; week 周 星期 = 604800 s;
month 月 个月 = 1 month; year 年 yr yrs = 12 month; 米 = 1 m; 毫米 = 1/1000 m; 厘米 = 1/100 m; 分米 = 1/10 m;
千米 公里 = 1000 m; micron 微米 = 1/1000000 m; 纳米 = 1/1000000000 m; in inch inches 英寸 = 254/10000 m;
ft foot feet 英尺 = 3048/10000 m; yd yds yard = 9144/10000 m; mi mile 英里 = 1609344/1000 m; 千克 公斤 = 1 kg;
克 = 1/1000 kg; 毫克 = 1/1000000 kg; ton tonne 吨 = 1000 kg; lb lbs pound = 45359237/100000000 kg;
oz ounce = 45359237/1600000000 kg; 升 = 1/1000 m^3; 毫升 = 1/1000000 m^3; gal gallon = 3785411784/1000000000000 m^3;
acre = 40468564224/10000000 m^2; hectare ha 公顷 = 10000 m^2; dollar usd buck 美元 = 1 dollar; yen jpy = 1 yen;
cent 美分 = 1/100 dollar; yuan rmb cny 元 块 = 1 yuan; jiao 角 = 1/10 yuan; euro eur = 1 euro; gbp = 1 gbp;
rupee rs inr = 1 rupee; mph = 1609344/3600000 m s^-1; kmh kph = 1000/3600 m s^-1; rad radian = 1 rad;
牛 = 1 kg m s^-2; 焦耳 = 1 kg m^2 s^-2; atm = 101325 kg m^-1 s^-2; amp = 1 A; degC celsius 摄氏度 = 1 celsius;
degF fahrenheit 华氏度 = 1 fahrenheit; cc = 1/1000000 m^3; mmHg torr Torr = 101325/760 kg m^-1 s^-2;
pt pint = 473176473/1000000000000 m^3; qt quart = 946352946/1000000000000 m^3; cup = 473176473/2000000000000 m^3;
Nm = 1 kg m^2 s^-2; dB decibel = 1 dB; KB = 8000 bit; lx lux = 1 lx; kn knot = 1852/3600 m s^-1;
ly lightyear = 9460730472580800 m; nmi = 1852 m
"""
_NOT_AS_FACTORS = {"cc", "pt", "qt", "kn", "lx", "ly", "mM", "nM", "kM", "mH", "kH", "nH", "kB", "mB", "nB"}
"""Of letters that 5kn may multiply: units only in \\text or behind a space."""


def _powers(text: str) -> dict[str, int]:
    return {name: int(power or 1) for name, _, power in (part.partition("^") for part in text.split())}


_UNITS: dict[str, tuple[Fraction, dict[str, int]]] = {}
for _entry in f"{_PREFIXED};{_OTHERS}".split(";"):
    _words, _meaning = _entry.split(" = ")
    _factor, _, _kind = _meaning.partition(" ")
    for _word in _words.split():
        _known_prefixes = {"": 0} if _entry not in _PREFIXED else _PREFIXES if len(_word) < 4 else _PREFIX_NAMES
        for _prefix, _power in _known_prefixes.items():
            _unit = Fraction(_factor) * Fraction(10) ** _power, _powers(_kind)
            _UNITS |= dict.fromkeys((_prefix + _word, _prefix + _word + "s" * (len(_word) > 2)), _unit)
_LARGE = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {word: Fraction(1, n) for word, n in (PARTS | {f"{name}th": n for name, n in _LARGE.items()}).items()}
_SCALES: dict[str, Fraction | int] = {
    **_LARGE, "ten": 10, "dozen": 12, "lakh": 10**5, "crore": 10**7, "quadrillion": 10**15, "quintillion": 10**18,
    "sextillion": 10**21, "basis point": Fraction(1, 10**4),
}  # fmt: skip
_SCALES |= {f"{name}s": scale for name, scale in (_SCALES | _PARTS).items()}
_SCALES |= {f"{parts}per {name}": Fraction(1, n) for parts in ("", "parts ") for name, n in _LARGE.items()}
_SCALES |= {
    "halves": Fraction(1, 2), "per mille": Fraction(1, 1000), "ppm": Fraction(1, 10**6),
    "ppb": Fraction(1, 10**9), "score": 20, "mn": 10**6, "bn": 10**9, "百": 100,
    "千": 1000, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8,
}  # fmt: skip
_LAST: dict[str, Fraction | int] = {**_PARTS, "gross": 144, "grand": 1000}
"""Multiply only as the last word: 1 tenth, 5 gross; but 5 fifth graders are counted."""
_SCALED = re.compile(
    rf"(?:({'|'.join(sorted(_SCALES, key=len, reverse=True))})|({'|'.join(_LAST)})(?=\s*$|\s+of\b))(?![A-Za-z])", re.I
)
_NO_NOUN = re.compile(
    r"illions?\b|(?:\b(?:nope|nah|impossible|refuted|disproved|halved|doubled|tripled|trebled|quadrupled|reciprocal|opposite)"
    r"|fold)$",
    re.I,
)
"""Denials, and what changes the number before it."""
_NOT_COUNTED_CJK = re.compile(r"[不没非无或以约多少上下负点倍分之又和与是的错对]")
_NAMELESS = {"unit", "units"}
_DIRECTION = re.compile(
    r"[\s,]+(?:due |to the )?(north|south|east|west|up|down|left|right|(?:in|out)ward|(?:counter|anti-?)?clockwise)"
    r"(?:wards?)?$",
    re.I,
)
_POWER = r"(?:\s*\^\s*\{?\s*(-?\d)\s*\}?)?"
_WORD = r"(?:\\text\{[^{}]*\}|(?<![A-Za-z])[A-Za-z]+(?![A-Za-z]))"  # whole: their parts would be tried by the million
_TAIL = (  # value, unit: 40 \text{ feet}^2 and 5 km/h; 10 weeks and 5cm; 5米
    re.compile(
        rf"(.*?[\d}})!|\w])\s*((?:/\s*)?\\text\{{[^{{}}]*\}}{_POWER}(?:\s*(?:/|\\cdot)?\s*{_WORD}{_POWER})*)", re.S
    ),
    re.compile(rf"(.*[\d}})])\s*((?<![A-Za-z\\{{])[A-Za-z]+{_POWER}(?:\s*(?:[/ ]|\\cdot)\s*[A-Za-z]+{_POWER})*)", re.S),
    re.compile(rf"(.*[\d}})])\s*((?:\\text\{{)?\s*{CJK}\s*\}}?{_POWER})", re.S),
)
_TAIL_CHARS = 120
_BEARING = re.compile(r"(.*?)\s*\^\\circ\s*(?:\\text\{\s*)?([NSEW]|north|south|east|west)\s*\}?", re.I)
_CHANGE = "increased?|decreased?|change|growth|gain|loss|profit|rise|fall|drop|discount|off|reduction|higher|lower"
_PERCENT_OF = re.compile(rf"([^%]*)%\s*(\\text\{{(?!.*\b(?:{_CHANGE})\b)[^{{}}]{{1,60}}\}})")
"""20% alcohol, 20% of the pupils; but 20% increase is no 20% decrease."""
_TEMPERATURE = re.compile(r"(.*?)\s*\^\\circ\s*(?:\\text\{\s*)?(C|F|[Cc]elsius|[Ff]ahrenheit)\s*\}?")
_HAS_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|cis|arc[a-z]+)|[A-Za-z]\^")
_PART = re.compile(
    rf"\s*(?:,?\s*\\land\s*)?(\d+(?:\.\d+)?)\s*(\^\\circ|'{{1,2}}|\\text\{{[^{{}}]*\}}|[A-Za-z]+|(?:(?!\d){CJK[:-1]})+)"
)
_ANGLES = {"^\\circ": Fraction(1), "'": Fraction(1, 60), "''": Fraction(1, 3600)}


def compound(s: str) -> tuple[Fraction, Unit] | None:
    """(value, unit) of 1 hour 30 minutes, 5 ft 6 in, 30^\\circ 15': units of one kind, each smaller than the last."""
    total, units, at = Fraction(0), list[Unit](), 0
    while m := _PART.match(s, at):
        name = untexted(m[2]).strip(" ,")
        name = "min" if name == "m" and units and units[0].kind == (("s", 1),) else name  # 1h30m
        unit = Unit(_ANGLES[name], DEGREES.kind) if name in _ANGLES else _known([(name, 1)])
        if unit is None or (units and (unit.kind != units[0].kind or unit.factor >= units[-1].factor)):
            return None
        total, at = total + Fraction(m[1]) * unit.factor, m.end()
        units.append(unit)
    return (total / units[0].factor, units[0]) if len(units) > 1 and at == len(s) else None


def split_unit(s: str) -> tuple[str, Unit] | None:
    """(value, unit) of a text; `NO_UNIT` when there is none, None when words follow that are no unit."""
    s = s.strip()
    if s.endswith("%"):
        return s[:-1].strip(), PERCENT
    if m := _BEARING.fullmatch(s):
        return m[1].strip(), replace(DEGREES, noun=m[2][0].upper())
    if m := _PERCENT_OF.fullmatch(s):
        found = _read_unit(m[2], True, True)
        return (m[1].strip(), PERCENT) if found and found[0] == 1 and not found[1].kind else None
    if s.endswith("^\\circ") and not _HAS_FUNCTION.search(s):
        return s[: -len("^\\circ")].strip(), DEGREES
    if m := _TEMPERATURE.fullmatch(s):
        return m[1], _known([(f"deg{m[2][0].upper()}", 1)]) or NO_UNIT
    head, tail = s[:-_TAIL_CHARS], s[-_TAIL_CHARS:]
    for i, pattern in enumerate(_TAIL):
        if m := pattern.fullmatch(tail):
            value, named = head + m[1].strip(), i != 1
            if re.fullmatch("[A-Za-z]", m[2]) and (m[2] not in "mgshl" or not exact_number(value)):
                return s, NO_UNIT  # 5x
            found = _read_unit(m[2], named, tail[len(m[1]) : len(m[1]) + 1] == " ")
            if found is not None:
                scale, unit = found
                value = value if scale == 1 else _times(value, scale)
                return value, unit
            return None if named or is_prose(m[2]) else (s, NO_UNIT)
    return s, NO_UNIT


def _times(value: str, scale: Fraction | int) -> str:
    number = exact_number(value)
    return str(number.value * scale) if number else rf"({value})\cdot {scale}"


def _read_unit(text: str, named: bool, apart: bool) -> tuple[Fraction | int, Unit] | None:
    r"""(what it multiplies by, unit) of the words behind a value; `named` in \text or CJK, `apart` behind a space."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("\\cdot", " ")
    text = re.sub(r"/\s*\(([^()]*)\)", lambda m: "/" + "/".join(m[1].split()), text).strip(" .()")
    text = re.sub(r"\b(?:st|nd|rd|th)\b", " ", text).strip() if re.match(r"(?:st|nd|rd|th)\b", text) else text
    scale: Fraction | int = 1
    while (first := _SCALED.match(text)) and (named or len(first[0]) > 2):
        by = (_SCALES if first[1] else _LAST)[first[0].casefold()]
        scale, text = scale * by, text[first.end() :].strip()
    text = re.sub(r"^of\s+(?:the\s+|an?\s+)?", "", text)
    if re.search(r"(?<![A-Za-z])\d", re.sub(_POWER, "", text)):  # 8 of 10
        return None
    if text in ("", "times", *_NAMELESS):
        return scale, NO_UNIT
    direction = _DIRECTION.search(text)
    text = re.sub(r"(?:\b(?:square|sq)\s+|平方)(\w+)", r"\1^2", text, flags=re.I)
    text = re.sub(r"(?:\bcubic\s+|立方)(\w+)", r"\1^3", text, flags=re.I)
    text = re.sub(r"(\w+)\s+squared\b", r"\1^2", re.sub(r"(\w+)\s+cubed\b", r"\1^3", text))
    text = re.sub(r"nautical miles?", "nmi", re.sub(r"light[ -]years?", "ly", text))
    parts = [
        (name, (-1 if mark else 1) * int(power or 1))
        for mark, name, power in re.findall(rf"\s*(/|per\b)?\s*([^\W\d_]+(?:'s)?){_POWER}", text)
    ]
    if direction and (found := _read_unit(text[: direction.start()], named, apart)) and found[1].kind:
        return scale * found[0], replace(found[1], noun=direction[1].casefold())
    if (unit := _known(parts)) and (named or apart or text not in _NOT_AS_FACTORS):
        return scale, unit
    names = [name for name, _ in parts if name not in _NAMELESS]
    if not names:
        return scale, NO_UNIT
    if re.search(CJK, text):
        return None if _NOT_COUNTED_CJK.search(text) or len(text) > 6 else (scale, Unit(noun=text))
    plain = re.fullmatch(rf"[A-Za-z'\-]+{_POWER}(?:[ /]+[A-Za-z'\-]+{_POWER})*", text)
    counted = names[1:] if len(names) > 1 and names[0].casefold() in ("positive", "negative") else names
    if not plain or len(names) > 5 or _NO_NOUN.search(text) or any(name.casefold() in NOT_COUNTED for name in counted):
        return None
    if not named and max(map(len, names)) < (3 if apart else 4):
        return None  # 6xy
    return scale, Unit(noun=" ".join(name.casefold().removesuffix("s") for name in names))


def _known(parts: list[tuple[str, int]]) -> Unit | None:
    factor, kind = Fraction(1), dict[str, int]()
    for name, power in parts:
        found = _UNITS.get(name) or _UNITS.get(name.casefold() if len(name) > 1 else "")
        if found is None:
            return None
        factor *= found[0] ** power
        for base, exponent in found[1].items():
            kind[base] = kind.get(base, 0) + exponent * power
    left = tuple(sorted((base, power) for base, power in kind.items() if power))  # N/kg
    return Unit(factor, left) if left else None


_WITHOUT_DEGREES: dict[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]] = {
    (("celsius", 1),): (("A", 1), ("s", 1)), (("fahrenheit", 1),): (("A", 2), ("kg", -1), ("m", -2), ("s", 4)),
}  # fmt: skip
"""20 C, which is a charge, may be meant for 20^\\circ C; what is asked in coulombs is no temperature."""


def units_clash(gold: Unit, answer: Unit) -> bool:
    """Whether two units cannot be meant for one value; one that is left out can, and so can two nouns."""
    if NO_UNIT in (gold, answer) or (DEGREES in (gold, answer) and _TEMPERATURES & {*gold.kind, *answer.kind}):
        return False
    if answer.kind == _WITHOUT_DEGREES.get(gold.kind):
        return False
    return gold.kind != answer.kind or (bool(gold.kind) and gold.noun != answer.noun)
