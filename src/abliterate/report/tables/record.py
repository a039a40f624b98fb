"""The whole record: what was asked, what came out, and how to see it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from abliterate.report.tables.evaluation import PLAIN
from abliterate.report.tables.forensics import show_audit, show_audits, show_inspection
from abliterate.report.tables.run import show_place, show_run, show_timings
from abliterate.report.tables.steering import show_steering
from abliterate.report.wording import asked, repaired, seed
from abliterate.texts.terminal import Table, write

if TYPE_CHECKING:
    from abliterate.record import PlanPart, Record, SelectionPart


#: Hexadecimal digits of a SHA-256 that are shown; the record has all of them.
_DIGITS = 12

#: Rows of tables of which the record has all.
_MOST = 5

#: Columns from which headers are spelt out.
_WIDE = 60


def show_record(record: Record, console: Console) -> None:
    """What was asked, what came out, and how to see it again."""
    write(console, _filled(_facts("What was asked"), asked(record)))
    show_run(record, console)
    show_timings(record, console)
    show_place(record, console)
    if record.selection is not None and record.selection.candidates:
        write(console, _best_sites(record.selection))
    if record.plan is not None and record.plan.edits:
        write(console, _largest_rests(record.plan, console))
    _show_forensics(record, console)
    for warning in record.warnings:
        write(console, f"warning: {warning}", style="bold yellow")
    write(console, _provenance(record))


def _show_forensics(record: Record, console: Console) -> None:
    """What an inspection, an audit, steering, a repair or a hardening found."""
    if record.inspection is not None:
        show_inspection(record.inspection, console)
    if record.hardening is not None:
        show_audits(record.hardening, console)
    elif record.audit is not None:
        show_audit(record.audit, console)
    if record.steering is not None:
        show_steering(record.steering, console)
    if record.repair is not None:
        for line in repaired(record.repair):
            write(console, line)


def _best_sites(part: SelectionPart) -> Table:
    """The sites with the least bypass, whether or not they keep the rule; → is the chosen one."""
    title = f"Sites with the least bypass, of {len(part.candidates)}"
    table = Table(title=title, title_justify="left", **PLAIN)
    for column in ("", "layer", "pos.", "bypass", "induce", "KL"):
        table.add_column(column, justify="right", no_wrap=True)
    chosen = None if part.chosen is None else (part.chosen.layer, part.chosen.position)
    for site in sorted(part.candidates, key=lambda site: site.bypass)[:_MOST]:
        mark = "→" if (site.layer, site.position) == chosen else ""
        scores = (f"{site.bypass:.2f}", f"{site.induce:.2f}", f"{site.kl:.3f}")
        table.add_row(mark, str(site.layer), str(site.position), *scores)
    return table


def _largest_rests(part: PlanPart, console: Console) -> Table:
    """The edited tensors that still write most along the direction, in per cent of what they wrote."""
    title = f"Tensors with the most left along the direction, of {len(part.edits)}"
    table = Table(title=title, title_justify="left", **PLAIN)
    table.add_column("tensor", overflow="fold")
    for column in ("left", "change of weights") if console.width >= _WIDE else ("left", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for edit in sorted(part.edits, key=lambda edit: -edit.ratio)[:_MOST]:
        table.add_row(edit.tensor, f"{100 * edit.ratio:.2f} %", f"{100 * edit.change:.2f} %")
    return table


def _provenance(record: Record) -> Table:
    """When, with what, and from which files."""
    table = _facts("Provenance")
    rows = [("made", record.created), ("with", ", ".join(f"{name} {v}" for name, v in record.versions.items()))]
    if (given := seed(record)) is not None:
        rows.append(("seed", given))
    for what, hashes in (("read", record.model.source_sha256), ("written", record.output_sha256)):
        rows += [(what, f"{name} {digest[:_DIGITS]}…") for name, digest in hashes.items()]
    return _filled(table, rows)


def _facts(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    return table


def _filled(table: Table, rows: list[tuple[str, str]]) -> Table:
    for name, value in rows:
        table.add_row(name, value)
    return table
