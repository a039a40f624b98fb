"""`abliterate run`: the whole job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from abliterate.cli.arguments import Json, Model, Quiet, monitor_for, say
from abliterate.cli.configured import FromRecord, recorded
from abliterate.cli.options import with_settings
from abliterate.config import (
    EditSettings,
    EvalSettings,
    FindSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RunSettings,
    SearchSettings,
)
from abliterate.report.tables.run import show_done
from abliterate.texts.terminal import terminal, write

if TYPE_CHECKING:
    from abliterate.record import Record


@dataclass(frozen=True, slots=True)
class _Groups:
    output: OutputSettings
    loading: ModelSettings
    prompts: PromptSettings
    finding: FindSettings
    searching: SearchSettings
    editing: EditSettings
    evaluating: EvalSettings


@with_settings
def run(
    given: _Groups,
    /,
    *,
    model: Model,
    from_record: FromRecord = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole job: find the direction, search the edit, edit the weights, evaluate before and after."""
    from abliterate import pipeline

    settings = RunSettings(
        model=model,
        loading=given.loading,
        prompts=given.prompts,
        finding=given.finding,
        evaluating=given.evaluating,
        editing=given.editing,
        searching=given.searching,
        output=given.output,
    )
    before = None if from_record is None else recorded(from_record)
    record = pipeline.run(settings, monitor_for(quiet))
    say(record, show_done, as_json)
    if before is not None and not as_json:
        write(terminal(), compared(before, record), style="bold")


def compared(before: Record, again: Record) -> str:
    """Whether a run that was done again wrote the same weights, and if not, what it may come from."""
    old, new = before.output_sha256, again.output_sha256
    if old == new:
        return f"Done again: all {len(new)} files of weights have the SHA-256 of the record."
    same = sum(new.get(name) == digest for name, digest in old.items())
    parts = {
        "the original's files": (before.model.source_sha256, again.model.source_sha256),
        "the prompts": (before.prompts and before.prompts.sha256, again.prompts and again.prompts.sha256),
        "versions": (before.versions, again.versions),
        "the device": (before.model.device, again.model.device),
    }
    others = [name for name, (one, other) in parts.items() if one != other]
    why = f"{' and '.join(others)} are other ones" if others else "sums on another processor may round otherwise"
    return f"Done again: {same} of {len(old)} files of weights have the SHA-256 of the record; {why}."
