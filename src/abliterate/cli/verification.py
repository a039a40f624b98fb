"""How a verification is shown."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from abliterate.card import rate
from abliterate.pipeline import Verification, rate_part


def as_dict(result: Verification) -> dict[str, Any]:
    """The verification for machines."""
    tallies = {name: rate_part(getattr(result, name)).model_dump(mode="json") for name in _TALLIES}
    scores = asdict(result)
    return {**scores, **tallies}


_TALLIES = ("before", "after", "control")


def show(result: Verification, console: Console) -> None:
    """Refusals and scores of the original, the ablated model and the control."""
    table = Table(title="Ablated at inference time, harmful prompts held out", title_justify="left")
    for column in ("", "refused", "bypass ↓", "induce ↑", "KL"):
        table.add_column(column)
    induce = "unknown layer" if result.induce is None else f"{result.induce:.2f}"
    rows = (
        ("no intervention", result.before, result.bypass_before, f"{result.induce_before:.2f}", "0"),
        ("direction", result.after, result.bypass, induce, f"{result.kl:.3f}"),
        ("random direction", result.control, result.bypass_control, "", ""),
    )
    for name, tally, bypass, induced, kl in rows:
        table.add_row(name, rate(rate_part(tally)), f"{bypass:.2f}", induced, kl)
    console.print(table)
    if result.verified:
        console.print("Verified: without this direction the model stops refusing; without a random one it does not.")
