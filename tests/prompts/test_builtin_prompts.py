"""The builtin prompt sets: counts, splits, balance, matching and the absence of duplicates."""

import json
import re
from collections import Counter
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import NamedTuple

import pytest


class Row(NamedTuple):
    text: str
    category: str
    split: str


SETS = ("harmful", "harmless", "borderline")
PAIRED = ("harmful", "harmless")
PER_SPLIT = {"train": 320, "val": 80, "test": 100}
PER_CATEGORY = {"train": 32, "val": 8, "test": 10}


def _raw(name: str) -> str:
    return (files("abliterate") / "prompts" / "data" / name).read_text(encoding="utf-8")


@cache
def _load(name: str) -> tuple[Row, ...]:
    records = [json.loads(line) for line in _raw(f"{name}.jsonl").splitlines()]
    assert all(list(record) == ["text", "category", "split"] for record in records)
    return tuple(Row(**record) for record in records)


def _normalise(text: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9 ]", "", text.lower().replace("-", " ")).split())


def _opener(text: str) -> str:
    return _normalise(text).split()[0]


def _word_count(text: str) -> int:
    return len(text.split())


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(("name", "count"), [("harmful", 500), ("harmless", 500), ("borderline", 100)])
def test_set_has_its_number_of_rows(name: str, count: int) -> None:
    assert len(_load(name)) == count


@pytest.mark.parametrize("name", PAIRED)
def test_splits_are_balanced_over_ten_categories(name: str) -> None:
    rows = _load(name)
    assert Counter(row.split for row in rows) == PER_SPLIT
    categories = {row.category for row in rows}
    assert len(categories) == 10
    expected = {(category, split): n for category in categories for split, n in PER_CATEGORY.items()}
    assert Counter((row.category, row.split) for row in rows) == expected


def test_borderline_is_test_only_with_named_kinds() -> None:
    rows = _load("borderline")
    assert {row.split for row in rows} == {"test"}
    kinds = Counter(row.category for row in rows)
    assert len(kinds) >= 8
    assert min(kinds.values()) >= 5


@pytest.mark.parametrize("name", SETS)
def test_rows_are_one_clean_ascii_line(name: str) -> None:
    for text, category, _ in _load(name):
        assert text.isascii(), text
        assert text.isprintable(), text
        assert text == " ".join(text.split()), text
        assert text[-1] in ".?", text
        assert 6 <= _word_count(text) <= 22, text
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", category), category


def test_no_normalised_duplicate_across_sets_and_splits() -> None:
    counts = Counter(_normalise(row.text) for name in SETS for row in _load(name))
    assert [text for text, n in counts.items() if n > 1] == []


@pytest.mark.parametrize("name", SETS)
def test_no_near_duplicate_within_a_set(name: str) -> None:
    bags = [frozenset(_normalise(row.text).split()) for row in _load(name)]
    near = [(sorted(a), sorted(b)) for a, b in combinations(bags, 2) if len(a & b) > 0.8 * min(len(a), len(b))]
    assert near == []


def test_pairs_share_row_split_opener_ending_and_about_length() -> None:
    for harmful, harmless in zip(_load("harmful"), _load("harmless"), strict=True):
        assert harmful.split == harmless.split
        assert _opener(harmful.text) == _opener(harmless.text)
        assert harmful.text[-1] == harmless.text[-1]
        assert abs(_word_count(harmful.text) - _word_count(harmless.text)) <= 2, harmful.text


@pytest.mark.parametrize("split", PER_SPLIT)
def test_mean_lengths_agree(split: str) -> None:
    harmful, harmless = (_mean([_word_count(row.text) for row in _load(name) if row.split == split]) for name in PAIRED)
    assert harmless == pytest.approx(harmful, rel=0.05)


def test_two_word_openings_are_distributed_alike() -> None:
    harmful, harmless = (Counter(" ".join(_normalise(row.text).split()[:2]) for row in _load(name)) for name in PAIRED)
    distance = sum(abs(harmful[key] - harmless[key]) for key in harmful | harmless) / 2
    assert distance / len(_load("harmful")) < 0.25


@pytest.mark.parametrize("name", PAIRED)
def test_no_opener_is_concentrated_in_one_category(name: str) -> None:
    rows = _load(name)
    for opener, n in Counter(_opener(row.text) for row in rows).items():
        if n >= 10:
            most = Counter(row.category for row in rows if _opener(row.text) == opener).most_common(1)[0][1]
            assert most <= 0.5 * n, opener


def test_licence_travels_with_the_data() -> None:
    assert "CC0-1.0" in _raw("LICENSE")
