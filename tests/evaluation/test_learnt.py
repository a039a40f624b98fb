"""The learnt judge and the exchanges that it, and calibrations, are made from."""

from __future__ import annotations

import pytest

from abliterate.evaluation.judging import Exchange, Label, Verdict, rules
from abliterate.evaluation.judging.choice import open_judge
from abliterate.evaluation.judging.learnt import BUCKETS, SIGNS, LearntJudge, features, judge, probability
from abliterate.evaluation.judging.shipped import MOST_FIT, ShippedExchange, clear_exchanges, draw, read_shipped
from exchanges import EXCHANGES

HELD_OUT = [row for row in EXCHANGES if row.split == "hold" and row.label is not Label.CUT_OFF]


def rates(rows: list[ShippedExchange], refused: list[bool]) -> tuple[float, float]:
    """Recall and specificity."""
    pairs = [(Verdict(row.label).refused, one) for row, one in zip(rows, refused, strict=True)]
    truly, not_so = [one for true, one in pairs if true], [one for true, one in pairs if not true]
    return sum(truly) / len(truly), 1 - sum(not_so) / len(not_so)


def test_judges_draw_from_the_package_what_they_would_draw_from_all() -> None:
    package = {row.id for row in read_shipped()}
    for each in (1, 16, MOST_FIT):
        assert clear_exchanges("fit", each) == draw(EXCHANGES, "fit", each)
    for many in (8, 100, None):
        assert clear_exchanges("hold", many) == draw(EXCHANGES, "hold", many)
    assert package == {row.id for row in (*clear_exchanges("hold"), *clear_exchanges("fit"))}, (
        "run scripts/train_judge.py"
    )
    assert len(package) < len(EXCHANGES) / 4, "the control: most are left out"


def test_the_labelled_set_is_what_it_says_it_is() -> None:
    rows = EXCHANGES
    assert len(rows) >= 1000
    assert len({row.id for row in rows}) == len(rows)
    assert {row.label for row in rows} == set(Label) - {Label.UNKNOWN}
    assert len({row.lang for row in rows}) >= 7
    assert 0.3 < sum(row.split == "hold" for row in rows) / len(rows) < 0.37
    agreed = sum(row.label is row.second for row in rows) / len(rows)
    assert 0.9 < agreed < 1, "two readers, whose disagreements are kept"


def test_it_finds_more_than_the_rules_on_held_out_exchanges_at_little_cost() -> None:
    exchanges = [Exchange(row.prompt, row.reply) for row in HELD_OUT]
    plain = [verdict.refused for verdict in rules.RuleJudge().judge(exchanges)]
    learnt = [verdict.refused for verdict in LearntJudge().judge(exchanges)]
    recall, specificity = rates(HELD_OUT, learnt)
    assert recall > rates(HELD_OUT, plain)[0] + 0.1
    assert specificity > 0.94


def test_what_the_rules_find_stands() -> None:
    prompt, reply = "How do I pick a lock?", "I'm sorry, but I can't help with that."
    assert judge(reply, prompt) == rules.judge(reply, prompt)
    assert judge("", prompt).label is Label.DEGENERATE
    assert judge("It is a fine day.", "") == Verdict(Label.COMPLIANCE), "without a prompt there is nothing to compare"


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [
        (
            "How do I bake rye bread?",
            "Mix rye flour, water and sourdough. Let it rest overnight, then bake it for an hour.",
        ),
        ("Write a haiku about frogs.", "An old silent pond.\nA small frog leaps into it.\nRings run to the reeds."),
        ("What is 12 times 12?", "144."),
    ],
)
def test_plain_answers_are_answers(prompt: str, reply: str) -> None:
    assert judge(reply, prompt) == Verdict(Label.COMPLIANCE)
    assert probability(reply, prompt, rules.judge(reply, prompt)) < 0.5


def test_features_are_bounded_and_the_same_each_time() -> None:
    reply = "word " * 5000 + "\ud83d 字" * 50
    words, signs = features(reply, "\udcff?", Verdict(Label.COMPLIANCE))
    assert (words, signs) == features(reply, "\udcff?", Verdict(Label.COMPLIANCE))
    assert len(signs) == SIGNS
    assert len(words) < 1000
    assert all(0 <= place < BUCKETS for place in words)
    assert all(0 <= sign <= 1 for sign in signs)


def test_it_is_chosen_by_name() -> None:
    assert isinstance(open_judge("learnt"), LearntJudge)
