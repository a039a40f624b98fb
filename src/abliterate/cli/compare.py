"""How a comparison of several models is shown: one table, JSON, CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from abliterate.cli.arguments import (
    Json,
    Quiet,
    monitor_for,
    refuse_set,
)
from abliterate.cli.options import with_settings
from abliterate.cli.tables import PLAIN, capability_table, print_rates
from abliterate.config import (
    EvalSettings,
    ModelSettings,
    PromptSettings,
)
from abliterate.errors import UsageError
from abliterate.report.wording import SETS, judged_by

if TYPE_CHECKING:
    from abliterate.evaluation.compare import Comparison, Entry
    from abliterate.evaluation.judging import Judge
    from abliterate.record import BehaviourPart, PairedPart


def as_dict(found: Comparison) -> dict[str, Any]:
    """The comparison for machines."""
    from abliterate.evaluation.judging.calibration import calibration_of
    from abliterate.report.assemble import judge_part, versions

    judge, entries = found.judge, found.entries
    return {
        "judge": judge_part(judge, calibration_of(judge)).model_dump(mode="json"),
        "versions": versions(),
        "settings": found.evaluating.model_dump(mode="json"),
        "prompts": {
            "sources": found.prompts.sources,
            "counts": {name: len(answers.prompts) for name, answers in entries[0].answers.items()},
            "dropped": dict(found.prompts.dropped),
            "sha256": found.prompts.sha256,
        },
        "reference": entries[0].contender.name,
        "entries": [_entry(entry, entries[0], judge) for entry in entries],
    }


def _entry(entry: Entry, first: Entry, judge: Judge) -> dict[str, Any]:
    from abliterate.evaluation.judging.calibration import calibration_of
    from abliterate.evaluation.results import degenerate, manner
    from abliterate.report.assemble import behaviour_part, capability_parts, estimate_part, paired_parts, shift_part

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
        broken = paired_parts(first.answers, entry.answers, degenerate)
        part["degenerate"] = {name: pair.model_dump(mode="json") for name, pair in broken.items()}
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
        row |= _with_ends(f"{name}_rate", rate["ci95"])
        if rate["corrected"] is not None:
            row |= _estimated(f"{name}_corrected", rate["corrected"])
        if "paired" in entry:
            pair = entry["paired"][name]
            row |= _estimated(f"{name}_change", pair["change"]) | {f"{name}_p": pair["p"]}
    for mark in entry.get("capability", []):
        score = mark["before"] if mark["after"] is None else mark["after"]
        row |= _estimated(f"{mark['task']} {mark['metric']}", score)
    shift = entry.get("shift", {})
    for key in ("kl_first_token", "kl_reply"):
        if key in shift:
            row |= {key: shift[key], **_with_ends(key, shift[f"{key}_ci95"] or ("", ""))}
    row |= {key: shift[key] for key in ("nll_before", "nll_after") if key in shift}
    for key in ("tokens", "repetition"):
        row |= _estimated(key, entry[key])
    return row


def _estimated(name: str, part: dict[str, Any]) -> dict[str, Any]:
    return {name: part["value"], **_with_ends(name, part["ci95"])}


def _with_ends(name: str, ends: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}_low": ends[0], f"{name}_high": ends[1]}


def show(comparison: dict[str, Any], console: Console) -> None:
    """Which model is which, refusals per set, shift from the first and length of harmless replies, capability."""
    from abliterate.record import CapabilityPart, JudgePart

    entries = comparison["entries"]
    for number, entry in enumerate(entries, 1):
        console.print(f"{number}  {entry['name']}", markup=False, highlight=False, soft_wrap=True)
    states = [(str(number), *_behaviour(entry)) for number, entry in enumerate(entries, 1)]
    print_rates("Refusals on held-out prompts; change from 1", states, console)
    console.print(f"[dim]{escape(judged_by(JudgePart.model_validate(comparison['judge'])))}[/]", highlight=False)
    table = Table(title="Harmless prompts: shift from 1 in nats per token, length", title_justify="left", **PLAIN)
    for column in ("", "KL, first token", "KL, reply", "own replies cost", "tokens", "repeated"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for number, entry in enumerate(entries, 1):
        length = _number(entry["tokens"]["value"], ".1f"), _number(entry["repetition"]["value"], ".1%")
        table.add_row(str(number), *_moved(entry.get("shift")), *length)
    console.print(table)
    for number, entry in enumerate(entries[1:], 2):
        if "capability" in entry:
            console.print(f"1 → {number}")
            console.print(capability_table([CapabilityPart.model_validate(mark) for mark in entry["capability"]]))


def _behaviour(entry: dict[str, Any]) -> tuple[BehaviourPart, dict[str, PairedPart]]:
    from abliterate.record import BehaviourPart, PairedPart

    pairs = {name: PairedPart.model_validate(pair) for name, pair in entry.get("paired", {}).items()}
    return BehaviourPart.model_validate(entry["behaviour"]), pairs


def _moved(shift: dict[str, Any] | None) -> tuple[str, str, str]:
    if shift is None:
        return "", "", ""
    change = shift["nll_change"]
    return (
        _number(shift["kl_first_token"]),
        _number(shift["kl_reply"]),
        "" if change is None or change["value"] is None else f"{change['value']:+.3f}",
    )


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


@with_settings(ModelSettings, PromptSettings, EvalSettings)
def compare(
    loading: ModelSettings,
    prompts: PromptSettings,
    evaluating: EvalSettings,
    /,
    *,
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two or more of MODEL, MODEL+DIRECTION.safetensors, MODEL+ADAPTER_FOLDER, MODEL+random (a control); "
            "the first is the reference.",
            show_default=False,
        ),
    ],
    csv: Annotated[Path | None, typer.Option(help="Also write the table to this file.", show_default=False)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Several models or plans side by side on the same prompts, each compared with the first."""
    if csv is not None and (csv.is_dir() or not csv.absolute().parent.is_dir()):
        raise UsageError(f"--csv {csv}: expected a file in a folder that exists")
    refuse_set("with compare", evaluating, "no_control", "keep_completions")
    from abliterate.evaluation import compare as comparing
    from abliterate.files.atomic import write_atomically

    monitor = monitor_for(quiet)
    found = comparing.compare(models, loading=loading, prompts=prompts, evaluating=evaluating, monitor=monitor)
    result = as_dict(found)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        show(result, Console())
    if csv is not None:
        write_atomically(csv, as_csv(result))
