"""`abliterate repair`: an edited model's refusals back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli.arguments import Json, Quiet, joined, monitor_for, refuse_idle, say
from abliterate.cli.options import with_settings
from abliterate.config import (
    CapabilitySettings,
    FindSettings,
    FolderSettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
    RefusalSettings,
    RepairSettings,
    ReplySettings,
    ThinkingSettings,
)
from abliterate.report.tables.forensics import show_repair

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class _Groups:
    repairing: RepairSettings
    folder: FolderSettings
    loading: ModelSettings
    prompts: PromptSettings
    refusals: RefusalSettings
    replies: ReplySettings
    thinking: ThinkingSettings
    capability: CapabilitySettings


@with_settings
def repair(
    given: _Groups,
    /,
    *,
    model: Annotated[str, typer.Argument(help="The edited model: hub id, folder or .gguf.", show_default=False)],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give an edited model its refusals back: exactly with an undo file, base or adapter, else approximately."""
    if given.repairing.base is not None or given.repairing.adapter is not None:
        idle = (given.prompts, given.refusals, given.replies, given.thinking, given.capability)
        refuse_idle("repair with --base or --adapter", *idle)
    from abliterate.forensics.repair import repair as repair_model

    measuring = MeasureSettings(
        loading=given.loading,
        prompts=given.prompts,
        finding=FindSettings(**given.refusals.model_dump()),
        evaluating=joined(given.replies, given.thinking, given.capability),
    )
    folder = given.folder
    part = repair_model(
        model, folder.out, given.repairing, measuring, overwrite=folder.overwrite, monitor=monitor_for(quiet)
    )
    say(part, show_repair, as_json)
