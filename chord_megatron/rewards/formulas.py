"""Formulas as math-verify reads and compares them, with what it lacks: numbers at their own scale.

math-verify rounds to six decimals, and takes what differs by less than 1e-15 for equal: so all small numbers are.
"""

from __future__ import annotations

import re
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from chord_megatron.rewards.numbers import TEXT_COMMAND, Number, read_number, same_number

if TYPE_CHECKING:
    from sympy import Basic

Formula: TypeAlias = "tuple[Basic | str, ...]"

_TAIL = 2000  # characters that math-verify reads, from the end; its cost grows faster than the text
_SECONDS = 2  # of one call; it interrupts itself with SIGALRM, so only in the main thread
_ROUNDED, _EVALUATED = 1e-6, 1e-12  # relative: what is written with a point; the arithmetic of exact formulas
_SCIENTIFIC = re.compile(r"(?<![\w.])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([-+]?[0-9]{1,3})(?!\w)")
_BASE = re.compile(r"(?<=[0-9])_\s*\{?\s*([0-9]+)")
_SENTENCE = re.compile(r"(?<![\\\w])[^\W\d_]{2,}[,:]?\s+[^\W\d_]{2,}")
_WORDS = re.compile(r"[^\W\d_]+(?:\s+[^\W\d_]+)*")


def plain_words(text: str) -> str:
    r"""`\text{Paris}` and `**(B)**` as "paris" and "b"."""
    return " ".join(TEXT_COMMAND.sub(r"\1", text).lower().split()).strip(" .:*$()")


def read_sentences(text: str) -> Formula:
    """What math-verify takes for the answer of a text, as an expression and as LaTeX; empty where it finds none."""
    from math_verify import parse  # slow to import

    # It would read 1e-05 as 1.
    text = _SCIENTIFIC.sub(lambda number: format(Decimal(number[0]), "f"), text[-_TAIL:])
    return tuple(parse(text, parsing_timeout=_SECONDS))


@lru_cache(maxsize=4096)  # every completion of a group has the same reference
def read_formula(text: str) -> Formula:
    """A number, or a formula as LaTeX, with or without its dollars, else plain such as "x+1"; empty for words."""
    number = read_number(text)
    if number is not None:
        return (_as_sympy(number),)
    if _WORDS.fullmatch(plain_words(text)):  # math-verify would multiply their letters
        return ()
    if "$" in text or _SENTENCE.search(TEXT_COMMAND.sub("", text)):
        return read_sentences(text)
    return read_sentences(f"${text[-_TAIL + 2 :]}$") or read_sentences(text)


def same_formula(expected: Formula, found: Formula) -> bool:
    """Whether math-verify finds them equal, and they are also at their own scale."""
    from math_verify import verify
    from math_verify.utils import timeout

    if not expected or not found:
        return False
    bases = [_bases(expected), _bases(found)]
    if all(bases) and bases[0] != bases[1]:
        return False
    a, b = _as_number(expected[0]), _as_number(found[0])
    if a is not None and b is not None:
        return same_number(a, b)
    return verify([*expected], [*found], timeout_seconds=_SECONDS) and not timeout(_SECONDS)(_differ)(
        expected[0], found[0]
    )


def _bases(formula: Formula) -> list[str]:
    """The subscripts of numbers, which math-verify leaves out: 101_2 is not 101_3."""
    latex = formula[-1]
    return sorted(_BASE.findall(latex)) if isinstance(latex, str) else []


def _as_sympy(number: Number) -> Basic:
    from latex2sympy2_extended.latex2sympy2 import convert_to_pct
    from sympy import Float, Rational

    exact = Rational(number.value.numerator, number.value.denominator)
    value = exact if number.is_exact else Float(exact, 30)
    return convert_to_pct(value) if number.is_percent else value


def _as_number(formula: Basic | str) -> Number | None:
    from sympy import Number as SympyNumber

    return read_number(str(formula)) if isinstance(formula, SympyNumber) else None


def _differ(a: Any, b: Any) -> bool:
    """Whether two numbers, or two in the same place of two sets or tuples, differ by more than their accuracy."""
    from sympy import FiniteSet, Float, Tuple, UnevaluatedExpr, ordered

    if isinstance(a, FiniteSet | Tuple) and isinstance(b, FiniteSet | Tuple):
        return any(_differ(x, y) for x, y in zip(ordered(a.args), ordered(b.args)))
    if not all(getattr(x, "is_number", False) and not x.has(UnevaluatedExpr) for x in (a, b)):  # formulas; 18%
        return False
    tolerance = _ROUNDED if a.has(Float) or b.has(Float) else _EVALUATED
    largest = max(abs(a.n(30)), abs(b.n(30)))
    return bool(abs((a - b).n(30)) > tolerance * largest)
