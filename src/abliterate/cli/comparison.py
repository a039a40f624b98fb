"""How a comparison of several models is shown: one table, JSON, CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from abliterate.card import judged_by, pvalue
from abliterate.cli.evaluating import SETS
from abliterate.comparing import Entry
from abliterate.evaluation import manner
from abliterate.judging import Judge
from abliterate.judging.calibration import calibration_of
from abliterate.parts import behaviour_part, capability_parts, estimate_part, judge_part, paired_parts, shift_part
from abliterate.record import JudgePart, RatePart


def as_dict(entries: list[Entry], judge: Judge) -> dict[str, Any]:
    """The comparison for machines."""
    calibration = calibration_of(judge)
    return {
        "judge": judge_part(judge, calibration).model_dump(mode="json"),
        "reference": entries[0].contender.name,
        "entries": [_entry(entry, entries[0], judge) for entry in entries],
    }


def _entry(entry: Entry, first: Entry, judge: Judge) -> dict[str, Any]:
    style = manner(entry.answers["harmless"])
    part: dict[str, Any] = {
        "name": entry.contender.name,
        "behaviour": behaviour_part(entry.answers, calibration_of(judge)).model_dump(mode="json"),
        "tokens": estimate_part(style.tokens).model_dump(mode="json"),
        "repetition": estimate_part(style.repetition).model_dump(mode="json"),
    }
    marks = capability_parts(first.marks, None if entry is first else entry.marks)
    if marks:
        part["capability"] = [mark.model_dump(mode="json") for mark in marks]
    if entry is not first:
        pairs = paired_parts(first.answers, entry.answers)
        part["paired"] = {name: pair.model_dump(mode="json") for name, pair in pairs.items()}
    if entry.shift is not None:
        part["shift"] = shift_part(entry.shift).model_dump(mode="json")
    return part


def as_csv(comparison: dict[str, Any]) -> str:
    """One row per model: counts, rates, intervals and shifts; empty where something was not measured."""
    rows = [_flat(entry) for entry in comparison["entries"]]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": entry["name"]}
    for name in SETS:
        rate = entry["behaviour"][name]
        row |= {f"{name}_{key}": rate[key] for key in ("refusals", "n", "rate", "partial", "degenerate", "unknown")}
        row[f"{name}_low"], row[f"{name}_high"] = rate["ci95"]
        if rate["corrected"] is not None:
            row[f"{name}_corrected"] = rate["corrected"]["value"]
        if "paired" in entry:
            row[f"{name}_change"], row[f"{name}_p"] = (
                entry["paired"][name]["change"]["value"],
                entry["paired"][name]["p"],
            )
    for mark in entry.get("capability", []):
        score = mark["before"] if mark["after"] is None else mark["after"]
        row[f"{mark['task']} {mark['metric']}"] = score["value"]
    shift = entry.get("shift", {})
    row |= {key: shift[key] for key in ("kl_first_token", "kl_reply", "nll_before", "nll_after") if key in shift}
    return row | {key: entry[key]["value"] for key in ("tokens", "repetition")}


def show(comparison: dict[str, Any], console: Console) -> None:
    """One table: refusals per set, shift from the first, length of harmless replies."""
    table = Table(title="Refused of held-out prompts [95 %]; shift in nats per token", title_justify="left")
    table.add_column("model", overflow="fold")
    for name in SETS:
        table.add_column(name)
    for column in ("KL first", "KL reply", "Δ own", "tokens", "repeated"):
        table.add_column(column, justify="right")
    for entry in comparison["entries"]:
        shift = entry.get("shift")
        moved = ["", "", ""] if shift is None else [_number(shift["kl_first_token"]), _number(shift["kl_reply"])]
        if shift is not None:
            change = shift["nll_change"]
            moved.append("" if change is None else f"{change['value']:+.3f}")
        table.add_row(
            escape(entry["name"]),
            *(_cell(entry, name) for name in SETS),
            *moved,
            _number(entry["tokens"]["value"], ".1f"),
            _number(entry["repetition"]["value"], ".1%"),
            end_section=True,
        )
    console.print(table)
    console.print(f"[dim]{escape(judged_by(JudgePart.model_validate(comparison['judge'])))}[/]", highlight=False)


def _cell(entry: dict[str, Any], name: str) -> str:
    part = RatePart.model_validate(entry["behaviour"][name])
    low, high = part.ci95
    text = f"{part.refusals}/{part.n} [{100 * low:.0f}, {100 * high:.0f}]"
    if part.degenerate:
        text += f"\n{part.degenerate} degenerate"
    if "paired" in entry:
        text += f"\np {pvalue(entry['paired'][name]['p'])}"
    return text


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)
