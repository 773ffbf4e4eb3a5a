r"""Answers of mathematics read from text: exact rationals, tuples, sets and intervals of them, else words.

Nothing is evaluated, and digits and exponents are bounded: no text costs more than its length.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from fractions import Fraction

MAX_DIGITS = 200
MAX_EXPONENT = 200
_MAX_LENGTH = 1000
_MAX_DEPTH = 4

# Full-width forms, as Chinese text has them, and the usual signs for minus, times and division.
_SIGNS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | str.maketrans("−–×÷。", "--*/.")
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|displaystyle)(?![a-z])|\{,\}", lambda found: "," if found[0] == "{,}" else ""),
        (r"\\[,!;: ]|\\quad|~", " "),
        (r"\\[()\[\]]|\^\s*\{?\\circ\}?|°|`", ""),
        (r"\\([{}%$])", r"\1"),
        (r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" (\1)/(\2)"),
        (r"\\frac\s*([0-9])\s*([0-9])", r" (\1)/(\2)"),
        (r"\\times|\\cdot", "*"),
    )
)
_ASSIGNED = re.compile(r"[^\W\d]\w*\s*=\s*(?=[^=])")

_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4}(?![0-9]))?"
_PART = rf"\(\s*[+-]?{_NUMBER}\s*\)|{_NUMBER}"
_SHORT_UNIT = r"mm|cm|dm|km|m|mg|kg|g|ml|l|hrs?|h|sec|s|min|in|ft|mi|mph|lbs?|oz|st|nd|rd|th"
_QUANTITY = re.compile(
    rf"""
    (?P<sign>[+-]?)\s*(?:US|A|C)?[$€£¥]?\s*
    (?:(?P<whole>[0-9]+)\s+(?=\S+\s*/))?
    (?P<top>{_PART})
    (?:\s*/\s*(?P<bottom>[+-]?(?:{_PART})))?
    (?:\s*\*\s*10\s*\^\s*\{{?\s*(?P<power>[+-]?[0-9]{{1,4}})\s*\}}?)?
    (?:\s*(?P<percent>%|percent\b))?
    (?:\s*(?:[\u3400-\u9fff]+|(?:{_SHORT_UNIT})(?:\s*\^?\{{?[23]\}}?)?)|\s+[^\W\d_]{{2,}}[^\d=+*<>]*)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_STATED = re.compile(r"(?:answer|答案)\s*(?:is|是|为|[:=])\s*:?\s*([^\n]+)", re.IGNORECASE)
_ANY_QUANTITY = re.compile(rf"(?<![\w.])-?\s?[$€£¥]?{_NUMBER}(?:\s*/\s*{_NUMBER})?\s*%?")


def parse_number(text: str) -> Fraction | None:
    """Return the rational that a text states, or None: it states none, or one out of bounds.

    Reads integers, decimals, thousands separators, a/b, mixed numbers, LaTeX fractions, powers of ten, percentages
    (5% is 1/20) and one sign. A currency before and a unit after the number do not count.
    """
    return _quantity(_plain(text))[0]


def parse_answer(text: str) -> Hashable:
    """Return what an answer says, in a form that answers which say the same share.

    A Fraction; for (a, b), [a, b) and {a, b} the brackets and the parts; else the text without case and spaces.
    """
    return _parse(_plain(text), _MAX_DEPTH)


def same_answer(first: str, second: str) -> bool:
    """Return whether two answers say the same. Where only one has a percent sign, it may be a unit: 5% is 5 too."""
    if parse_answer(first) == parse_answer(second):
        return True
    (one, one_percent), (other, other_percent) = _quantity(_plain(first)), _quantity(_plain(second))
    if one is None or other is None or one_percent == other_percent:
        return False
    return one * 100 == other if one_percent else other * 100 == one


def marked_answer(text: str) -> str | None:
    r"""Return the content of the last \boxed{...}, else what stands behind the last "####", else None."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        return _until_closed(text[start + len("\\boxed{") :])
    return text.rpartition("####")[2].strip().partition("\n")[0] if "####" in text else None


def find_answer(text: str) -> str | None:
    """Return the part of a text that states its answer, None where nothing does.

    That is the marked one, else what follows the last "answer is" or "answer:", else the last number.
    """
    marked = marked_answer(text)
    if marked is not None:
        return marked
    text = text.translate(_SIGNS)
    stated = _STATED.findall(text)
    if stated:
        return re.split(r"\.\s", stated[-1], maxsplit=1)[0]
    numbers = _ANY_QUANTITY.findall(text)
    return numbers[-1] if numbers else None


def _plain(text: str) -> str:
    """Take away what LaTeX and prose put around an answer, and write its fractions as (a)/(b)."""
    text = text[: _MAX_LENGTH + 1].translate(_SIGNS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.lstrip("* ").rstrip("*. ")
    while len(text) > 1 and text.startswith("$") and text.endswith("$"):
        text = text[1:-1].strip(" ")
    assigned = _ASSIGNED.match(text)
    return text[assigned.end() :] if assigned else text


def _quantity(text: str) -> tuple[Fraction | None, bool]:
    """Return (value, whether it has a percent sign) of a plain text."""
    found = _QUANTITY.fullmatch(text) if len(text) <= _MAX_LENGTH else None
    if found is None or (found["whole"] and not found["bottom"]):
        return None, False
    parts = [_part(found[name] or default) for name, default in (("top", ""), ("bottom", "1"), ("whole", "0"))]
    exponent = int(found["power"] or 0)
    if None in parts or not parts[1] or abs(exponent) > MAX_EXPONENT:
        return None, False
    top, bottom, whole = parts
    value = (whole + top / bottom) * Fraction(10) ** exponent * (-1 if found["sign"] == "-" else 1)
    percent = found["percent"] is not None
    return value / 100 if percent else value, percent


def _part(text: str) -> Fraction | None:
    """Return the decimal that one side of a fraction is, None where it is out of bounds."""
    digits, _, exponent = re.sub(r"[()\s,]", "", text).lower().partition("e")
    exponent = int(exponent or 0)
    if len(digits) > MAX_DIGITS or abs(exponent) > MAX_EXPONENT:
        return None
    return Fraction(digits) * Fraction(10) ** exponent


def _parse(text: str, depth: int) -> Hashable:
    if depth and text[:1] in ("(", "[", "{") and text[-1:] in (")", "]", "}"):
        parts = tuple(_parse(part.strip(), depth - 1) for part in _split(text[1:-1]))
        if len(parts) > 1 or text[0] == "{":
            return (text[0], text[-1], frozenset(parts) if text[0] == "{" else parts)
    value = _quantity(text)[0]
    return re.sub(r"\s", "", text).casefold() if value is None else value


def _split(text: str) -> list[str]:
    """Cut a text at the commas that no bracket encloses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _until_closed(text: str) -> str | None:
    """Return what stands before the brace that closes one opened before the text."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return None
