r"""One spelling for one answer: unicode, LaTeX synonyms, spacing, fonts, thousands.

Everything here is string work with bounded cost; no mathematics is decided.
"""

from __future__ import annotations

import functools
import html
import itertools
import re
import unicodedata
from collections.abc import Callable

from megatron_t1.reward.answers.words import SMALL_NUMBERS

_LETTERS = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau
upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"""
GREEK = tuple(_LETTERS.split())
"""Letters' names, without pi."""
_UNICODE = {
    **{chr(0x2460 + i): f"{i + 1}," for i in range(20)},  # ①, ②
    **dict(zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΣΦΨΩ", (f"\\{name} " for name in GREEK), strict=True)),
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≦": r"\le ", "≧": r"\ge ",
    "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "−": "-",
    "–": "-", "—": "-", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∀": r"\forall ",
    "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ", "≈": r"\approx ", "≡": r"\equiv ", "∆": r"\Delta ",
    "∠": r"\angle ", "→": r"\to ", "⇒": r"\Rightarrow ", "∖": r"\setminus ", "∂": r"\partial ", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "∣": r"\mid ", "′": "'", "″": "''", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "。": ".", "、": ",", "¢": r"\text{ cents}", "✓": " ", "✔": " ", "✅": " ",
    "∶": ":", "⁄": "/", "∧": r"\land ", "∁": r"\complement ", "∨": r"\lor ", "¬": r"\neg ",
}  # fmt: skip
"""Characters that their compatible form (NFKC) does not spell as LaTeX does."""
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_COMMANDS = {
    "leq": "\\le", "leqslant": "\\le", "leqq": "\\le", "geq": "\\ge", "geqslant": "\\ge", "geqq": "\\ge",
    "neq": "\\ne", "lt": "<", "gt": ">", "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "dbinom": "\\binom",
    "tbinom": "\\binom", "land": ", \\land ", "wedge": ", \\land ", "lor": ", \\lor ", "vee": ", \\lor ",
    "varnothing": "\\emptyset", "rightarrow": "\\to",
    "longrightarrow": "\\to", "implies": "\\Rightarrow", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[",
    "rbrack": "]", "vert": "|", "lvert": "|", "rvert": "|", "backslash": "\\setminus", "ast": "\\cdot", "div": "/",
    "degree": "^\\circ", "textdegree": "^\\circ", "dots": "\\ldots", "cdots": "\\ldots", "dotsm": "\\ldots",
    "dotsb": "\\ldots", "varepsilon": "\\epsilon", "varphi": "\\phi", "colon": ":", "langle": "(", "rangle": ")",
    "mod": "\\bmod", "arcctg": "\\arccot", "tg": "\\tan", "ctg": "\\cot", "mid": "|", "cupdot": "\\cup",
    "sqcup": "\\cup", "nicefrac": "\\frac", "sfrac": "\\frac",
    "bar": "\\overline", "imath": "i", "jmath": "j", "checkmark": "", "lnot": "\\neg",
}  # fmt: skip
_PHRASES = {
    r"(?:all )?real(?: number)?s|\\mathbb\s*\{?r\}?": r"(-\infty,\infty)",
    r"(?:all )?positive (?:real numbers|reals)|\\mathbb\{r\}(?:\^\{?\+\}?|_\{\s*>\s*0\s*\}|_\+)": r"(0,\infty)",
    r"(?:there (?:is|are) |(?:the|this) (?:equation|system|inequality) has )?no(?: real)? (?:solutions?|roots)"
    r"(?: exists?)?|none|(?:the )?empty set|\\\{ ?\\\}|空集"
    r"|(?:方程)?(?:无|没有)(?:实数?)?[解根]": r"\emptyset ",
    r"infinity|\\infty|infinite|an infinite number|(?:有|共有)?无(?:[穷限]多|数)[个组种条]?解?"
    r"|(?:there (?:is|are) )?(?:infinitely many|an infinite number of)(?: (?:real |integer )?solutions)?": r"\infty ",
    r"(?:the set of )?all (?:the )?integers|所有整数|全体整数": r"\mathbb{Z}",
    r"(?:(?:the )?limit )?does(?: not|n['’]t) exist|undefined|不存在": r"\text{DNE}",
    r"(?:it |(?:(?:the|this) )?(?:series|integral|sequence) )?(?:diverges|(?:is )?divergent)": r"\text{diverges}",
    r"(?:it )?(?:converges absolutely|(?:is )?absolutely convergent)|绝对收敛": r"\text{converges absolutely}",
    r"(?:it )?(?:converges conditionally|(?:is )?conditionally convergent)|条件收敛": r"\text{converges conditionally}",
    r"(?:it |(?:(?:the|this) )?(?:series|integral|sequence) )?(?:converges|(?:is )?convergent)": r"\text{converges}",
}  # fmt: skip
_PHRASE = re.compile("|".join(f"({said})" for said in _PHRASES))
_SPELLINGS = tuple(_PHRASES.values())
_SO = r"\s*[,.;]\s*(?:it|they|this|that|there|he|she|we|you|i) (?:is|are|was|were|does|do|did|can|could|will|has|have)"
_YES_OR_NO = re.compile(rf"(yes){_SO}(?: one| so)?|(no){_SO}(?: ?n[o']t(?: one| any| so)?| none)")
"""A sentence that says nothing else: `Yes, n=5` is another answer."""
_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot", "arcsinh", "arccosh",
    "arctanh", "sinh", "cosh", "tanh", "log", "cis",
    "ln", "exp", "lcm", "gcd", "max", "min", "det", "lim", "sup", "inf",
}  # fmt: skip
_ALSO_UNITS = {"min", "max", "sec", "inf", "sup", "det"}
_MARK = re.compile(r"(?:\\text\{\s*|(?<![A-Za-z\d(]))(?:\(?(\d|[a-hA-H]|i{1,3}|iv|v)\)|([①-⑧]))\s*:?\s*\}?\s*")
_MARKS = ("abcdefgh", "ABCDEFGH", "12345678", ("i", "ii", "iii", "iv", "v"))


def _parts(text: str) -> str:
    """(a) 3 (b) 5: each part as the value of a name."""
    marks = list(_MARK.finditer(text)) if _MARK.match(text) else []
    names = [m[1] or str(ord(m[2]) - ord("①") + 1) for m in marks]
    if len(marks) < 2 or not any(names == list(known)[: len(names)] for known in _MARKS):
        return text
    ends = [*(m.start() for m in marks[1:]), len(text)]
    values = [text[m.end() : end].strip(" ,;.$\n\\") for m, end in zip(marks, ends, strict=True)]
    if not all(values) or any(re.search(r"[,;]", re.sub(r"[(\[{].*[)\]}]", "", value)) for value in values):
        return text
    return ", ".join(rf"\text{{part {name}}}={value}" for name, value in zip("abcdefgh", values, strict=False))


_CURRENCIES = {"$": "dollars", "£": "gbp", "€": "euros", "¥": "yuan", "￥": "yuan", "₹": "rupees"}
_AMOUNT = r"(-?\d(?:[\d,]|\{,\})*(?:\.\d+)?)"
_MONEY = re.compile(
    r"\s*(-?)(?:US)?(\\?\$|[£€¥￥₹]|(?:\\text\{\s*)?(?:Rs|USD|EUR|GBP|CNY|RMB|JPY|INR)\.?\s*\}?)\s*"
    rf"{_AMOUNT}(?:\s*(thousand|[mb]illion|(?-i:[MB])\b))?\.?\s*",
    re.I,
)
_MONEY_BEHIND = re.compile(rf"\s*{_AMOUNT}(?:\\[,;: ]|~|\s)*(?:\\text\{{\s*)?([£€¥￥₹])\s*\}}?\.?\s*")
_SHORT = {"M": "million", "B": "billion"}


_ENDS_UNIT = re.compile(r"\s*(?:[.,;)\]}/^]|\\(?:cdot|mathrm|text)|$)")


def _font(match: re.Match[str]) -> str:
    raw = match[1] if match[1] is not None else match[2]
    inner, before = raw.strip(), match.string[max(match.start() - 8, 0) : match.start()].rstrip()
    if "\\" in inner and before[-1:].isdecimal() and re.fullmatch(r"(?:[A-Za-z]|\^\{?-?\d\}?|\\cdot|[\s/~()])+", inner):
        return rf"\text{{ {re.sub('[{}]', '', inner).replace(chr(92) + 'cdot', ' ')}}}"  # J\cdot s
    if "\\" in inner or re.match(r"\\math(?:bf|it)\s*\{?[a-z]\}?$", match[0]):
        return f"{{{inner}}}" if before.endswith(("^", "_")) else f" {inner} "
    inner = re.sub("[{}]", "", inner)  # m s^{-2}
    a_unit = bool(re.search(r"[\d}]$", before)) and (len(inner) > 1 or raw != inner)  # 27\mathrm{~min}
    apart = match.string[: match.start()].endswith(" ") and _ENDS_UNIT.match(match.string, match.end())
    if apart and re.search(r"[\d}]$", before) and re.fullmatch(r"\\mathrm\s*\{?[ACFHJKLNTVW]\}?", match[0]):
        a_unit = True  # 50\,\mathrm{N}
    if before.endswith(("_", "_{")):
        return f"{{{inner}}}" if before.endswith("_") else inner
    if inner in _FUNCTIONS and not before.endswith("/") and not (a_unit and inner in _ALSO_UNITS):
        return f"\\{inner} "
    if re.fullmatch(r"[A-Za-z]+", inner) and a_unit:
        return rf"\text{{{inner}}}"
    return f" {inner}" if re.fullmatch(r"[A-Zeid]|\d*|[^a-zA-Z]*", inner) else rf"\text{{{inner}}}"


def _sign_of_unit(match: re.Match[str]) -> str:
    return rf"\text{{ {'μ' + match[3] if match[3] else (match[1] or match[2] or '') + 'ohm'}}}"


def _text(match: re.Match[str]) -> str:
    if match[1].strip() in _FUNCTIONS - _ALSO_UNITS:
        return f"\\{match[1].strip()} "
    if amount := re.fullmatch(r"\s*(-?\d[\d.,/]*)(\s+[A-Za-z].*)", match[1]):  # \text{5 units}
        return rf"{amount[1]}\text{{{amount[2]}}}"
    return rf"\text{{{match[1]}}}" if re.search(r"[^\W\d_]", match[1]) else match[1]


def _congruence(match: re.Match[str]) -> str:
    r"""n \equiv 2 \bmod 3 is one; without a modulus, an equation is meant."""
    text = match[0]
    mod = re.sub(r"\\bmod(?![a-z])", r"\\pmod", text)
    return mod if "mod" in text else re.sub(r"\\equiv(?![a-z])", "=", text)


def _unicode(text: str) -> str:
    if text.isascii():
        return text
    text = re.sub(r"([√∛∜])\s*(?:\(([^()]*)\)|(\d+|[a-zA-Z])|(?=\{))",
                  lambda m: _ROOTS[m[1]] + (f"{{{m[2] or m[3]}}}" if m[2] or m[3] else ""), text)  # fmt: skip
    return "".join(_SPELLED.get(form, _compatible)("".join(run)) for form, run in itertools.groupby(text, _form))


def _form(char: str) -> str:
    """Of ² "<super", of ₂ "<sub", of ½ "<fraction", of most ''."""
    spelled = char.isascii() or char in _UNICODE
    return "" if spelled else unicodedata.decomposition(char).partition(">")[0]


def _compatible(text: str) -> str:
    shown = (char for char in text if char.isascii() or unicodedata.category(char) != "Cf")
    return "".join(_UNICODE.get(c) or (c if c.isascii() else _nfkc(c)) for c in shown)


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("−", "-")


_SPELLED: dict[str, Callable[[str], str]] = {
    "": _compatible,
    "<super": lambda run: f"^{{{_nfkc(run)}}}",
    "<sub": lambda run: f"_{{{_nfkc(run)}}}",
    "<fraction": lambda run: "".join(r"\frac{{{}}}{{{}}}".format(*_nfkc(char).split("⁄")) for char in run),
}


_Replacement = str | Callable[[re.Match[str]], str]


def _rules(*rules: tuple[str, str, _Replacement]) -> tuple[tuple[str, re.Pattern[str], _Replacement], ...]:
    """Of each: what a text that it changes has in it, a pattern, and what comes in its place."""
    return tuple((sign, re.compile(pattern), replacement) for sign, pattern, replacement in rules)


_JOINTS = {"and": "\\land", "or": "\\lor", "和": "\\land", "与": "\\land", "或": "\\lor", "且": "\\land"}
_LETTER_END = r"(?![a-zA-Z])"
_UNIT = r"\\text\{[^{}]*\}(?:\^(?:\{-?\d\}|\d))?"
_RULES = _rules(
    # spellings of other notations
    ("&", r"&(?:[lg][te]|ne|deg|pi|times|minus|plusmn|nbsp|infin|amp);", lambda m: _unicode(html.unescape(m[0]))),
    ("'", r"(?<=\d)'(?=\d{3}(?!\d))", ""),
    (".", r"(?<![\d.,])[1-9]\d{0,2}(?:\.\d{3}){2,}(?![\d.])", lambda m: m[0].replace(".", "")),
    ("%", r"^\s*(-?\d+),(\d{1,2})\s*(?=\\?%\s*$)", r"\1.\2"),
    ("**", r"\*\*", "^"),
    ("\\times", r"(\\(?:vec|mathbf)\s*\{?\s*[a-z]\s*\}?)\s*\\times\s*(?=\\(?:vec|mathbf))", r"\1\\ltimes "),
    # what only decorates
    ("\\", r"\\(?:h|v)?phantom\s*(?:\{[^{}]*\}|.)|\\tag\*?\s*\{[^{}]*\}|\\label\s*\{[^{}]*\}", ""),
    ("\\", r"\\(?:color\s*\{[^{}]*\}|(?:textcolor|f?colorbox|bbox|cssId|class|html[A-Z]\w*)"
     r"(?:\s*(?:\{[^{}]*\}|\[[^\[\]]*\]))+(?=\s*\{)|underline(?=\s*\{))", ""),
    ("$", r"\\text\s*\{\s*\$([^$]*)\$\s*\}", r"\1"),
    ("{", r"\{\s*\{([^{}]*)\}\s*\}", r"{\1}"),
    ("\\begin", r"\\(?:begin|end)\{(?:aligned|align\*?|gathered|split|equation\*?)\}", " "),
    ("\\", rf"\\(?:left|right|[bB]igg?[lrm]?|middle|displaystyle|textstyle|limits|nolimits|rm|bf|it|dotfill|hfill|"
     rf"boldsymbol|bm|mathop|mathbin|mathrel|ensuremath|(?:footnote|normal)size|small|tiny|"
     rf"[lL]arge|LARGE|[hH]uge|bfseries){_LETTER_END}\.?", ""),
    # separators of thousands, spaces
    ("", r"(?<=\d)(?:,\s*\\!\s*|\{,\}|\\,|\\ |\\;)(?=\d{3}(?!\d))", ""),
    ("", r"\\\$|\$|\\!", lambda m: "" if m[0] == "\\!" else " "),
    ("\\%", r"\\%", "%"),
    ("\\&", r"\\&", " and "),
    ("<su", r"<su([pb])>([^<>]*)</su[pb]>", lambda m: ("^" if m[1] == "p" else "_") + "{" + m[2] + "}"),
    ("\\", r"(?<!\\)\\[()\[\]]", " "),
    ("{", r"(?<!\\text)\{([,:])\}", r"\1"),
    ("", r"(?<=\d)\s*(?:\.\.\.|\\[lc]?dots)\.?\s*$", r"\\ldots "),
    ("", rf"(?<!\\)\\(?:[,;:> \n]|q?quad|thinspace|enspace|hspace\*?\{{[^{{}}]*\}}|space{_LETTER_END})|~", " "),
    # words and fonts
    ("\\mathrm", r"\\mathrm\s*\{?\s*C\s*\}?\s*_\s*\{?(\w+)\}?\s*\^\s*\{?(\w)\}?", r"\\binom{\1}{\2}"),
    ("\\", r"\\(?:text|mbox|hbox|textbf|textit|textrm|textnormal|textsf|emph|textup)\s*\{([^{}]*)\}", _text),
    ("\\", r"\\(?:mathrm|mathbf|mathit|mathsf|mathtt|operatorname\*?|mathnormal|mathcal)\s*"
     r"(?:\{((?:[^{}]|\{[^{}]*\})*)\}|([a-zA-Z]))", _font),
    ("\\", r"\\([a-zA-Z]+)", lambda m: _COMMANDS.get(m[1], m[0])),
    ("\\frac", rf"(?<=[\d}}\s])\\frac\s*\{{\s*({_UNIT})\s*\}}\s*"
     rf"\{{\s*({_UNIT}(?:\s*(?:\\cdot)?\s*{_UNIT}){{0,2}})\s*\}}\s*$",
     lambda m: rf"{m[1]}/{'/'.join(re.findall(_UNIT, m[2]))}"),
    ("\\", r"(?<=[\d}])(?:\s*\\text\{\s*([kmM]?)\s*\}|\s*([kmM]))?\s*\\(?:Omega|text\{\s*Omega\s*\})\s*$"
     r"|(?<=[\d}])\s*\\mu\s*(?:\\text\{\s*)?([mgsLlFACVWJN]|mol|Pa|Hz)\}?\s*$", _sign_of_unit),
    ("p", r"\\text\{\s*(?:per ?cent|percentage|pct)\s*\}|(?<![a-zA-Z])(?:percentage|per ?cent|pct)(?![a-zA-Z])", "%"),
    ("mod", r"\\text\{\s*(\(?\s*mod(?:ulo)?\b[^{}]*)\}", r"\1"),
    ("mod", r"\(\s*(?:\\bmod|mod(?:ulo)?(?![a-z]))\s*([^()]+)\)", r"\\pmod{\1}"),
    ("mod", r"(?<![\\a-zA-Z])mod(?:ulo)?(?![a-zA-Z])", r"\\bmod "),
    ("", r"\^\s*(?:\{\s*(?:\\circ|\\text\{?circ\}?)\s*\}|\\circ(?![a-zA-Z])|\\text\{circ\}|\\textcirc)|"
     r"\\text\{\s*(?:degrees?|度)\s*\}|(?<=\d)\s*(?:degrees?\b|度)|\\text\{\s*degrees?(?=\s)",
     lambda m: r"^\circ " + (r"\text{" if m[0].startswith("\\text{") and not m[0].endswith("}") else "")),
    ("\\circ", r"(\^\s*\^?\\circ\s*)+", r"^\\circ "),
    ("prime", r"\^\s*\{?\s*((?:\\prime\s*)+)\}?", lambda m: "'" * m[1].count("p")),
    ("sq.", r"\bsq\.", "sq"),
    ("比", r"(?<=\d)\s*比\s*(?=\d)", ":"),
    ("^", r"\^\s*\{?\s*\\text\{\s*(st|nd|rd|th)\s*\}\s*\}?|\^\s*\{\s*(st|nd|rd|th)\s*\}",
     lambda m: rf"\text{{{m[1] or m[2]}}}"),
    ("百", r"百分之\s*(\d[\d.]*)", r"\1%"),
    ("负", r"负\s*(?=[\d\\零一二三四五六七八九十百两])", "-"),
    ("except", r"(?:\\text\{)?\s*(?:all )?real(?: number)?s (?:except|other than)(?: for)?\s*\}?\s*(.+)$",
     r"(-\\infty,\\infty)\\setminus \\{\1\\}"),
    ("周", r"周(?=[一二三四五六日天]\s*\}?$)", "星期"),
    ("else", r"\belse(?:where)?\b", "otherwise"),
    ("//", r"//", r"\\parallel "),
    ("const", r"\\text\{\s*const(?:ant)?\.?\s*\}", "C"),
    ("|", r"\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\{[A-Z]\})?\s*\|\s*\1\s*=\s*([^|,]+),\s*", r"\\{\2| "),
    ("\\equiv", r"(?s).+", _congruence),
    ("_", r"(?:\{\s*\})?_\s*\{?(\d+)\}?\s*([CP])\s*_\s*\{?(\d+)\}?", r"\2_{\1}^{\3}"),  # {}_5C_2
    ("C", r"^\s*(?:\^\s*\{?(\d+)\}?|(\d+))\s*C\s*_?\s*\{?(\d+)\}?\s*$",
     lambda m: rf"C_{{{m[1] or m[2]}}}^{{{m[3]}}}"),  # 10C3
    ("abs", r"(?:\\text\{abs\}|(?<![\\a-zA-Z])abs)\s*\(([^()|]*)\)", r"|\1|"),
    ("E", r"(?<=\d)\s*E\s*\{\s*([+-]?\d+)\s*\}", r"e\1"),
    ("", rf"^\s*(\\text\{{)?\s*(?:negative|minus)\s+(?=(?:{'|'.join(SMALL_NUMBERS)})|\d)", lambda m: f"-{m[1] or ''}"),
    ("", r"^\s*\\text\{\s*(?:negative|minus)\s*\}\s*(?=\d|\\frac)", "-"),
    ("\\not", r"\\not\s*(?:=|\\in(?![a-z]))", lambda m: r"\ne " if m[0][-1] == "=" else r"\notin "),
    # arguments in braces
    ("\\frac", r"\\frac\s*(\d)\s*", r"\\frac{\1}"),
    ("\\frac", r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}"),
    ("\\", r"\\(frac|sqrt|binom)\s+(?=[{\[])", r"\\\1"),
    ("\\sqrt", r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
    ("", r"\\text\{[^{}]*\}|([\^_])\s*(\d+|(?<=\^)-\d+|[A-Za-z](?![A-Za-z]*\s*\())",  # nobody means x^1 0
     lambda m: f"{m[1]}{{{m[2]}}}" if m[1] else m[0]),
    ("{(", r"(?<![\\a-zA-Z])([a-zA-Z])\s*\{(\([^(){}]*\))\}", r"\1\2"),  # f{(x)}
    ("}_", r"(?<![\w}^_\]])\{([A-Za-z])\}(?=_)", r"\1"),
    (":", r"(\\\{[^:|{}]{0,80}[A-Za-z][^:|{}]{0,40}):", r"\1|"),
    ("_", r"_\s*\{\s*\\text\{\s*([^{}]*?)\s*\}\s*\}", r"_{\1}"),
    ("^{", r"(?:(?<![\w}\])^_])\{([^{}]*)\}|(?<![\w.\\}])(\d+|[A-Za-z]))\s*\^\{\s*1\s*/\s*2\s*\}",
     lambda m: rf"\sqrt{{{m[1] or m[2]}}}"),
    ("{", r"(?<=(?<![_\\])\{)\s*\d{1,3}(?:,\d{3})+\s*(?=\})", lambda m: m[0].replace(",", "")),
    ("\\mathbb", r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
    ("\\", r"\\(?:vec|hat)\s*(?:\{\s*([a-z])\s*\}|([a-z])(?![a-z]))", lambda m: f" {m[1] or m[2]} "),
    ("\\", r"\\(triangle|angle)\s*\{([A-Z]+)\}", r"\\\1 \2"),
    # plain text spellings
    ("sqrt", r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    ("(", rf"(?<![\\a-zA-Z_])({'|'.join(sorted(_FUNCTIONS, key=len, reverse=True))})(?=\s*\()", r"\\\1"),
    ("", r"(?<![\\a-zA-Z])(?:(pi|infinity|inf)(?![a-zA-Z])|(sin|cos|tan|cot|ln|log|exp) ?(?= [\da-z]\b|\\|\d))",
     lambda m: rf"\{m[2]} " if m[2] else r"\pi " if m[1] == "pi" else r"\infty "),
    ("<=", r"<=", r"\\le "), (">=", r">=", r"\\ge "), ("!=", r"!=", r"\\ne "),
    ("*", r"\*", r"\\cdot "),
    ("\\text", r"(?:(?<=[\d)])|(?<=[\w)]\}))(\s*\\text\{[^{}]*?[A-Za-z.])(?:\s*,|,?\s+(and|or))\s*\}"
     r"(?=\s*(?:-?[\d(]|\\(?:frac|sqrt|pi)|[a-zA-Z]\s*=))",
     lambda m: rf"{m[1]}}}, {_JOINTS.get(m[2], '')} "),  # 12\text{ boys and }15\text{ girls}
    ("\\text", r"(?:(?<=[\d)])|(?<=[\w)]\}))(\s*\\text\{[^{}\d]*?[A-Za-z.])(?:\s*,|,?\s+(and|or))"
     r"\s+(\d[\d.,/]*)(\s+[^{}\d]*\})",
     lambda m: rf"{m[1]}}}, {_JOINTS.get(m[2], '')} {m[3]}\text{{{m[4]}"),
    ("", r"(?<![^\s=:}(])(\d+)\s*(?:\\text\{\s*)?(?:with )?(?:a )?(?:[Rr]|remainder(?: of)?)\s*\}?\s*(\d+)(?=[\s.)]*$)",
     r"\1\\text{ R }\2"),
    ("", r"(?<![^\s=:}(])(\d+)\s*(?:\\text\{\s*)?(?:out of|in)\s*\}?\s*(\d+)(?=[\s.)]*$)", r"\1/\2"),
    ("", r",?\s*\\text\{\s*,?\s*(and|or|[和与或且])\s*,?\s*\}\s*,?|,?(?<![a-zA-Z\\])(and|or)(?![a-zA-Z]),?"
     r"|,?([和与或且])",
     lambda m: rf", {_JOINTS[m[1] or m[2] or m[3]]} "),
    ("\\pmod", r"^([^,]*\\equiv)\s*((?:-?\d+\s*,\s*(?:\\l(?:and|or)\s*)?)+-?\d+)\s*(\\pmod\s*(?:\{[^{}]*\}|\d+))\s*$",
     lambda m: re.sub(r"-?\d+", lambda residue: f"{m[1]} {residue[0]}{m[3]}", m[2])),  # x \equiv 1, 4 \pmod 5
    ("", r"(^\s*|(?:\\cup|\\in|[=:])\s*)([\[\]])([^\[\]]{0,80}[,;][^\[\]]{0,80})([\[\]])"
     r"(?=\s*(?:$|\\cup|[.,]))",  # ]1, 2[
     lambda m: m[1] + "[("[m[2] == "]"] + m[3] + "])"[m[4] == "["]),
    ("\\infty", r"\+\s*\\infty", r"\\infty"),
    ("\\ne", r"(?<=[\d}\s])\(([^(),]*\\ne [^()]*)\)\s*$", r", \1"),
    ("", r"\s+", " "),
    (".", r"(?<=[}\s])\.(?=\s*[\])])", ""),
)  # fmt: skip


_CASES = re.compile(
    r"(?:\\left\s*)?\\\{\s*\\begin\{(array|aligned|gathered|matrix)\}(?:\{[^{}]*\})?(.*?)\\end\{\1\}(?:\s*\\right\s*\.)?"
    r"|\\begin\{([dr]?cases)\}(.*?)\\end\{\3\}",
    re.S,
)
_CONDITION = re.compile(r"^\s*(?:\\(?:text|mbox|mathrm)\{\s*(?:if|for|when|where)\s*\}|(?:if|for|when|where)\b)")


def _rows_of_cases(match: re.Match[str]) -> str:
    """A system as the list of its equations; a function in pieces as the set of its (value, condition)."""
    inside = re.sub(r"&\s*(?=[=<>]|\\[lg]e)|([=<>]|\\[lg]eq?)\s*&", r"\1", match[2] or match[4])
    rows = [row.strip(" \n.,;") for row in re.split(r"\\\\(?:\[[^\]]*\])?", inside)]
    pieces = [[part.strip(" \n,;") for part in row.split("&")] for row in rows if row]
    if all(len(piece) == 2 for piece in pieces):
        return r"\{" + ", ".join(f"({value}, {_CONDITION.sub('', condition)})" for value, condition in pieces) + r"\}"
    return match[0] if "&" in inside else ", ".join(row for row in rows if row)


_DECIMAL = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_BETWEEN_BRACKETS = re.compile(r"[^()\[\]{}]+")


def _without_thousands(match: re.Match[str]) -> str:
    """1,000, 2,000 as 1000, 2000: where some commas have a space, those without are no list's."""
    return ungrouped(match[0]) if ", " in match[0] else match[0]


@functools.lru_cache(maxsize=4096)
def normalize(text: str) -> str:
    """Canonical spelling of an answer."""
    if _DECIMAL.fullmatch(text):
        return text
    if money := _MONEY.fullmatch(text):
        code = re.sub(r"\\(?:text)?|[{}.\s]", "", money[2])
        text = rf"{money[1]}{money[3]}\text{{ {_SHORT.get(money[4], money[4]) or ''} {_CURRENCIES.get(code, code)}}}"
    elif money := _MONEY_BEHIND.fullmatch(text):
        text = rf"{money[1]}\text{{ {_CURRENCIES.get(money[2], money[2])}}}"
    s = re.sub(r"^\s*(\*\*|`+)([^*`]+)\1\s*$", r"\2", _unicode(_parts(text.strip())))
    if "\\begin" in s:
        s = _CASES.sub(_rows_of_cases, s)
    if "\\begin" not in s:  # a doubled backslash of an escaped source, not a row end
        s = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", s)
    if "{align" in s or "{gather" in s or "{split" in s:
        s = re.sub(r"\\\\\s*(?=[=<>]|\\[lg]e)", " ", s.replace("&", "")).replace("\\\\", ", ")
    for sign, pattern, replacement in _RULES:
        if sign in s:
            s = pattern.sub(replacement, s)
    if ", " in s:
        s = _BETWEEN_BRACKETS.sub(_without_thousands, s)
    s = re.sub(r"\\+$", "", s.lstrip(" ,;:=").rstrip(" .,;:^")).rstrip()
    if s.endswith("}") and not s.endswith("\\}") and s.count("}") == s.count("{") + 1:
        s = s[:-1]
    s = re.sub(rf"^\\approx{_LETTER_END}\s*", "", s)
    bare = untexted(s).strip(" :.").casefold()
    if agreed := _YES_OR_NO.fullmatch(bare):
        return agreed[1] or agreed[2]
    said = _PHRASE.fullmatch(bare)
    return _SPELLINGS[(said.lastindex or 0) - 1] if said else s


_GROUPED = re.compile(r"(?<![\d.])[1-9]\d{0,2}(?:,\d{3})+(?!\d)")
_IN_TEXT = re.compile(r"\\text\{([^{}]*)\}")


def ungrouped(s: str) -> str:
    """Numbers without the commas of their thousands."""
    return _GROUPED.sub(lambda m: m[0].replace(",", ""), s)


def untexted(s: str) -> str:
    r"""Without \text around its words."""
    return _IN_TEXT.sub(r"\1", s)


_MEANT_SPACE = re.compile(r"(\\[a-zA-Z]+) (?=[a-zA-Z])|(?<=\d) (?=\d)")


def compact(s: str) -> str:
    """`normalize`d text without the spaces that mean nothing: for comparing as strings."""
    if " " not in s:
        return s
    return _MEANT_SPACE.sub(lambda m: f"{m[1] or ''} @", s).replace(" ", "").replace("@", " ")
