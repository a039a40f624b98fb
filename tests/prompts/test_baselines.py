"""What separates two sets without a model: chance where nothing differs, near 1 where words or lengths do."""

from __future__ import annotations

import random

import pytest

from abliterate.config import PromptSettings
from abliterate.prompts import build_contrastive_set
from abliterate.prompts.baselines import text_baselines

WORDS = ("red", "blue", "green", "small", "large", "round", "flat", "old", "new", "warm", "cold", "quick", "slow")


def texts(count: int, seed: int, extra: tuple[str, ...] = (), length: int = 5) -> list[str]:
    """Distinct prompts of random words, each with one of `extra`."""
    generator = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        words = [generator.choice(WORDS) for _ in range(length)]
        made[" ".join([*words, *([generator.choice(extra)] if extra else [])])] = None
    return list(made)


def baselines(harmful: list[str], harmless: list[str]) -> tuple[float, float]:
    return text_baselines(build_contrastive_set(PromptSettings(harmful=harmful, harmless=harmless)))


def test_sets_of_one_make_are_near_chance() -> None:
    length, words = baselines(texts(400, 1), texts(400, 2))
    assert length == pytest.approx(0.5, abs=0.12)
    assert words == pytest.approx(0.5, abs=0.15)


def test_words_and_lengths_that_differ_are_seen() -> None:
    _, words = baselines(texts(100, 1, ("bomb", "poison")), texts(100, 2, ("bread", "soup")))
    assert words > 0.99
    length, _ = baselines(texts(100, 1, length=9), texts(100, 2, length=4))
    assert length > 0.99
    assert baselines(texts(100, 2, length=4), texts(100, 1, length=9))[0] == pytest.approx(length, abs=0.01)
