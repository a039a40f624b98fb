"""`abliterate audit`: how easily a model's refusal is taken out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli.arguments import Json, Model, Quiet, joined, monitor_for, say
from abliterate.cli.options import with_settings
from abliterate.config import (
    FindSettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
    ReplySettings,
    SelectSettings,
)
from abliterate.report.tables.forensics import show_audit

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class _Groups:
    loading: ModelSettings
    prompts: PromptSettings
    finding: SelectSettings
    replies: ReplySettings


@with_settings
def audit(
    given: _Groups,
    /,
    *,
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for record and report.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How brittle is this model's refusal: what is left of it as more is taken out, and what that costs."""
    from abliterate.forensics.audit import audit as audit_model

    measuring = MeasureSettings(
        loading=given.loading,
        prompts=given.prompts,
        finding=FindSettings(**given.finding.model_dump()),
        evaluating=joined(given.replies),
    )
    part = audit_model(model, measuring, out=out, monitor=monitor_for(quiet))
    say(part, show_audit, as_json)
