"""A direction proved by intervention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from abliterate.report.wording import rate, words_of
from abliterate.texts.terminal import Table, write

if TYPE_CHECKING:
    from abliterate.record import VerificationPart


def show_verification(part: VerificationPart, console: Console) -> None:
    """Refusals and scores of the original, the ablated model and the control."""
    words = words_of(part.behaviour)
    table = Table(title=f"Ablated at inference time, {words('harmful')} prompts held out", title_justify="left")
    rows = [
        ("no intervention", part.before, part.bypass_before, part.induce_before, "0"),
        ("direction", part.after, part.bypass, part.induce, f"{part.kl:.3f}"),
        ("random direction", part.control, part.bypass_control, None, ""),
    ]
    scored = part.bypass is not None  # else first tokens do not tell this behaviour
    for column in ("", words.shown, *(("bypass ↓", "induce ↑") if scored else ()), "KL"):
        table.add_column(column)
    for name, refused, bypass, induced, kl in rows:
        unknown = "unknown layer" if name == "direction" else ""
        scores = (_score(bypass), _score(induced) or unknown) if scored else ()
        table.add_row(name, rate(refused), *scores, kl)
    write(console, table)
    if part.verified:
        stops = "the model stops refusing" if part.behaviour is None else f"at most half as many replies {words.shown}"
        write(console, f"Verified: without this direction {stops}; not so without a random one.")


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
