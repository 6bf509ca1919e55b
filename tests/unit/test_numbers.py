"""Numbers as GSM8K, MATH, JSON and models write them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chord_megatron.rewards.numbers import read_number, same_number

deterministic = settings(derandomize=True, deadline=None, max_examples=200)

WRITTEN = {
    # plain
    "72": 72,
    " 72 ": 72,
    "72.": 72,
    "+72": 72,
    "-72": -72,
    "- 72": -72,
    "−72": -72,  # the minus sign of Unicode
    "–72": -72,
    "0": 0,
    "007": 7,
    "3.50": Fraction(7, 2),
    ".5": Fraction(1, 2),
    "5.": 5,
    "**-3**": -3,
    # thousands
    "1,234.50": Fraction(2469, 2),
    "1,234,567": 1234567,
    "10{,}000": 10000,
    r"10,\!000": 10000,
    r"10\,000": 10000,
    r"1\,234\,567.5": Fraction(2469135, 2),
    "1 234 567": 1234567,
    "1\u202f234": 1234,
    # exponents, also as str() writes JSON's numbers
    "1e-05": Fraction(1, 100000),
    "1e+20": 10**20,
    "1.5e20": 15 * 10**19,
    "2E3": 2000,
    r"5 \times 10^{3}": 5000,
    r"5\times10^3": 5000,
    r"5 \cdot 10^{-2}": Fraction(1, 20),
    "5 × 10^3": 5000,
    "5 x 10^3": 5000,
    "5*10^3": 5000,
    r"-1.2 \times 10^{-1}": Fraction(-3, 25),
    "10^{-5}": Fraction(1, 100000),
    "10^6": 1000000,
    # money
    "$72": 72,
    r"\$18.90": Fraction(189, 10),
    r"$\$18.90$": Fraction(189, 10),
    r"-\$5": -5,
    r"\$-5": -5,
    r"\$32{,}348": 32348,
    "€18": 18,
    "18 €": 18,
    "£1,000": 1000,
    "50¢": 50,
    # percent and degrees
    "18%": 18,
    r"50\%": 50,
    r"50 \%": 50,
    r"$12.5\%$": Fraction(25, 2),
    "18 percent": 18,
    r"18^\circ": 18,
    r"18^{\circ}": 18,
    r"18 ^ \circ": 18,
    "18°": 18,
    r"18\text{ degrees}": 18,
    r"37^\circ\text{C}": 37,
    # units and other words
    "18 dollars": 18,
    "18 eggs": 18,
    "18 eggs a day": 18,
    "18 cm": 18,
    "18cm": 18,
    "18 km/h": 18,
    "18 miles per hour": 18,
    "18 square-feet": 18,
    "18 students'": 18,
    "9 a.m.": 9,
    "9 p.m": 9,
    "18 (dollars)": 18,
    r"3 \text{ cm}": 3,
    r"3\text{ m}": 3,
    r"3~\mathrm{m}": 3,
    r"3\ \text{m/s}": 3,
    r"3\text{ cm}^2": 3,
    r"3\mbox{ cm}^{2}": 3,
    "3 cm^2": 3,
    "3 cm²": 3,
    r"\frac{3}{4}\text{ cup}": Fraction(3, 4),
    r"\text{18 dollars}": 18,
    r"\text{18 minutes}": 18,
    r"8\text{ a.m.}": 8,
    r"36\text{ sq. units}": 36,
    r"12\text{ in}^2": 12,
    r"7 \mbox{ units}^{2}": 7,
    r"10\ \%": 10,
    r"\$ 5": 5,
    r"\text{\$}5": 5,
    r"\textbf{18}": 18,
    r"\mathbf{18}": 18,
    "3 million": 3000000,
    r"1.5 \text{ million dollars}": 1500000,
    # fractions
    "1/2": Fraction(1, 2),
    "-1/2": Fraction(-1, 2),
    "1 / 2": Fraction(1, 2),
    "3/4 cup": Fraction(3, 4),
    r"\frac{1}{2}": Fraction(1, 2),
    r"\dfrac{1}{2}": Fraction(1, 2),
    r"\tfrac12": Fraction(1, 2),
    r"\frac1{2}": Fraction(1, 2),
    r"\frac{1}2": Fraction(1, 2),
    r"\frac 1 2": Fraction(1, 2),
    r"-\frac{1}{2}": Fraction(-1, 2),
    r"\frac{-1}{2}": Fraction(-1, 2),
    r"-\frac{1}{-2}": Fraction(1, 2),
    r"\frac{1,000}{3}": Fraction(1000, 3),
    r"\frac{1.5}{2}": Fraction(3, 4),
    # mixed numbers
    r"2\frac{1}{2}": Fraction(5, 2),
    r"-2\frac{1}{2}": Fraction(-5, 2),
    r"2 \frac12": Fraction(5, 2),
    "2 1/2": Fraction(5, 2),
    r"2\frac{1}{2}\text{ hours}": Fraction(5, 2),
    # digits that repeat
    r"0.\overline{3}": Fraction(1, 3),
    r"-0.\overline{3}": Fraction(-1, 3),
    r".\overline{9}": 1,
    r"1.2\overline{34}": Fraction(611, 495),
    r"0.\overline{142857}\text{ cm}": Fraction(1, 7),
    # as formulas
    r"\(72\)": 72,
    r"\[72\]": 72,
    "$$72$$": 72,
    "{72}": 72,
}

NO_NUMBERS = [
    "",
    " ",
    ".",
    "-",
    "$",
    "x",
    "e-5",
    "2x",
    "2 x",
    "3ab",
    "2 xy",
    "2 pi",
    r"2\pi",
    r"2 \sqrt{3}",
    "1/2^99",
    "2^99",
    "2^{99}",
    "1/0",
    r"\frac{1}{0}",
    r"\frac{0}{0}",
    "1,2",
    "12,34",
    "1,2,3",
    "(1, 2)",
    "3:4",
    "5:30",
    "3 or 4",
    "3 to 4",
    r"3\text{ and }4",
    r"2\frac{3}{2}",  # a product
    "3 and a half",
    "3 halves",
    "x = 5",
    r"\pm 5",
    "1.2.3",
    "--5",
    "1011_2",
    "5!",
    "1e999999999",
    "10^{999999999}",
    "9" * 5000,
    "1." + "0" * 5000,
    "infinity",
    "nan",
    "٣",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_number_is_read(text):
    number = read_number(text)
    assert number is not None and number.value == WRITTEN[text]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_anything_else_is_not(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("0.5", "1/2", True),
        ("1/3", "2/6", True),
        ("0.333333", "1/3", True),
        (r"0.\overline{3}", "1/3", True),
        (r"0.\overline{3}", r"\frac{3333333}{10000000}", False),
        ("0.33333", "1/3", False),
        ("2e-7", "3e-7", False),
        ("2e-7", "0.0000002", True),
        ("1e-300", "2e-300", False),
        ("0", "1e-300", False),
        ("0", "0.0", True),
        ("0.1", "0.10000001", True),
        ("1234567.1", "1234567.9", False),
        ("1234567", "1234568", False),
        ("1234567.0000001", "1234567", True),
        ("0.30000000000000004", "0.3", True),
        ("1000000/1000001", "1", False),  # exactly given: not about the same
        ("1e20", "100000000000000000001", False),
        ("18%", "18", True),
        ("18%", "0.18", True),
        ("18%", "18%", True),
        ("0.18%", "18%", False),
        ("18", "0.18", False),
        ("5", "-5", False),
    ],
)
def test_what_equals(one, other, equal):
    a, b = read_number(one), read_number(other)
    assert a is not None and b is not None
    assert same_number(a, b) is equal and same_number(b, a) is equal


# The ways to write a decimal number, and what may stand around it.
decimals = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=6)
writings = st.sampled_from(
    [
        lambda d: f"{d:f}",
        lambda d: f"{d:,f}",
        lambda d: f"{d:,f}".replace(",", "{,}"),
        lambda d: f"{d:,f}".replace(",", r"\,"),
        lambda d: f"{d:,f}".replace(",", r",\!"),
        lambda d: f"{d:f}".replace("-", "−"),
        lambda d: f"{d:e}",
        lambda d: r"{} \times 10^{{{}}}".format(*f"{d:.30e}".split("e")).replace("{+", "{"),
        lambda d: r"{} \cdot 10^{{{}}}".format(*f"{d:.30e}".split("e")),
        lambda d: "{}/{}".format(*d.as_integer_ratio()),
        lambda d: r"\frac{{{}}}{{{}}}".format(*d.as_integer_ratio()),
        lambda d: rf"\${d:f}",
    ]
)
surroundings = st.sampled_from(
    ["{}", " {} ", "${}$", "**{}**", r"\({}\)", "{} dollars", r"{}\text{{ m}}", "{}%", "{}."]
)


@deterministic
@given(decimals, writings, surroundings)
def test_every_writing_of_a_number_has_its_value(value, write, around):
    number = read_number(around.format(write(value)))
    assert number is not None and number.value == Fraction(value)


@deterministic
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([repr, lambda x: f"{Fraction(repr(x))}"]))
def test_every_number_of_json_is_read_exactly(value, write):
    number = read_number(write(value))
    assert number is not None and number.value == Fraction(repr(value))


@deterministic
@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_mixed_numbers_have_their_value(whole, a, b):
    numerator, denominator = min(a, b), max(a, b) + 1
    number = read_number(rf"{whole}\frac{{{numerator}}}{{{denominator}}}")
    assert number is not None and number.value == whole + Fraction(numerator, denominator)


pieces = st.sampled_from(
    [
        *(
            "10",
            "e-",
            "e+9",
            "^{",
            r"\frac{",
            r"\text{",
            r"\$",
            r"\%",
            r"\,",
            r"\!",
            "{,}",
            r"\times",
            r"^\circ",
            " cm",
        ),
        *"0123456789.,-+/*^{}()$%=xe\\²é−€ \n\u00a0\x00\ud83d",
    ]
)


@settings(derandomize=True, deadline=None, max_examples=1000)
@given(st.lists(pieces, max_size=40).map("".join))
def test_no_text_is_too_odd_to_be_read(text):
    number = read_number(text)
    assert number is None or same_number(number, number)


@deterministic
@given(st.integers(-10, 10), st.integers(-10, 10), st.integers(-320, 320))
def test_whole_multiples_of_a_power_of_ten_are_equal_where_they_are_the_same(a, b, exponent):
    one, other = read_number(f"{a}e{exponent}"), read_number(f"{b}e{exponent}")
    assert one is not None and other is not None
    assert same_number(one, other) is (a == b)
