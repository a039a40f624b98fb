"""Searches that are spared find nothing: what is found is what a plain search finds."""

from __future__ import annotations

import re

import pytest

from abliterate.evaluation.judging import phrases
from abliterate.evaluation.judging.literals import needed
from abliterate.evaluation.judging.text import pattern, prose, read_answer, search, sentences
from exchanges import EXCHANGES

EXPRESSIONS = sorted({value for name, value in vars(phrases).items() if name.isupper() and isinstance(value, str)})


@pytest.mark.parametrize(
    ("expression", "literals"),
    [
        (r"\bcan(?:not|'t)\s+help\b", ("can't", "cannot")),
        (r"\b(?:said|says)\b", ("said", "says")),
        (r"\b(?:sorry|i\s+regret)\b", ("sorry", "regret")),
        (r"(?:very\s+)?unsafe\b(?!\s+place)", ("unsafe",)),
        (r"(?:ab)+\d", ("ab",)),
        (r"(?:ab)*\d", ()),
        (r"\d+|never", ()),
        (r"[a-z]+", ()),
        (r"naïve", ()),
        (r"advantages?|advantage\s+of", ("advantage",)),
    ],
)
def test_literals_that_every_match_holds(expression: str, literals: tuple[str, ...]) -> None:
    assert needed(expression) == literals


def test_search_finds_what_a_plain_search_finds() -> None:
    texts = [prose(read_answer(row.reply)[0]) for row in EXCHANGES[::60]]
    texts += [sentence for text in texts[::4] for _, sentence in sentences(text)] + [
        row.prompt for row in EXCHANGES[::90]
    ]
    assert sum(not text.isascii() for text in texts) > 5
    found = 0
    for expression in EXPRESSIONS:
        for text in texts:
            expected, match = pattern(expression).search(text), search(expression, text)
            assert (match and match.span()) == (expected and expected.span()), (expression[:60], text[:80])
            found += expected is not None
    assert found > 1000


@pytest.mark.parametrize(
    "text", ["İ cannot help", "ı cannot help", "I cannot help with thiſ", "\u212ann", "UNſAFE", "ﬁne"]
)
def test_letters_that_only_ignoring_case_makes_alike_are_found(text: str) -> None:
    for expression in (r"\bi\s+cannot\b", r"\bthis\b", r"\bkn", r"\bunsafe\b", r"\bfine\b"):
        expected = re.search(expression, text, re.IGNORECASE | re.MULTILINE)
        match = search(expression, text)
        assert (match and match.span()) == (expected and expected.span())


def test_capitals_are_told_apart_where_an_expression_does() -> None:
    assert search(r"(?-i:\b[A-Z]{2}\b)", "an AI") is not None
    assert search(r"(?-i:\b[A-Z]{2}\b)", "an ai") is None
