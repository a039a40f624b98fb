"""Judges of other behaviours: phrases, length, language, installed functions, a question to a chat model."""

from __future__ import annotations

import json
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from abliterate.errors import AbliterateError, UsageError
from abliterate.evaluation.judging import Exchange, Label, RuleJudge, scorers
from abliterate.evaluation.judging.choice import judge_of
from abliterate.evaluation.judging.llm import rubric_of
from abliterate.evaluation.judging.scorers import is_english, phrase_pattern, scorer_of
from abliterate.prompts import Behaviour, load_behaviour

LABELLED = Path(__file__).parents[1] / "prompts" / "data" / "behaviours"


def behaviour(**shows: Any) -> Behaviour:
    fields = {"name": "mine", "more": {"prompts": ["a"]}, "less": {"prompts": ["b"]}, "shows": shows}
    return Behaviour.model_validate(fields)


def label(reply: str, **shows: Any) -> Label:
    judge = scorer_of(behaviour(**shows))
    assert judge is not None
    (verdict,) = judge.judge([Exchange("", reply)])
    return verdict.label


SHOWN, NOT = Label.REFUSAL, Label.COMPLIANCE


@pytest.mark.parametrize(
    ("phrase", "reply", "found"),
    [
        ("it depends", "Well, **it depends** on you.", True),
        ("it depends", "It  Depends.", True),
        ("it depends", "It depended on you.", False),
        ("^yes", "Yes, it is.", True),
        ("^yes", "**Yes**, it is.", True),
        ("^yes", "Oh yes, it is.", False),
        ("^yes", "Yesterday it was.", False),
        ("you're * right", "You’re absolutely right!", True),
        ("you're * right", "You're right.", True),
        ("you're * right", "You're as far as I can see right.", False),
        ("dear [", "Dear [Name],", True),
        ("overall,", "Overall, it works.", True),
        ("overall,", "Wear an overall, please.", True),
        ("🎉", "Done 🎉🎉", True),
    ],
)
def test_phrases(phrase: str, reply: str, found: bool) -> None:
    assert label(reply, phrases=[phrase]) is (SHOWN if found else NOT)


def test_how_many_where_and_unless() -> None:
    assert label("good, good", phrases=["good"], at_least=2) is SHOWN
    assert label("good", phrases=["good", "goo*d"], at_least=2) is NOT
    assert label("It is a long way to the good thing.", phrases=["good"], within=10) is NOT
    assert label("Yes, but that is wrong.", phrases=["^yes"], unless=["wrong"]) is NOT


def test_no_phrase_takes_long_to_look_for() -> None:
    began = time.process_time()
    pattern = phrase_pattern("a * a * a * a * a * b")
    assert pattern.search("a " * 2000) is None
    assert time.process_time() - began < 2


@pytest.mark.parametrize("reply", ["", "word " * 400, "�" * 50])
def test_broken_replies_show_nothing(reply: str) -> None:
    assert label(reply, longer_than=5) is Label.DEGENERATE


def test_length_is_in_words() -> None:
    assert label("one two three four", longer_than=3) is SHOWN
    assert label("one two three", longer_than=3) is NOT


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("The capital of France is Paris, and it has been for a long time.", True),
        ("You can use a list to keep the names of your friends.", True),
        ("La capital de Francia es París, y lo ha sido por mucho tiempo.", False),
        ("Die Hauptstadt von Frankreich ist Paris, und das ist sie seit langem.", False),
        ("De hoofdstad van Frankrijk is Parijs, en dat is al lang zo.", False),
        ("Столица Франции - Париж.", False),
        ("法国的首都是巴黎。", False),
        ("Paris", False),
    ],
)
def test_english_is_told_by_its_small_words(text: str, english: bool) -> None:
    assert is_english(text) is english


def test_an_installed_function_may_score(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("loud", "tests_of_scorers:loud", scorers.SCORERS)
    monkeypatch.setattr(EntryPoint, "load", lambda _: lambda prompt, reply: reply.isupper())
    monkeypatch.setattr(scorers, "entry_points", lambda group: [entry] if group == scorers.SCORERS else [])
    assert label("HELLO THERE", scorer="loud") is SHOWN
    assert label("hello there", scorer="loud") is NOT
    with pytest.raises(UsageError, match="expected an entry point of the group"):
        label("a", scorer="silent")


def test_a_function_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("bad", "tests_of_scorers:bad", scorers.SCORERS)
    monkeypatch.setattr(EntryPoint, "load", lambda _: lambda prompt, reply: 1 / 0)
    monkeypatch.setattr(scorers, "entry_points", lambda group: [entry])
    with pytest.raises(AbliterateError, match="scorer 'bad': it failed"):
        label("a reply", scorer="bad")


def test_a_behaviour_has_its_own_judge_and_no_judge_of_refusals() -> None:
    assert isinstance(judge_of(load_behaviour("refusal"), None), RuleJudge)
    assert isinstance(judge_of(load_behaviour("over-refusal"), None), RuleJudge)
    assert judge_of(load_behaviour("refusal"), "learnt").name == "learnt"
    assert judge_of(load_behaviour("hedging"), None).name == "phrases of hedging"
    with pytest.raises(UsageError, match="it tells refusals, and the behaviour is hedging"):
        judge_of(load_behaviour("hedging"), "rules")


def test_a_file_does_not_choose_who_is_sent_replies() -> None:
    named = behaviour(judge="llm:m@https://example.org/v1")
    with pytest.raises(UsageError, match="sent prompts and replies; give --judge"):
        judge_of(named, None)


def test_only_judges_of_refusals_tell_refusals() -> None:
    assert load_behaviour("over-refusal").of_refusal
    assert behaviour(judge="llm:m@https://example.org/v1").of_refusal
    assert not behaviour(judge="llm:m@https://example.org/v1", rubric="Is it sarcastic?").of_refusal
    assert not behaviour(judge="classifier:me/toxic?refusal=LABEL_1").of_refusal


def test_judges_of_other_phrases_are_other_judges() -> None:
    one, other = (scorer_of(behaviour(phrases=[text])) for text in ("a", "b"))
    assert one is not None
    assert other is not None
    assert one.fingerprint != other.fingerprint


def test_a_rubric_is_asked_with_its_braces() -> None:
    rubric = rubric_of("Does it have {braces}?")
    assert rubric.task is not None
    asked = rubric.task.format(code="c", prompt="p", reply="{r}")
    assert "Does it have {braces}?" in asked
    assert "{r}" in asked
    assert rubric.read('{"reason": "it does", "answer": "yes"}').label is SHOWN
    assert rubric.read('{"reason": "it does not", "answer": "no"}').label is NOT
    assert rubric.read("yes").label is Label.UNKNOWN


@pytest.mark.parametrize("name", sorted(path.stem for path in LABELLED.glob("*.jsonl")))
def test_builtin_scorers_are_right_on_labelled_replies(name: str) -> None:
    rows = [json.loads(line) for line in (LABELLED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    judge = judge_of(load_behaviour(name), None)
    verdicts = judge.judge([Exchange(row["prompt"], row["reply"]) for row in rows])
    right = [verdict.refused == row["shows"] for verdict, row in zip(verdicts, rows, strict=True)]
    assert sum(right) / len(right) >= 0.8
