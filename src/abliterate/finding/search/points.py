"""Points of a search: candidate edits with what they scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from abliterate.edit.direction import Direction
from abliterate.evaluation.probe import Level


@dataclass(frozen=True, slots=True)
class Point:
    """A candidate edit (a direction with a recipe), where it comes from, and what it scored.

    `scores` are values of objectives on validation prompts, looked at as closely as `level` says, `held_out` the same
    on test prompts; `intervals` are 95 % intervals of these, where they are known.
    """

    direction: Direction
    origin: str
    scores: Mapping[str, float]
    level: Level
    held_out: Mapping[str, float] | None = None
    intervals: Mapping[str, tuple[float, float]] | None = None
