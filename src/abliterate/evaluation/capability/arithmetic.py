"""The number that a worked solution ends with, as references write it and as models do."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

#: Digits with or without thousands separators and decimals. A sign counts only where nothing is subtracted from:
#: "10-5" holds 10 and 5, "= -5" holds -5.
_NUMBER = re.compile(r"(?P<sign>(?<![\w.)\]])[-−–])?\$?\s?(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+)(?!\d)")

#: What says that the answer comes now.
_MARK = re.compile(r"####|\\boxed\s*\{|\banswer\b[\s*_]*(?:is\b|[:=])", re.IGNORECASE)


def final_number(reply: str, *, ended: bool = True) -> Decimal | None:
    """The number that `reply` gives as its answer, or None.

    That is the one after the last "####", "\\boxed{", "answer is" or "Answer:" that a number follows, and otherwise the
    last number of all; but not of a reply that was cut off (`ended` is false), which had not come to its answer.
    """
    for mark in reversed(list(_MARK.finditer(reply))):
        following = reply[mark.end() :].lstrip(" \t\n*_:").partition("\n")[0]
        numbers = _numbers(following.rpartition("=")[2]) or _numbers(following)
        if numbers:
            return numbers[0]
    numbers = _numbers(reply) if ended else []
    return numbers[-1] if numbers else None


def reference_number(answer: object) -> Decimal | None:
    """The right answer of a task: a number, or a solution that ends with "#### number" as in GSM8K; else None."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    text = str(answer).rpartition("####")[2].strip()
    match = _NUMBER.fullmatch(text)
    return _value(match) if match else None


def _numbers(text: str) -> list[Decimal]:
    return [value for match in _NUMBER.finditer(text) if (value := _value(match)) is not None]


def _value(match: re.Match[str]) -> Decimal | None:
    try:
        value = Decimal(match["digits"].replace(",", ""))
    except InvalidOperation:  # digits of another script
        return None
    return -value if match["sign"] else value
