r"""Reads the numbers in a text, and the calculations that they stand in, by a small grammar.

```text
number      = [sign] [currency] ([whole] decimal "/" decimal | decimal ("^" | "× 10^" | "e") integer | decimal)
calculation = number {[words] [operator] number} ["=" number]
```

A text is first written plainly (:func:`plain`), then cut into tokens; :func:`result` reads a calculation from them.
Roots, pi and LaTeX's functions are tokens without a value.
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

LONGEST = 25
"""Longest number in characters; longer ones are degenerate text and too large for a float."""
MOST_TOKENS = 200
"""Tokens in which a calculation must end; longer ones are degenerate text."""
MOST_WORDS = 4
"""Words in a row within a calculation, as in ``3 boxes of red pens * 4 = 12``."""

_DASH = "-\u2212\u2013\u2012"  # hyphen, minus, en dash, figure dash
_MONEY = "$£€¥₹"
_DECIMAL = r"(?:(?<![\w.)])\.\d+|\d+(?:[.,]\d+)*)"
_INTEGER = r"[+-]?\d+"
_NUMBER = (
    rf"(?P<sign>(?<![\w.)\]%])(?:[{_DASH}+]|\u2212\s))?(?:[{_MONEY}]\s?(?P<second>[{_DASH}])?)?(?<!\^)(?<!\^[-{{])"
    rf"(?:(?P<whole>\d+)\ (?=\d+/\d))?(?P<first>{_DECIMAL})"
    rf"(?:\s?/\s?(?P<below>{_DECIMAL})|\s?[×x*]\s?10\^\{{?(?P<ten>{_INTEGER})\}}?|[eE](?P<e>{_INTEGER})(?!\w)"
    rf"|\^\{{?(?P<power>{_INTEGER})\}}?)?"
)
_OPERATOR = (
    rf"[+*/×÷·^]|[-\u2212\u2013](?=\s?[\d(.{_MONEY}])|(?<=[\d\s])x(?=[\s\d(])|(?<=[\d)])\("
    r"|(?i:\b(?:plus|minus|times|(?:added|multiplied|divided|subtracted) (?:by|to|from))\b)"
)
NUMBER = re.compile(_NUMBER)
_TOKEN = re.compile(
    rf"(?P<number>{_NUMBER})|(?P<equals>[=≈→]>?|\bequals\b)|(?P<operator>{_OPERATOR})|(?P<of>\bof\b)"
    r"|(?P<begin>(?i:\b(?:sum|product|difference|quotient|add|subtract|multiply|divide|half|twice|double|triple)\b))"
    r"|(?P<function>[√π]|\\(?:sqrt|pi|[dt]?frac|log|ln|infty)\b)"
    r"|(?P<stop>\n|[.!?](?=\s|$)|[,;:]|(?i:\b(?:because|since|as|if|when|where|so|but|not)\b))"
    r"|(?P<open>\()|(?P<word>[^\W\d_]+)"
)
_SUPERSCRIPT = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?|\d{1,3}(?:\.\d{3}){2,}|\d*\.?\d+")
_SEPARATOR = r"(?:[\u00a0\u2009\u202f'’_]|\\[,! ]|\{,\})"

_REWRITTEN: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"<<[^<>\n]*>>", ""),  # GSM8K's calculator
    (r"(?<=\d)\*\*(?=\d)", "^"),  # Python's power
    (r"\*\*|`", ""),  # markdown
    (r"[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m.group()).replace("\u2044", "/")),
    (r"[⁻⁰¹²³⁴-⁹]+", lambda m: "^" + m.group().translate(_SUPERSCRIPT)),
    (r"\\(?:left|right)\b|\\(?=[$%])", ""),
    (r"\\(?:times|cdot)\b", "×"),
    (r"\\div\b", "÷"),
    (r"\\approx\b", "≈"),
    (rf"(?<=\d){_SEPARATOR}(?=\d{{3}}(?!\d))", ","),
    (r"\\[,!;: ]", " "),
    (
        rf"(\d[^\S\n]{{0,9}})?\\[dt]?frac\s?(?:\{{\s?({_DECIMAL})\s?\}}|(\d))\s?(?:\{{\s?({_DECIMAL})\s?\}}|(\d))",
        lambda m: f"{m[1].strip() + ' ' if m[1] else ''}{m[2] or m[3]}/{m[4] or m[5]}",
    ),
    (
        rf"(####|[={{(])\s{{0,9}}([{_DASH}])\s{{1,9}}(?=[\d.{_MONEY}])",
        r"\1 \2",
    ),  # elsewhere a dash and a blank is no sign
    (r"(?m)^(####[^\d\n]{0,9}\d{1,3}(?: \d{3})+)(?=\s?[€$£%.]?$)", lambda m: m[1][:5] + m[1][5:].replace(" ", "")),
]
_REWRITE = [(re.compile(pattern), new) for pattern, new in _REWRITTEN]


class Token(NamedTuple):
    """A number, operator, word or mark, with its place in the text."""

    kind: str
    """Name of the group in the grammar, such as ``number``."""
    start: int
    end: int
    text: str


class Result(NamedTuple):
    """The value of a calculation, and where its text ends."""

    value: str | None
    """A decimal number or a fraction in lowest terms; None: there is no number, or it can't be read."""
    end: int
    unfinished: bool
    """True for a calculation without a result, such as ``3 + 4``; its value is None."""


def plain(text: str) -> str:
    """Write LaTeX, markdown, Unicode's fractions and powers, and separators of thousands in one plain form."""
    for pattern, new in _REWRITE:
        text = pattern.sub(new, text)
    return text


def tokens(text: str, start: int = 0, end: int = sys.maxsize) -> list[Token]:
    """Cut a part of a plain text into tokens; what is no token, such as a percent sign, has no meaning here."""
    return [Token(str(match.lastgroup), *match.span(), match.group()) for match in _TOKEN.finditer(text, start, end)]


def result(found: Sequence[Token], first: int, end: int) -> Result:
    """Read the calculation whose first number is at or behind token ``first``, within the text before ``end``.

    The value is the number behind the last ``=``. Without one it is the first number, unless an operator joins it to
    another.
    """
    value, joint, words, unfinished, stop = None, "", 0, False, 0
    for token in found[first : first + MOST_TOKENS]:
        kind, begun = token.kind, value is not None
        if token.start >= end or (begun and (kind == "stop" or words > MOST_WORDS or (kind == "open" and not joint))):
            break
        stop = token.end
        if kind == "number":
            if not begun or joint == "equals":
                value, unfinished = token.text, joint == "begin"
            else:
                unfinished |= joint == "operator" or (not words and token.text[0] in f"+{_DASH}")
            joint, words = "", 0
        elif kind == "word":
            joint, words = joint if joint in ("equals", "begin") else "", words + 1
        elif kind == "function":  # a root or pi is not computed: only a number behind "=" is a result then
            joint, unfinished = "begin", unfinished or begun
        elif kind in ("equals", "operator") or (kind in ("of", "begin") and joint not in ("equals", "begin")):
            joint, words = kind, 0
    return Result(None if unfinished or value is None else read(value), stop, unfinished)


def read(number: str) -> str | None:
    """Return a number of the grammar as a decimal number, or as a fraction in lowest terms.

    None if it is too long, and for two signs, a division by zero, and separators that make no groups, as in ``1,2,3``.
    """
    parts = NUMBER.fullmatch(number)
    if parts is None or len(number) > 2 * LONGEST or (parts["sign"] and parts["second"]):
        return None
    try:
        value = _value(parts)
    except (ArithmeticError, ValueError):
        return None
    value = value if (parts["sign"] or parts["second"] or "+") == "+" else -value
    text = str(value) if parts["below"] else f"{Decimal(value.numerator) / value.denominator:f}"
    return text if len(text) <= LONGEST else None


def _value(parts: re.Match[str]) -> Fraction:
    """Return the value of a number without its sign; raises ValueError or ArithmeticError."""
    value = _decimal(parts["first"])
    exponent = int(parts["ten"] or parts["e"] or parts["power"] or 0)
    if abs(exponent) > LONGEST:
        raise ValueError("too large or too small")
    if parts["below"]:
        return _decimal(parts["whole"] or "0") + value / _decimal(parts["below"])
    return value**exponent if parts["power"] else value * Fraction(10) ** exponent


def _decimal(digits: str) -> Fraction:
    """Return the value of digits with a decimal point and separators of thousands."""
    if not _GROUPED.fullmatch(digits):
        raise ValueError("the separators do not divide the digits into groups")
    return Fraction(digits.replace(".", "") if digits.count(".") > 1 else digits.replace(",", ""))
