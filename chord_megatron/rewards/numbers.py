r"""Numbers as GSM8K, MATH, JSON and models write them: `1,234.50`, `\$18.90`, `18 eggs`, `\frac{1}{2}`, `1e-05`.

A unit behind a number does not change it, as in the graders of GSM8K and MATH, whose references mostly have none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 1000  # characters: every float of JSON written out has fewer, and int() refuses more than 4300 digits
_CLOSE = Fraction(1, 10**6)  # math-verify compares six decimals, too

_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("‐‑‒–−﹣－", "-"),
        **dict.fromkeys("\u00a0\u2007\u2009\u202f~", " "),
        **dict.fromkeys("$€£¥₹¢"),  # "$" is LaTeX's delimiter as well
        "×": r"\times ",
        "·": r"\cdot ",
        "°": r"\degree ",
        "％": "%",
    }
)
_WORD = r"[^\W\d_]+"
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]*)?|\.[0-9]+)"
_PART = rf"(?:\{{\s*([-+]?\s*{_DECIMAL})\s*\}}|([0-9]))"  # of \frac
_POWER = r"10\s*\^\s*(?:\{\s*([-+]?[0-9]{1,4})\s*\}|([-+]?[0-9]{1,4})(?![0-9]))"
# What becomes plainer, in this order, until only signs, digits, "/", "e" and a unit are left.
_PLAINER = (
    (r"\\!|\\[()\[\]]|\\(?=%)", ""),
    (r"\\[,;: ]|\\q?quad(?![a-zA-Z])", " "),
    (r"\{,\}", ","),
    (r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree)", " degrees "),
    (rf"\\[dt]?frac\s*{_PART}\s*{_PART}", r" \1\2/\3\4"),
    (rf"(?<=[0-9.])\s*(?:\\times|\\cdot|\*|x)\s*{_POWER}", r"e\1\2"),
    (rf"^(\s*[-+]?\s*){_POWER}", r"\g<1>1e\2\3"),
    (r"^\s*\{([^{}]*)\}\s*$", r"\1"),
    (r"\b([ap])\.\s?m\b", r"\1m"),
)
_PLAINER_PATTERNS = [(re.compile(pattern), replacement) for pattern, replacement in _PLAINER]
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\s*\{([0-9]+)\}")  # 0.1\overline{6}
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:"
    rf"(?:(?P<whole>{_WHOLE})\s+)?(?P<above>[-+]?\s*{_DECIMAL})\s*/\s*(?P<below>[-+]?\s*{_DECIMAL})"
    rf"|(?P<decimal>[0-9]{{1,3}}(?:\ [0-9]{{3}})+(?![0-9])(?:\.[0-9]*)?|{_DECIMAL})"
    r"(?P<exponent>[eE][-+]?[0-9]{1,4}(?![0-9]))?)"  # a longer one would fill the memory
)
_UNIT = re.compile(r"\s*(?P<percent>%?)(?:[^\W\d_](?:\^\{?-?[0-9]\}?)?|-(?=[^\W\d_])|[\s.,()/~'’])*+")

_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_HALVES = {"am", "pm"}
_PERCENT = {"percent", "percentage", "pct"}
_SHORT_UNITS = {"mm", "cm", "km", "ft", "yd", "mi", "mg", "kg", "lb", "oz", "ml", "cl", "hr", "am", "pm"}
# Words of three letters and more that do change the number before them.
_FUNCTIONS = {"sqrt", "exp", "log", "sin", "cos", "tan", "mod"}
_NO_UNITS = {"and", "half", "halves", "third", "thirds", "squared", "cubed"} | _FUNCTIONS


@dataclass(frozen=True)
class Number:
    """What a text says about a quantity."""

    value: Fraction  # 18 of "18%"
    is_exact: bool  # written without a decimal point or an exponent: nothing was rounded
    is_percent: bool
    half: str = ""  # of the day: "am" or "pm"


def read_number(text: str) -> Number | None:
    """The number that `text` is, with its unit; None where it is something else, or too long for a number."""
    if len(text) > _LONGEST:
        return None
    plain = _plain(text)
    match = _NUMBER.match(plain)
    if match is None:
        return None
    unit = _UNIT.fullmatch(plain, match.end())
    value = _value(match)
    if unit is None or value is None:
        return None
    words = re.findall(rf"/?~?{_WORD}", unit[0])
    if not _is_unit(unit[0], words):
        return None
    is_percent = bool(unit["percent"]) or (bool(words) and words[0].strip("~").lower() in _PERCENT)
    is_exact = "." not in match[0] and match["exponent"] is None
    half = words[0].strip("~").lower() if words else ""
    return Number(value * _scale(words), is_exact, is_percent, half if half in _HALVES else "")


def same_number(a: Number, b: Number) -> bool:
    """Whether both are the same quantity; 18% is 18, as references without a unit say it, and 0.18.

    Exact numbers must be equal. A decimal may be rounded: to six decimals, below 1 to six significant digits, so that
    numbers that are small both are not the same for that.
    """
    if a.half and b.half and a.half != b.half:
        return False
    is_exact = a.is_exact and b.is_exact
    if a.is_percent == b.is_percent:
        return _close(a.value, b.value, is_exact)
    percent, other = (a.value, b.value) if a.is_percent else (b.value, a.value)
    return _close(percent, other, is_exact) or _close(percent / 100, other, is_exact)


def _close(a: Fraction, b: Fraction, is_exact: bool) -> bool:
    return a == b or (not is_exact and abs(a - b) <= _CLOSE * min(Fraction(1), max(abs(a), abs(b))))


def _plain(text: str) -> str:
    """The same in ASCII and without LaTeX; words that were in \\text have a "~" in front: they are no variables."""
    text = text.replace(r"\$", "").translate(_SYMBOLS).strip(" \t\r\n*")
    for pattern, replacement in _PLAINER_PATTERNS:
        text = pattern.sub(replacement, text)
    return TEXT_COMMAND.sub(_words_of, _REPEATING.sub(_fraction_of, text)).strip()


def _fraction_of(repeating: re.Match[str]) -> str:
    whole, once, again = repeating.groups()
    value = Fraction(int(whole + once + again) - int(whole + once or "0"), (10 ** len(again) - 1) * 10 ** len(once))
    return f"{value.numerator}/{value.denominator}"


def _words_of(text: re.Match[str]) -> str:
    inner = text[1]
    return inner if re.search("[0-9]", inner) else re.sub(rf"({_WORD})", r"~\1", inner)


def _value(number: re.Match[str]) -> Fraction | None:
    sign = -1 if number["sign"] == "-" else 1
    if number["decimal"]:
        return sign * _fraction(number["decimal"] + (number["exponent"] or ""))
    above, below = _fraction(number["above"]), _fraction(number["below"])
    if not below:
        return None
    if number["whole"] is None:
        return sign * above / below
    # 2 1/2 is a sum, where 2 3/2 is a product and 2 -1/2 a difference.
    is_mixed = number["above"].isdecimal() and number["below"].isdecimal() and above < below
    return sign * (_fraction(number["whole"]) + above / below) if is_mixed else None


def _fraction(text: str) -> Fraction:
    return Fraction(re.sub(r"[\s,]", "", text))


def _is_unit(rest: str, words: list[str]) -> bool:
    """Whether what follows a number leaves its value alone: nothing, or words that can be no product of variables."""
    names = [word.lstrip("/~").lower() for word in words]
    if not words:
        return rest.strip(" .,") in ("", "%")
    if any(name in _NO_UNITS for name in names):
        return False
    is_apart = not rest[0].isalpha()  # "18cm", but "3abc" is a product
    begins = words[0].startswith("~") or names[0] in _SHORT_UNITS or (is_apart and len(names[0]) > 2)
    return begins and all(len(name) > 1 or name == "a" or word[0] in "/~" for word, name in zip(words[1:], names[1:]))


def _scale(words: list[str]) -> int:
    scale = 1
    for word in words:
        if word.strip("~").lower() not in _SCALES:
            break
        scale *= _SCALES[word.strip("~").lower()]
    return scale
