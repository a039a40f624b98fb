"""How a verification, a comparison with the original and a restoration are shown."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from abliterate.card import rate
from abliterate.pipeline import Verification, rate_part
from abliterate.restoring import Comparison, Undone


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


#: What a comparison may find wrong, in words.
_WRONG = {
    "damaged": "differ outside the plan",
    "reshaped": "have another dtype or shape",
    "missing": "are missing",
    "extra": "are not in the original",
    "headers": "have another header",
    "wrong_hashes": "have another SHA-256 than recorded",
}


def comparison_as_dict(found: Comparison) -> dict[str, Any]:
    """The comparison for machines."""
    integrity = asdict(found.integrity)
    return {
        "intact": found.intact,
        "out": str(found.out),
        "source": str(found.source),
        "not_original": list(found.other_files),
        **integrity,
    }


def show_comparison(found: Comparison, console: Console) -> None:
    """What was compared and what is wrong."""
    integrity = found.integrity
    for field, words in _WRONG.items():
        names: tuple[str, ...] = getattr(integrity, field)
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            console.print(f"[red]{words}:[/] {', '.join(names[:5])}{more}", soft_wrap=True, highlight=False)
    planned = len(integrity.changed) + len(integrity.unchanged)
    console.print(
        f"{planned} tensors in the plan, {len(integrity.changed)} of them changed; "
        f"{len(integrity.sha256)} weight files hashed."
    )
    if found.other_files:
        console.print(f"[red]not the original's:[/] {', '.join(found.other_files)}", soft_wrap=True, highlight=False)
    rewritten = sorted(name for name in found.rewritten if integrity.other_files.get(name) == "different")
    if rewritten:
        console.print(f"Rewritten by the edit: {', '.join(rewritten)}.", soft_wrap=True, highlight=False)
    if found.intact:
        console.print("Verified: every byte outside the plan equals the original's.")


def undone_as_dict(undone: Undone) -> dict[str, Any]:
    """The restoration for machines."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(undone).items()}


def show_undone(undone: Undone, console: Console) -> None:
    """Whether it is the original or close to it, and where it lies."""
    if undone.exact:
        console.print("Restored bit for bit: the original's files, with the recorded SHA-256.")
    else:
        console.print(
            f"Restored {len(undone.tensors)} tensors to within {undone.steps} unit in the last place of the stored "
            f"format, from what the edit kept: {undone.reason}.",
            soft_wrap=True,
        )
    if undone.remains:
        console.print(f"Still as the edit left it: {', '.join(undone.remains)}.", soft_wrap=True)
    console.print(f"Model: [bold]{undone.folder}[/]", soft_wrap=True)
