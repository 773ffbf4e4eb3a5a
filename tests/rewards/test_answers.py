"""Answers of mathematics: how numbers are written, that writing them and reading them agree, and what costs nothing."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.rewards.answers import MAX_DIGITS, find_answer, parse_answer, parse_number, same_answer

HALF = Fraction(1, 2)
NUMBERS = {
    "42": 42,
    "-42.": -42,
    "−7": -7,
    "+3": 3,
    "５０": 50,
    "1,234,567": 1234567,
    "1{,}234": 1234,
    "3.50": Fraction(7, 2),
    ".5": HALF,
    "$5": 5,
    r"\$1,000.50": Fraction(2001, 2),
    "-3/4": Fraction(-3, 4),
    "3 1/2": Fraction(7, 2),
    "-3 1/2": Fraction(-7, 2),
    r"$\dfrac{3}{4}$": Fraction(3, 4),
    r"3\frac{1}{2}": Fraction(7, 2),
    r"-\frac12": -HALF,
    r"\frac{-1}{2}": -HALF,
    "50%": HALF,
    r"12.5\%": Fraction(1, 8),
    "50 percent": HALF,
    "5 apples": 5,
    "5cm": 5,
    r"5\text{ cm}^2": 5,
    r"90^\circ": 90,
    "60 km/h": 60,
    "5个": 5,
    "1e3": 1000,
    r"1.5 \times 10^{3}": 1500,
    "2*10^-2": Fraction(1, 50),
    "x = -5": -5,
    r"\(7\)": 7,
    "**7**": 7,
    "6 1/2 hours": Fraction(13, 2),
    "9" * MAX_DIGITS: int("9" * MAX_DIGITS),
}
NO_NUMBERS = [
    "",
    "abc",
    "12,34",
    "1 2",
    "1.2.3",
    "--5",
    "5x",
    "5x + 3",
    "5 and 6",
    "5 hours 30 minutes",
    "1/0",
    "nan",
    "inf",
]
OUT_OF_BOUNDS = ["10**10**10", "1e9999", "1e201", "10^10^10", "2*10^9999", "9" * (MAX_DIGITS + 1), r"\frac{1}{0}"]


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    assert parse_number(text) == NUMBERS[text]


@pytest.mark.parametrize("text", NO_NUMBERS + OUT_OF_BOUNDS)
def test_what_is_no_number(text):
    assert parse_number(text) is None


fractions = st.fractions(min_value=-(10**12), max_value=10**12, max_denominator=10**6)
WRAPPINGS = ["{}", " {} ", "${}$", r"\({}\)", "**{}**", "{}."]


@given(fractions, st.sampled_from(WRAPPINGS))
def test_fractions_are_read_as_written(value, wrapping):
    forms = [f"{value.numerator}/{value.denominator}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"]
    whole, rest = divmod(abs(value), 1)
    if whole and rest:
        forms.append(f"{'-' if value < 0 else ''}{whole} {rest.numerator}/{rest.denominator}")
    for form in forms:
        assert parse_number(wrapping.format(form)) == value, form


@given(
    st.decimals(-(10**15), 10**15, places=3), st.sampled_from(["", "$", "€"]), st.sampled_from(["", " dollars", "%"])
)
def test_decimals_are_read_as_written(value, currency, unit):
    expected = Fraction(value) / (100 if unit == "%" else 1)
    sign, digits = ("-", -value) if value < 0 else ("", value)
    for form in (f"{digits:f}", f"{digits:,f}"):
        assert parse_number(f"{sign}{currency}{form}{unit}") == expected


@given(st.text(alphabet="0123456789+-*/^.,eE%$ (){}[]\\fracboxed\n答案是：", max_size=60))
def test_any_text_is_read_without_error(text):
    find_answer(text)
    assert same_answer(text, text)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("0.5", r"\frac{1}{2}", True),
        ("0.333", "1/3", False),
        ("(1, 1/2)", r"\left(1, 0.5\right)", True),
        ("(1, 2)", "(2, 1)", False),
        ("[1, 2)", "(1, 2)", False),
        ("{1, 2}", r"\{2, 1\}", True),
        ("(1,234)", "(1, 234)", True),
        ("50%", "0.5", True),
        ("50%", "50", True),
        ("50", "0.5", False),
        ("X + 1", "x+1", True),
        ("Paris", "London", False),
    ],
)
def test_same_answers(first, second, same):
    assert same_answer(first, second) is same
    assert same_answer(second, first) is same


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}} and 7", "1/2"),
        ("so 3 + 4 = 7\n#### 7\n", "7"),
        ("The answer is $1,000. Then I stop at 3.", "1000"),
        ("The final answer is: **12**", "12"),
        ("所以答案是：5", "5"),
        ("I count 3, then 4/5.", "4/5"),
        ("It costs -3.5% less", "-3.5%"),
    ],
)
def test_finding_the_answer(text, answer):
    assert parse_answer(find_answer(text)) == parse_answer(answer)


def test_without_an_answer():
    assert find_answer("I do not know.") is None
    assert find_answer(r"\boxed{x") is None


@pytest.mark.parametrize(
    "text",
    [
        "1" * 10**6,
        "(" * 10**5,
        "\\boxed{" * 10**4,
        "1,111" * 10**4,
        "answer is " * 10**4,
        "\\frac{" * 10**4,
        "1 " * 10**5,
    ],
)
def test_long_texts_cost_no_more_than_their_length(text):
    start = time.process_time()
    parse_answer(text)
    find_answer(text)
    assert time.process_time() - start < 1
