"""An audit on one page; of a hardened model two, side by side."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from abliterate.cli.evaluating import PLAIN, percent, show_evaluation
from abliterate.forensics.wording import audited
from abliterate.hardening import Hardened
from abliterate.parts import evaluation_part
from abliterate.record import AuditPart


def show_audit(part: AuditPart, console: Console) -> None:
    """The summary first, then every plan that was tried."""
    for line in audited(part):
        console.print(line, highlight=False)
    console.print(_rows(part))


def show_hardened(done: Hardened, console: Console) -> None:
    """Ordinary behaviour, then the audits before and after, side by side."""
    show_evaluation(evaluation_part(done.evaluation), console)
    for when, part in (("Before", done.before), ("After", done.after)):
        console.print(f"[bold]{when}[/]: {' '.join(audited(part))}", highlight=False)
    console.print(_rows(done.before, done.after))
    console.print(f"{len(done.tensors)} tensors have an addition.", highlight=False)
    console.print(f"Model: [bold]{escape(str(done.folder))}[/]", soft_wrap=True)


def hardened_as_dict(done: Hardened) -> dict[str, Any]:
    """The same for machines."""
    return {
        "folder": str(done.folder),
        "tensors": list(done.tensors),
        "size": done.size,
        "before": done.before.model_dump(mode="json"),
        "after": done.after.model_dump(mode="json"),
        "evaluation": evaluation_part(done.evaluation).model_dump(mode="json"),
    }


def _rows(*parts: AuditPart) -> Table:
    """Every plan that was tried: rates and KL, of a second audit beside the first."""
    table = Table(title="Harmful prompts refused, and KL at the first token", title_justify="left", **PLAIN)
    names = ("before", "after") if len(parts) > 1 else ("refused, % [95 %]",)
    table.add_column("what is taken out")
    for name in names:
        table.add_column(name, no_wrap=True)
        table.add_column("KL", no_wrap=True, justify="right")
    table.add_row("nothing", *(cell for part in parts for cell in (percent(part.base), "0")))
    family = ""
    for row in parts[0].rows:
        if row.family != family:
            family = row.family
            table.add_row(f"[dim]{family}[/]")
        cells = []
        for part in parts:
            same = next((other for other in part.rows if (other.family, other.name) == (row.family, row.name)), None)
            value = None if same is None else same.kl.value
            cells += ["–" if same is None else percent(same.refused), "–" if value is None else f"{value:.3f}"]
        table.add_row(f"  {row.name}", *cells)
    return table
