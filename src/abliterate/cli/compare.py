"""How a comparison of several models is shown: one table, JSON, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from abliterate.cli.arguments import Json, Quiet, joined, monitor_for, say
from abliterate.cli.options import with_settings
from abliterate.cli.tables import PLAIN, capability_table, print_rates
from abliterate.cli.terminal import Table, write
from abliterate.config import (
    CapabilitySettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
    ReplySettings,
    ThinkingSettings,
)
from abliterate.errors import UsageError
from abliterate.report.wording import SETS, drifted, judged_by, replies_of, words_of

if TYPE_CHECKING:
    from abliterate.record import ComparisonPart, ContenderPart, EstimatePart, RatePart, ShiftPart


def as_csv(part: ComparisonPart) -> str:
    """One row per model: counts, rates, intervals and shifts; empty where something was not measured."""
    rows = [_flat(entry) for entry in part.entries]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(entry: ContenderPart) -> dict[str, Any]:
    row: dict[str, Any] = {"name": entry.name}
    for name in SETS:
        rate: RatePart = getattr(entry.behaviour, name)
        counts = ("refusals", "n", "rate", "evasion", "partial", "degenerate", "cut_off", "unknown")
        row |= {f"{name}_{key}": getattr(rate, key) for key in counts}
        row |= _with_ends(f"{name}_rate", rate.ci95)
        if rate.corrected is not None:
            row |= _estimated(f"{name}_corrected", rate.corrected)
        if (pair := entry.paired.get(name)) is not None:
            row |= _estimated(f"{name}_change", pair.change) | {f"{name}_p": pair.p}
    for mark in entry.capability:
        row |= _estimated(f"{mark.task} {mark.metric}", mark.before if mark.after is None else mark.after)
    if (shift := entry.shift) is not None:
        for key in ("kl_first_token", "kl_reply"):
            row |= {key: getattr(shift, key), **_with_ends(key, getattr(shift, f"{key}_ci95") or ("", ""))}
        row |= {"nll_before": shift.nll_before, "nll_after": shift.nll_after}
    return row | _estimated("tokens", entry.tokens) | _estimated("repetition", entry.repetition)


def _estimated(name: str, part: EstimatePart) -> dict[str, Any]:
    return {name: part.value, **_with_ends(name, part.ci95)}


def _with_ends(name: str, ends: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}_low": ends[0], f"{name}_high": ends[1]}


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


@dataclass(frozen=True, slots=True)
class _Groups:
    loading: ModelSettings
    prompts: PromptSettings
    replies: ReplySettings
    thinking: ThinkingSettings
    capability: CapabilitySettings


@with_settings
def compare(
    given: _Groups,
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
    from abliterate.evaluation.compare import compare as compare_models
    from abliterate.files.atomic import refuse_other_kinds, write_atomically

    if csv is not None:
        refuse_other_kinds(csv)

    evaluating = joined(given.replies, given.thinking, given.capability)
    measuring = MeasureSettings(loading=given.loading, prompts=given.prompts, evaluating=evaluating)
    part = compare_models(models, measuring, monitor_for(quiet))
    say(part, show_comparison, as_json)
    if csv is not None:
        write_atomically(csv, as_csv(part))
