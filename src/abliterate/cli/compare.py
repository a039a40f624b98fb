"""`abliterate compare`: several models on the same prompts: one table, JSON, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.cli.arguments import Json, Quiet, joined, monitor_for, say
from abliterate.cli.options import with_settings
from abliterate.config import (
    CapabilitySettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
    ReplySettings,
    ThinkingSettings,
)
from abliterate.errors import UsageError
from abliterate.report.tables.comparison import show_comparison
from abliterate.report.wording import SETS

if TYPE_CHECKING:
    from abliterate.record import ComparisonPart, ContenderPart, EstimatePart, RatePart


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
