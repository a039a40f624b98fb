"""A search: points on validation and held-out prompts, which was chosen, how to take another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from abliterate.report.tables.evaluation import PLAIN, fits
from abliterate.texts.terminal import Table, plain, write

if TYPE_CHECKING:
    from abliterate.record import PointPart, SearchPart


#: Objectives that are shares of replies, shown in per cent.
RATES = {"refusals", "over-refusals", "degenerate"}

_CHOSEN, _INFEASIBLE = "→", "✗"

#: Why a point was chosen, where the record says it in one word.
_WHY = {"knee": "farthest below the line between the ends of the front"}

#: How closely edits were measured, in words.
_STAGES = {
    "few": "by first tokens of few prompts",
    "all": "by first tokens",
    "replies": "by replies",
    "shift": "by replies and their likelihood",
}

Scores = Mapping[str, float | None]


def show_search(part: SearchPart, console: Console) -> None:
    """The points beside the unedited model, why one was chosen and others not, and how to apply another."""
    for table in _tables(part, console):
        write(console, table)
    for line in _remarks(part):
        write(console, line)
    if other := _another(part):
        file = other if other.startswith("/") else f"OUT/{other}"
        command = f"abliterate apply MODEL --direction {file} -o EDITED"
        write(console, f"Another point: {command}", whole=True)


def _tables(part: SearchPart, console: Console) -> list[Table]:
    """One table with all that fits on a line; in a narrow terminal without intervals, then one for each objective."""
    for intervals, origins in ((True, True), (True, False), (False, False)):
        table = _table(part, part.objectives, intervals=intervals, origins=origins)
        if fits(table, console):
            return [table]
    narrow = [_narrow(part, name, console) for name in part.objectives]
    for table in narrow[1:]:
        table.title = None
    return narrow


def _narrow(part: SearchPart, name: str, console: Console) -> Table:
    table = _table(part, [name], intervals=True)
    return table if fits(table, console) else _table(part, [name])


def _table(part: SearchPart, names: Sequence[str], *, intervals: bool = False, origins: bool = False) -> Table:
    held_out = part.base_held_out is not None or any(point.held_out is not None for point in part.points)
    intervals = intervals and any(point.intervals for point in part.points)
    table = Table(title="Points of the search, less is better", title_justify="left", **PLAIN)
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(Text.assemble(plain(name), "\nvalidation" if held_out else ""), no_wrap=True)
        if held_out:
            table.add_column(Text("\nheld-out" + (" [95 %]" if intervals else "")), no_wrap=True)
    if origins:
        table.add_column("origin", no_wrap=True)

    def row(label: str, scores: Scores, again: Scores | None, ends: Mapping[str, tuple[float, float]]) -> list[str]:
        cells = [label]
        for name in names:
            cells.append(_value(name, scores.get(name)))
            if held_out:
                shown = "" if again is None else _value(name, again.get(name))
                cells.append(shown + (_between(name, ends[name]) if intervals and name in ends else ""))
        return cells

    table.add_row(*row("unedited", part.base, part.base_held_out, {}))
    for point in part.points:
        cells = row(f"{_mark(part, point)} {point.number:>2}", point.scores, point.held_out, point.intervals)
        style = "dim" if not point.feasible else "bold" if point.number == part.chosen else None
        table.add_row(*cells, *([point.origin] if origins else []), style=style)
    return table


def _mark(part: SearchPart, point: PointPart) -> str:
    return _CHOSEN if point.number == part.chosen else " " if point.feasible else _INFEASIBLE


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.0f} %" if name in RATES else _number(value)


def _number(value: float, digits: int = 3) -> str:
    """Three significant digits, zeros at the end too; without exponents where there is nothing to gain by them."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".removesuffix(".")


def _between(name: str, ends: tuple[float, float]) -> str:
    low, high = (f"{100 * end:.0f}" if name in RATES else _number(end) for end in ends)
    return f" [{low}, {high}]"


def _remarks(part: SearchPart) -> list[str]:
    """What the table does not say, a line each."""
    counts = [f"{count} {_STAGES.get(stage, stage)}" for stage, count in part.evaluations.items() if count]
    measured = f"; edits measured: {', '.join(counts)}" if counts else ""
    chosen = (
        f"{_CHOSEN} Point {part.chosen} was chosen ({_WHY.get(part.why, part.why)})."
        if part.chosen
        else "No point was chosen."
    )
    lines = [chosen if part.points else "The search found no point."]
    lines += [f"{_INFEASIBLE} Point {p.number}: {_broken(part, p)}." for p in part.points if not p.feasible]
    beaten = [str(point.number) for point in part.points if not point.on_front]
    if beaten:
        lines.append(f"Not on the front, another point is better: {', '.join(beaten)}.")
    among = f", on {part.prompts} validation prompts" if part.prompts else ""
    lines += [*_optimism(part), f"Search: {part.method}, {part.seconds:.0f} s{measured}{among}."]
    return lines


def _broken(part: SearchPart, point: PointPart) -> str:
    """The limits that a point does not keep."""
    found = {name: (point.scores.get(name), most) for name, most in part.limits.items()}
    over = [
        f"{name} {_differing(name, value, most)}"
        for name, (value, most) in found.items()
        if value is None or value > most
    ]
    return "; ".join(over) or f"does not keep {part.constraints}"


def _differing(name: str, value: float | None, most: float) -> str:
    """A value above a limit, with as many digits as it takes to see that it is."""
    pair = ("", "")
    for digits in (3, 4, 6, 17):
        pair = _exact(name, value, digits), _exact(name, most, digits)
        if pair[0] != pair[1]:
            break
    return f"{pair[0]}, at most {pair[1]}"


def _exact(name: str, value: float | None, digits: int) -> str:
    if value is None:
        return "unknown"
    return f"{100 * value:.{digits - 2}f} %" if name in RATES else _number(value, digits)


def _optimism(part: SearchPart) -> list[str]:
    """How much worse points are on prompts that nothing was chosen by; the unedited model's change is not by choice."""
    known = [
        changes
        for point in part.points
        if point.held_out is not None and (changes := _changes(part, point.scores, point.held_out)) is not None
    ]
    if not known:
        return []
    mean = {name: math.fsum(changes[name] for changes in known) / len(known) for name in part.objectives}
    base = None if part.base_held_out is None else _changes(part, part.base, part.base_held_out)
    unedited = "" if base is None else f"; unedited model: {_signed(base)}"
    edits = "1 edit" if len(known) == 1 else f"mean of {len(known)} edits"
    return [f"Selection was on validation prompts: on held-out ones {_signed(mean)} ({edits}{unedited})."]


def _changes(part: SearchPart, scores: Scores, held_out: Scores) -> dict[str, float] | None:
    """Held-out minus validation by objective; None unless all are known."""
    pairs = [(name, scores.get(name), held_out.get(name)) for name in part.objectives]
    found = {name: after - before for name, before, after in pairs if before is not None and after is not None}
    return found if len(found) == len(pairs) else None


def _signed(changes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_change(name, value)}" for name, value in changes.items())


def _change(name: str, value: float) -> str:
    if name in RATES:
        return f"{round(100 * value, 1) + 0.0:+.1f} points"  # adding zero takes the sign off −0.0
    return ("+" if value >= 0 else "") + _number(value)


def _another(part: SearchPart) -> str | None:
    """The file of a point that was not chosen, one that could have been if there is any."""
    files = [point for point in part.points if point.file is not None and point.number != part.chosen]
    best = sorted(files, key=lambda point: not (point.feasible and point.on_front))
    return best[0].file if best else None
