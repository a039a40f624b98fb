"""The data of the builtin behaviours: their files, their prompts, and the labelled replies to these."""

import json
import re
import tomllib
import unicodedata
from collections import Counter
from functools import cache
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

#: Least number of prompts of each builtin behaviour that has its own.
LEAST = {
    "hedging": 170,
    "language": 150,
    "over-refusal": 220,
    "stock-phrases": 150,
    "sycophancy": 170,
    "verbosity": 170,
}
#: Those of which there are labelled replies.
LABELLED = ("hedging", "language", "stock-phrases", "sycophancy", "verbosity")
BUILTIN = ("harmful", "harmless", "borderline")
WAYS = {"phrases", "judge", "longer_than", "language", "scorer"}
TABLES = {"more", "less", "test", "others", "keep", "shows", "read"}
_DATA = files("abliterate") / "prompts" / "data"
_REPLIES = Path(__file__).parent / "data" / "behaviours"


@cache
def _rows(path: str) -> tuple[dict[str, str], ...]:
    return tuple(json.loads(line) for line in (_DATA / path).read_text(encoding="utf-8").splitlines())


def _texts(name: str) -> list[str]:
    return [row["text"] for row in _rows(f"behaviours/{name}.jsonl")]


def _behaviour(name: str) -> dict[str, Any]:
    return tomllib.loads((_DATA / "behaviours" / f"{name}.toml").read_text(encoding="utf-8"))


def _names(ending: str) -> set[str]:
    found = (file.name for file in (_DATA / "behaviours").iterdir())
    return {name.removesuffix(ending) for name in found if name.endswith(ending)}


def _normalise(text: str) -> str:
    return " ".join(re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).split())


def test_every_behaviour_has_its_file_and_its_prompts() -> None:
    assert _names(".toml") == {*LEAST, "refusal"}
    assert _names(".jsonl") == set(LEAST)


@pytest.mark.parametrize("name", sorted({*LEAST, "refusal"}))
def test_a_behaviour_says_what_it_is_and_how_it_shows(name: str) -> None:
    behaviour = _behaviour(name)
    assert set(behaviour) <= {"name", "description", "shown", *TABLES}
    assert behaviour["name"] == name
    assert behaviour["description"].endswith(".")
    assert behaviour["shown"]
    assert len(WAYS & set(behaviour["shows"])) == 1


@pytest.mark.parametrize("name", sorted(LEAST))
def test_a_behaviour_has_its_own_prompts_and_another_side(name: str) -> None:
    behaviour = _behaviour(name)
    more, less = behaviour["more"], behaviour["less"]
    assert more["prompts"] == f"{name}.jsonl"
    assert less.get("prompts", more["prompts"]) != more["prompts"] or less["system"] != more["system"]


@pytest.mark.parametrize("name", sorted(LEAST))
def test_phrases_are_not_said_twice_and_need_no_other(name: str) -> None:
    shows = _behaviour(name)["shows"]
    for key in ("phrases", "unless"):
        phrases = shows.get(key, [])
        assert len({phrase.casefold() for phrase in phrases}) == len(phrases)
        assert all(phrase.strip("^* ") for phrase in phrases)


@pytest.mark.parametrize("name", sorted(LEAST))
def test_prompts_are_clean_lines_of_a_kind(name: str) -> None:
    rows = _rows(f"behaviours/{name}.jsonl")
    assert len(rows) >= LEAST[name]
    for row in rows:
        text = row["text"]
        assert list(row) == ["text", "category"]
        assert text.isprintable()
        assert text == " ".join(text.split()), text
        assert text[-1] in ".?。", text
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", row["category"]), row
        assert name == "language" or 4 <= len(text.split()) <= 35, text
        assert 8 <= len(text) <= 240, text
    assert len({row["category"] for row in rows}) >= 8
    assert name == "language" or all(map(str.isascii, _texts(name)))


def test_no_prompt_comes_twice_over_all_builtin_sets() -> None:
    own = [text for name in LEAST for text in _texts(name)]
    builtin = [row["text"] for name in BUILTIN for row in _rows(f"{name}.jsonl")]
    counts = Counter(map(_normalise, own + builtin))
    assert [text for text, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", sorted(LEAST))
def test_no_prompt_is_nearly_another_of_its_set(name: str) -> None:
    bags = [frozenset(_normalise(text).split()) for text in _texts(name)]
    near = [(sorted(a), sorted(b)) for a, b in combinations(bags, 2) if len(a & b) > 0.8 * min(len(a), len(b)) > 1]
    assert near == []


def test_alarming_prompts_are_none_of_the_borderline_ones() -> None:
    theirs = [frozenset(_normalise(row["text"]).split()) for row in _rows("borderline.jsonl")]
    for text in _texts("over-refusal"):
        bag = frozenset(_normalise(text).split())
        assert all(len(bag & other) <= 0.8 * min(len(bag), len(other)) for other in theirs), text


def test_alarming_prompts_come_in_many_kinds() -> None:
    kinds = Counter(row["category"] for row in _rows("behaviours/over-refusal.jsonl"))
    assert len(kinds) >= 12
    assert max(kinds.values()) <= 25


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_replies_are_to_its_prompts_and_half_show_it(name: str) -> None:
    rows = [json.loads(line) for line in (_REPLIES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["prompt"] for row in rows} <= set(_texts(name))
    assert len({row["reply"] for row in rows}) == len(rows) >= 55
    for part in (rows, [row for row in rows if row.get("unseen")]):
        assert 0.35 <= sum(row["shows"] for row in part) / len(part) <= 0.65
    assert [index for index, row in enumerate(rows) if row.get("unseen")] == list(range(2, len(rows), 3))
