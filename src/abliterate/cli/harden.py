"""`abliterate harden`: spread a model's refusal over several directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from abliterate.cli.arguments import Json, Model, Quiet, joined, monitor_for, say
from abliterate.cli.options import with_settings
from abliterate.config import (
    CapabilitySettings,
    FindSettings,
    FolderSettings,
    HardenSettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
    ReplySettings,
    SelectSettings,
    ThinkingSettings,
)
from abliterate.report.tables.forensics import show_hardening

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class _Groups:
    hardening: HardenSettings
    folder: FolderSettings
    loading: ModelSettings
    prompts: PromptSettings
    finding: SelectSettings
    replies: ReplySettings
    thinking: ThinkingSettings
    capability: CapabilitySettings


@with_settings
def harden(
    given: _Groups,
    /,
    *,
    model: Model,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Spread a model's refusal over several directions, and measure what that is worth against ablation."""
    from abliterate.forensics.harden import harden as harden_model

    measuring = MeasureSettings(
        loading=given.loading,
        prompts=given.prompts,
        finding=FindSettings(**given.finding.model_dump()),
        evaluating=joined(given.replies, given.thinking, given.capability),
    )
    folder = given.folder
    part = harden_model(
        model, folder.out, given.hardening, measuring, overwrite=folder.overwrite, monitor=monitor_for(quiet)
    )
    say(part, show_hardening, as_json)
