"""What an inspection, an audit, a repair or a hardening found; of a hardened model two audits, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from abliterate.report.tables.evaluation import PLAIN, percent, show_evaluation
from abliterate.report.wording import audited, explained, hardened, headline, repaired
from abliterate.texts.terminal import Table, plain, write

if TYPE_CHECKING:
    from abliterate.record import AuditPart, HardeningPart, InspectionPart, RepairPart, WriterTracePart

#: Eight heights of a bar, lowest first.
_BARS = "▁▂▃▄▅▆▇█"


def show_inspection(part: InspectionPart, console: Console) -> None:
    """The verdict first, then where and how strongly."""
    style = "bold red" if part.verdict == "altered" else "bold green" if part.decided else "bold yellow"
    write(console, headline(part), style=style)
    for line in explained(part):
        write(console, line)
    edited = [unit for unit in part.units if unit.edited]
    if edited:
        write(console, _strengths(part.units, console.width))
    if part.separation:
        write(console, _separation(part))
    if part.behaviour is not None:
        rates = part.behaviour
        for name in ("harmful", "harmless", "borderline"):
            rate = getattr(rates, name)
            if rate.n:
                low, high = rate.ci95
                write(
                    console,
                    f"Refuses {rate.refusals} of {rate.n} {name} prompts ({100 * low:.0f}–{100 * high:.0f} %, 95 %).",
                )
    if part.directions is not None:
        write(console, "Directions: ", plain(part.directions, "bold"), whole=True)


def _strengths(units: Sequence[WriterTracePart], width: int) -> Table:
    """A row for each component: a bar for every block, and the range of strengths."""
    table = Table(title="Strength by block (first to last)", title_justify="left", **PLAIN)
    for column in ("component", "", "edited", "strength"):
        table.add_column(column, no_wrap=column == "edited", overflow="fold")
    kinds = dict.fromkeys(unit.kind for unit in units)
    for kind in kinds:
        own = [unit for unit in units if unit.kind == kind]
        edited = [unit.strength for unit in own if unit.edited]
        if not edited:
            table.add_row(kind, "", f"0 of {len(own)}", "")
            continue
        bars = "".join(_bar(unit) for unit in sorted(own, key=lambda unit: unit.block or 0))
        low, high = min(edited), max(edited)
        span = f"{low:.2f}" if high - low < 0.01 else f"{low:.2f} to {high:.2f}"
        table.add_row(kind, bars if len(bars) + 40 <= width else "", f"{len(edited)} of {len(own)}", span)
    return table


def _bar(unit: WriterTracePart) -> str:
    if not unit.edited:
        return "·"
    return _BARS[min(len(_BARS) - 1, max(0, round(abs(unit.strength) * (len(_BARS) - 1))))]


def _separation(part: InspectionPart) -> Table:
    """The layers where harmful and harmless prompts are told apart best."""
    table = Table(
        title=f"Harmful against harmless prompts in {part.separation_in} (AUROC)", title_justify="left", **PLAIN
    )
    for column in ("layer", "recovered direction", "own difference of means"):
        table.add_column(column, justify="right")
    key = (lambda layer: layer.own) if part.separation[0].recovered is None else (lambda layer: layer.recovered or 0.0)
    for layer in sorted(part.separation, key=key, reverse=True)[:3]:
        recovered = "–" if layer.recovered is None else f"{layer.recovered:.3f}"
        table.add_row(str(layer.layer), recovered, f"{layer.own:.3f}")
    return table


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


def show_repair(part: RepairPart, console: Console) -> None:
    """How exact it is, what the model does, where it lies."""
    for line in repaired(part):
        write(console, line)
    if part.evaluation is not None:
        show_evaluation(part.evaluation, console)
    write(console, "Model: ", plain(part.folder, "bold"), whole=True)


def show_hardening(part: HardeningPart, console: Console) -> None:
    """Ordinary behaviour, then the audits before and after, side by side."""
    show_evaluation(part.evaluation, console)
    show_audits(part, console)
    write(console, "Model: ", plain(part.folder, "bold"), whole=True)


def show_audits(part: HardeningPart, console: Console) -> None:
    """The audits before and after, side by side."""
    for line in hardened(part):
        write(console, line)
    write(console, audit_table(part.before, part.after))
