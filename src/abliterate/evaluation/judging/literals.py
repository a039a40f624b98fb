"""Literals without which a regular expression cannot match: looked for first, they spare most searches.

`needed` reads the parsed expression. Of a sequence the best part is taken (the one whose shortest literal is longest);
an alternative needs one literal of each of its branches. What has no such literals, as a class of characters, or too
many, has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

#: Literals of one expression; strings that a part of one may stand for; letters of the shortest.
_MOST, _MOST_STRINGS, _LEAST = 600, 60, 2


def needed(expression: str) -> tuple[str, ...]:
    """Lowercase ASCII literals of which every match (case ignored) holds one; () where that cannot be said."""
    found = _needed(parser.parse(expression, re.IGNORECASE | re.MULTILINE))
    if not found or len(found) > _MOST or not all(map(str.isascii, found)):
        return ()
    shortest: list[str] = []
    for literal in sorted(set(found), key=lambda each: (len(each), each)):
        if not any(other in literal for other in shortest):
            shortest.append(literal)
    return tuple(shortest)


def _needed(sequence: Iterable[tuple[Any, Any]]) -> list[str] | None:
    best: list[str] = []
    run = [""]
    for code, argument in sequence:
        strings = _strings(code, argument)
        if strings is not None and len(run) * len(strings) <= _MOST:
            run = [before + after for before in run for after in strings]
            continue
        best, run = _better(best, run), [""] if strings is None else strings
        if strings is None:
            best = _better(best, _inside(code, argument) or [])
    return _better(best, run) or None


def _better(one: list[str], other: list[str]) -> list[str]:
    """The list whose shortest literal is longer; at least `_LEAST` letters."""
    shortest = [min(map(len, each), default=0) for each in (one, other)]
    return other if shortest[1] >= _LEAST and (shortest[1], -len(other)) > (shortest[0], -len(one)) else one


def _inside(code: Any, argument: Any) -> list[str] | None:
    """What a part needs that stands for endlessly many strings."""
    if code is codes.SUBPATTERN:
        return _needed(argument[3])
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT) and argument[0]:
        return _needed(argument[2])
    if code is not codes.BRANCH:
        return None
    branches = [_needed(branch) for branch in argument[1]]
    return None if not all(branches) else [literal for branch in branches for literal in branch or []]


def _strings(code: Any, argument: Any) -> list[str] | None:
    """All strings that a part stands for, in lower case; None where they are too many."""
    if code is codes.LITERAL:
        return [chr(argument).lower()]
    if code in (codes.AT, codes.ASSERT, codes.ASSERT_NOT):
        return [""]
    if code is codes.SUBPATTERN:
        return _joined(argument[3])
    if code is codes.BRANCH:
        branches = [_joined(branch) for branch in argument[1]]
        found = [string for branch in branches for string in branch or []]
        return None if any(branch is None for branch in branches) or len(found) > _MOST_STRINGS else found
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT) and argument[1] == 1:
        once = _joined(argument[2])
        return None if once is None else once if argument[0] else ["", *once]
    return None


def _joined(sequence: Iterable[tuple[Any, Any]]) -> list[str] | None:
    found = [""]
    for code, argument in sequence:
        strings = _strings(code, argument)
        if strings is None or len(found) * len(strings) > _MOST_STRINGS:
            return None
        found = [before + after for before in found for after in strings]
    return found


__all__ = ["needed"]
