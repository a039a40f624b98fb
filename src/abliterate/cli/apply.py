"""`abliterate apply`: write a model with a direction taken out of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli.arguments import DirectionFile, Json, Model, Quiet, SiteOption, monitor_for, say, site_of
from abliterate.cli.options import with_settings
from abliterate.config import ApplySettings, EditSettings, FileSettings, OutputSettings
from abliterate.errors import UsageError
from abliterate.report.tables.run import show_done


@dataclass(frozen=True, slots=True)
class _Groups:
    output: OutputSettings
    editing: EditSettings
    loading: FileSettings


@with_settings
def apply(
    given: _Groups,
    /,
    *,
    model: Model,
    direction: DirectionFile,
    site: SiteOption = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="Another direction file to take out of what is left then, or FILE@TIMES for so many times the "
            "strength (refusal out and hedging halved: hedging.safetensors@0.5); may come several times.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take a direction out of a model's weights, streaming over its files; or write an adapter that does."""
    from abliterate import pipeline

    record = pipeline.apply(
        model,
        direction,
        ApplySettings(output=given.output, editing=given.editing, loading=given.loading),
        site=site_of(site),
        also=[_with_times(text) for text in also or ()],
        monitor=monitor_for(quiet),
    )
    say(record, show_done, as_json)


def _with_times(text: str) -> tuple[Path, float]:
    """FILE or FILE@TIMES."""
    file, at, times = text.rpartition("@")
    if not at or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(file), float(times)
    except ValueError:
        raise UsageError(f"--also {text}: expected FILE or FILE@TIMES, as in hedging.safetensors@0.5") from None
