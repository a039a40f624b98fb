"""A page cut to a size: whatever a record holds, what is longest is shortened first, and each cut is said."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from abliterate.report.html.parts import Figure, Page, Section, Table, short

#: Of each kind of thing so many are shown at most, and so many characters of a text.
_SECTIONS, _FIGURES, _PARAGRAPHS, _ROWS, _COLUMNS = 20, 20, 100, 5000, 40
_TEXT, _CELL, _NAME = 4000, 1000, 100

#: Bytes of markup around a cell, a row and a paragraph.
_AROUND_CELL, _AROUND_ROW, _AROUND_TEXT = 26, 26, 60


def fitted(page: Page, room: int) -> Page:
    """The page with at most `room` bytes of text, tables and charts; unchanged where it has no more."""
    page = _trimmed(page)
    level = _level(list(_sizes(page)), room)
    sections = [_cut_section(section, level) for section in page.sections]
    return replace(page, sections=sections, warnings=_cut_texts(page.warnings, level))


def _trimmed(page: Page) -> Page:
    """Texts and lists of a length that a reader could wish for; sizes are no matter yet."""
    sections = [_trimmed_section(section) for section in page.sections[:_SECTIONS]]
    return replace(
        page,
        title=short(page.title, _NAME * 2),
        subtitle=short(page.subtitle, _CELL),
        answer=_cut(page.answer, _TEXT),
        tiles=[
            replace(tile, label=short(tile.label, _NAME), value=short(tile.value, _NAME), detail=short(tile.detail))
            for tile in page.tiles[:_FIGURES]
        ],
        sections=sections,
        warnings=_first(page.warnings),
        made=short(page.made, _CELL),
    )


def _trimmed_section(section: Section) -> Section:
    figures = [_trimmed_figure(figure) for figure in section.figures[:_FIGURES]]
    return replace(section, text=_first(section.text), code=_cut(section.code, _TEXT), figures=figures)


def _trimmed_figure(figure: Figure) -> Figure:
    table = figure.table
    more = table.more
    if len(table.head) > _COLUMNS:
        more = f"{more} {len(table.head) - _COLUMNS} more columns in the record.".strip()
    if len(table.rows) > _ROWS:
        more = f"{more} {len(table.rows) - _ROWS} more rows in the record.".strip()
    rows = [[_cut(cell, _CELL) for cell in row[:_COLUMNS]] for row in table.rows[:_ROWS]]
    head = [_cut(cell, _NAME) for cell in table.head[:_COLUMNS]]
    return replace(
        figure,
        title=_cut(figure.title, _NAME * 2),
        note=_cut(figure.note, _CELL),
        table=replace(table, head=head, rows=rows, more=_cut(more, _CELL)),
    )


def _first(texts: Sequence[str]) -> list[str]:
    """So many texts, each of so many characters; what is missing is said in a last one."""
    first = [_cut(text, _TEXT) for text in texts[:_PARAGRAPHS]]
    return first + ([f"{len(texts) - _PARAGRAPHS} more in the record."] if len(texts) > _PARAGRAPHS else [])


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _sizes(page: Page) -> Iterator[int]:
    """Bytes of all pieces that can be cut."""
    yield sum(map(_of_text, page.warnings))
    for section in page.sections:
        yield sum(map(_of_text, section.text))
        for figure in section.figures:
            yield sum(map(_of_row, figure.table.rows))
            yield _of_chart(figure.chart)


def _of_text(text: str) -> int:
    return len(html.escape(text).encode(errors="replace")) + _AROUND_TEXT


def _of_row(row: Sequence[str]) -> int:
    return sum(_of_text(cell) - _AROUND_TEXT + _AROUND_CELL for cell in row) + _AROUND_ROW


def _of_chart(chart: dict[str, Any] | None) -> int:
    """Upper bound: characters that could end the element are written as six."""
    if chart is None:
        return 0
    text = json.dumps(chart, separators=(",", ":"))
    return len(text) + 5 * sum(map(text.count, "&<>"))


def _level(sizes: Sequence[int], room: int) -> int:
    """The size to cut pieces to so that all fit: the larger ones share what the smaller ones leave."""
    for number, size in enumerate(sorted(sizes)):
        share = room // (len(sizes) - number)
        if size > share:
            return max(0, share)
        room -= size
    return max(sizes, default=0)


def _cut_section(section: Section, level: int) -> Section:
    figures = [_cut_figure(figure, level) for figure in section.figures]
    return replace(section, text=_cut_texts(section.text, level), figures=figures)


def _cut_texts(texts: Sequence[str], level: int) -> Sequence[str]:
    kept = _fitting([_of_text(text) for text in texts], level)
    return texts if kept == len(texts) else [*texts[:kept], f"{len(texts) - kept} more in the record."]


def _cut_figure(figure: Figure, level: int) -> Figure:
    table, chart, note = figure.table, figure.chart, figure.note
    kept = _fitting([_of_row(row) for row in table.rows], level)
    if kept < len(table.rows):
        more = f"{table.more} {len(table.rows) - kept} more rows do not fit on this page.".strip()
        table = Table(table.head, table.rows[:kept], table.marked, table.words, more)
    if _of_chart(chart) > level:
        chart, note = None, f"{note} There is more to draw than fits on this page.".strip()
    return replace(figure, table=table, chart=chart, note=note)


def _fitting(sizes: Sequence[int], level: int) -> int:
    """How many, from the first on, have no more than `level` together."""
    total = 0
    for number, size in enumerate(sizes):
        total += size
        if total > level:
            return number
    return len(sizes)
