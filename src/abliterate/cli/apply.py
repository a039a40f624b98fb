"""`abliterate apply`: write a model with a direction taken out of its weights."""

from __future__ import annotations

from dataclasses import dataclass

from abliterate.cli.arguments import DirectionFile, Json, Model, Quiet, SiteOption, monitor_for, say, site_of
from abliterate.cli.options import with_settings
from abliterate.cli.run import show_done
from abliterate.config import EditSettings, FileSettings, OutputSettings


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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take a direction out of a model's weights, streaming over its files; or write an adapter that does."""
    from abliterate import pipeline

    record = pipeline.apply(
        model,
        direction,
        given.output,
        site=site_of(site),
        editing=given.editing,
        loading=given.loading,
        monitor=monitor_for(quiet),
    )
    say(record, show_done, as_json)
