"""Models side by side: refusals, shift and length of replies, capability."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from abliterate.report.tables.evaluation import PLAIN, capability_table, print_rates
from abliterate.report.wording import drifted, judged_by, replies_of, words_of
from abliterate.texts.terminal import Table, write

if TYPE_CHECKING:
    from abliterate.record import ComparisonPart, ShiftPart


def show_comparison(part: ComparisonPart, console: Console) -> None:
    """Which model is which, refusals per set, shift from the first and length of harmless replies, capability."""
    for number, entry in enumerate(part.entries, 1):
        write(console, f"{number}  {entry.name}", whole=True)
    states = [(str(number), entry.behaviour, entry.paired) for number, entry in enumerate(part.entries, 1)]
    words = words_of(part.behaviour)
    print_rates(f"{words.rates} on held-out prompts; change from 1", states, console, words)
    write(
        console, f"{replies_of(part.settings['max_new_tokens'], part.decoding)}. {judged_by(part.judge)}", style="dim"
    )
    if unlike := drifted(states):
        write(console, unlike, style="dim")
    table = Table(title="Harmless prompts: shift from 1 in nats per token, length", title_justify="left", **PLAIN)
    for column in ("", "KL, first token", "KL, reply", "ΔNLL of own replies", "tokens", "repeated"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for number, entry in enumerate(part.entries, 1):
        length = _number(entry.tokens.value, ".1f"), _number(entry.repetition.value, ".1%")
        table.add_row(str(number), *_moved(entry.shift), *length)
    write(console, table)
    for number, entry in enumerate(part.entries[1:], 2):
        if entry.capability:
            write(console, f"1 → {number}")
            write(console, capability_table(entry.capability))


def _moved(shift: ShiftPart | None) -> tuple[str, str, str]:
    if shift is None:
        return "", "", ""
    change = None if shift.nll_change is None else shift.nll_change.value
    return _number(shift.kl_first_token), _number(shift.kl_reply), _number(change, "+.3f")


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)
