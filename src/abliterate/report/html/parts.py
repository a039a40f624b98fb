"""What the page is made of: sections of text, figures and tables. Charts are data; report.js draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.record import EstimatePart, RatePart

#: Characters of a prompt or a reply that are shown.
LONGEST = 400


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; columns named in `words` stand left, all others right. `marked` rows are set off."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset({0})
    more: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A table, and above it the chart of the same numbers where there is one. A `folded` table opens on demand."""

    name: str
    title: str
    table: Table
    chart: dict[str, Any] | None = None
    note: str = ""
    folded: bool = True


@dataclass(frozen=True, slots=True)
class Section:
    """One question and its answer."""

    name: str
    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    code: str = ""


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the numbers at the top."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """All that the template shows."""

    title: str
    subtitle: str
    answer: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    warnings: Sequence[str] = ()
    made: str = ""

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        """What report.js draws, by the name of the figure."""
        figures = (figure for section in self.sections for figure in section.figures)
        return {figure.name: figure.chart for figure in figures if figure.chart is not None}


def short(text: str, length: int = LONGEST) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def number(value: float | None, form: str = ".3f") -> str:
    """A number as text; "–" where there is none."""
    return "–" if value is None else format(value, form)


def between(ends: Sequence[float | None] | None, scale: float = 1, form: str = ".3f") -> str:
    """'[0.006, 0.012]'; "" where there is no interval."""
    if ends is None or any(end is None for end in ends):
        return ""
    return "[" + ", ".join(format(scale * end, form) for end in ends if end is not None) + "]"


def percent(rate: float | None) -> float | None:
    """A rate in per cent."""
    return None if rate is None else 100 * rate


#: A point of `dots`: value and ends of its interval; None where nothing was measured.
Point = list[float | None] | None


def rate_point(part: RatePart) -> Point:
    """A rate in per cent with its Wilson interval."""
    return None if part.rate is None else [percent(value) for value in (part.rate, *part.ci95)]


def estimate_point(part: EstimatePart | None) -> Point:
    """An estimate with its interval."""
    return None if part is None or part.value is None else [part.value, *part.ci95]


def dots(
    groups: Sequence[str], series: Sequence[dict[str, Any]], axis: str, *, least: float | None = None
) -> dict[str, Any]:
    """Points with whiskers: a row for each group, in it a point for each series."""
    return {"kind": "dots", "groups": list(groups), "series": list(series), "axis": axis, "least": least}


def dot_series(name: str, points: Sequence[Point], role: str = "") -> dict[str, Any]:
    """One series of `dots`, a point a group, in the colour of its `role` (default: its name)."""
    return {"name": name, "role": role or name, "points": list(points)}
