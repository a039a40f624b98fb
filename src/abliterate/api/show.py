"""Results that show themselves: in a notebook as the tables of the command line, printed as the same in text."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from rich.console import Console

from abliterate import record as rec
from abliterate.texts import printable_lines

#: Columns of a drawn table.
_WIDTH = 110

_PRE = '<pre style="white-space:pre;overflow-x:auto;line-height:1.25;font-family:ui-monospace,monospace">{code}</pre>'

#: Which module of `report.tables` draws which part, with which function.
_DRAWN = {
    "AuditPart": ("forensics", "show_audit"),
    "ComparisonPart": ("comparison", "show_comparison"),
    "EvaluationPart": ("evaluation", "show_evaluation"),
    "HardeningPart": ("forensics", "show_hardening"),
    "InspectionPart": ("forensics", "show_inspection"),
    "IntegrityPart": ("files", "show_integrity"),
    "ReadingPart": ("reading", "show_reading"),
    "RepairPart": ("forensics", "show_repair"),
    "SearchPart": ("search", "show_search"),
    "SteeringPart": ("steering", "show_steering"),
    "UndonePart": ("files", "show_undone"),
    "VerificationPart": ("verification", "show_verification"),
}


def drawn(part: object) -> Callable[[Any, Console], None] | None:
    """What draws a result on a console; None where nothing does."""
    if isinstance(part, rec.Record):
        show: Callable[[Any, Console], None] = import_module("abliterate.report.tables.record").show_record
        return show
    if (name := _DRAWN.get(type(part).__name__)) is None:
        return None
    found: Callable[[Any, Console], None] = getattr(import_module(f"abliterate.report.tables.{name[0]}"), name[1])
    return found


def as_text(part: object) -> str | None:
    """A result as the command line prints it, without colours; None of what has no tables."""
    screen = _screen(part)
    return None if screen is None else screen.export_text(styles=False).rstrip()


def as_html(part: object) -> str | None:
    """The same for a notebook."""
    screen = _screen(part)
    return None if screen is None else screen.export_html(inline_styles=True, code_format=_PRE)


def table_html(header: Sequence[str], rows: Sequence[Sequence[object]], marked: int | None = None) -> str:
    """Rows as an HTML table, one of them marked. Texts are escaped."""
    lines = ["<table><thead><tr>", *(f"<th>{_cell(name)}</th>" for name in header), "</tr></thead><tbody>"]
    for number, row in enumerate(rows):
        style = ' style="font-weight:bold;background:rgba(255,200,0,.25)"' if number == marked else ""
        lines += [f"<tr{style}>", *(f"<td>{_cell(value)}</td>" for value in row), "</tr>"]
    return "".join([*lines, "</tbody></table>"])


def _cell(value: object) -> str:
    from html import escape

    text = "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    return escape(printable_lines(text))


def _screen(part: object) -> Console | None:
    """A console on which the result was drawn."""
    if (show := drawn(part)) is None:
        return None
    # rich would show it in a notebook at once, beside what is returned
    console = Console(
        file=io.StringIO(), width=_WIDTH, record=True, force_jupyter=False, markup=False, emoji=False, highlight=False
    )
    show(part, console)
    return console


rec.Shown.text, rec.Shown.html = staticmethod(as_text), staticmethod(as_html)
