"""`abliterate harden`: spread a model's refusal over several directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from abliterate.cli.arguments import Json, Model, Quiet, joined, monitor_for, say
from abliterate.cli.audit import audit_table
from abliterate.cli.options import with_settings
from abliterate.cli.tables import show_evaluation
from abliterate.cli.terminal import plain, write
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
from abliterate.report.wording import hardened

if TYPE_CHECKING:
    from abliterate.record import HardeningPart


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


def show_hardening(part: HardeningPart, console: Console) -> None:
    """Ordinary behaviour, then the audits before and after, side by side."""
    show_evaluation(part.evaluation, console)
    show_audits(part, console)
    write(console, "Model: ", plain(part.folder, "bold"), whole=True)


def show_audits(part: HardeningPart, console: Console) -> None:
    """The audits before and after, side by side."""
    for line in hardened(part):
        write(console, line)
    write(console, audit_table(part.before, part.after))
