"""An audit on one page; of a hardened model two, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from abliterate.cli.arguments import Json, Model, Quiet, joined, monitor_for, say
from abliterate.cli.options import with_settings
from abliterate.cli.tables import PLAIN, percent
from abliterate.cli.terminal import Table, plain, write
from abliterate.config import (
    FindSettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
    ReplySettings,
    SelectSettings,
)
from abliterate.report.wording import audited

if TYPE_CHECKING:
    from abliterate.record import AuditPart


def show_audit(part: AuditPart, console: Console) -> None:
    """The summary first, then every plan that was tried."""
    for line in audited(part):
        write(console, line)
    write(console, audit_table(part))


def audit_table(*parts: AuditPart) -> Table:
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
            table.add_row(plain(family, "dim"))
        cells = []
        for part in parts:
            same = next((other for other in part.rows if (other.family, other.name) == (row.family, row.name)), None)
            value = None if same is None else same.kl.value
            cells += ["–" if same is None else percent(same.refused), "–" if value is None else f"{value:.3f}"]
        table.add_row(f"  {row.name}", *cells)
    return table


@dataclass(frozen=True, slots=True)
class _Groups:
    loading: ModelSettings
    prompts: PromptSettings
    finding: SelectSettings
    replies: ReplySettings


@with_settings
def audit(
    given: _Groups,
    /,
    *,
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for record and report.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How brittle is this model's refusal: what is left of it as more is taken out, and what that costs."""
    from abliterate.forensics.audit import audit as audit_model

    measuring = MeasureSettings(
        loading=given.loading,
        prompts=given.prompts,
        finding=FindSettings(**given.finding.model_dump()),
        evaluating=joined(given.replies),
    )
    part = audit_model(model, measuring, out=out, monitor=monitor_for(quiet))
    say(part, show_audit, as_json)
