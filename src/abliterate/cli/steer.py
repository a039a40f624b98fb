"""`abliterate steer`: replies of a steered model, and behaviour and damage against the coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli.arguments import (
    Along,
    Json,
    Model,
    Quiet,
    joined,
    monitor_for,
    refuse_idle,
    refuse_set,
    say,
)
from abliterate.cli.options import with_settings
from abliterate.config import (
    FindSettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
    RefusalSettings,
    ReplySettings,
    SteerSettings,
)
from abliterate.errors import UsageError
from abliterate.report.tables.steering import show_steering

if TYPE_CHECKING:
    from abliterate.edit.steering import SteeringVectors
    from abliterate.monitor import Monitor
    from abliterate.record import SteeringPart


@dataclass(frozen=True, slots=True)
class _Groups:
    steering: SteerSettings
    loading: ModelSettings
    prompts: PromptSettings
    finding: RefusalSettings
    replies: ReplySettings


@with_settings
def steer(
    given: _Groups,
    /,
    *,
    model: Model,
    along: Along,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer this, and measure nothing; may be given several times. Default: the held-out prompts.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for record and report.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add a direction to the residual stream, or scale, clamp or ablate it: behaviour and damage by coefficient.

    Nothing is written into the model.
    """
    vectors = along.vectors()
    if prompt:
        if out is not None:
            raise UsageError("--out: does nothing with --prompt, which measures nothing; leave it out")
        part = _answered(model, vectors, prompt, given, along.name, monitor_for(quiet))
    else:
        from abliterate import pipeline

        measuring = MeasureSettings(
            loading=given.loading,
            prompts=given.prompts,
            finding=FindSettings(**given.finding.model_dump()),
            evaluating=joined(given.replies),
        )
        part = pipeline.steer(
            model, vectors, given.steering, measuring, name=along.name, out=out, monitor=monitor_for(quiet)
        )
    say(part, show_steering, as_json)


def _answered(
    model: str, vectors: SteeringVectors, prompts: Sequence[str], given: _Groups, name: str, monitor: Monitor
) -> SteeringPart:
    """Replies to these prompts. Raises `UsageError` for options that are of measurements."""
    refuse_idle("steer --prompt", given.prompts, given.finding)
    refuse_set("in steer --prompt", given.steering, "keep_completions", "no_control")
    refuse_set("in steer --prompt", given.replies, *(set(ReplySettings.model_fields) - {"max_new_tokens"}))
    from abliterate.finding.steer import reply
    from abliterate.session import open_model

    opened = open_model(model, given.loading, monitor)
    longest = given.replies.max_new_tokens
    return reply(opened, vectors, prompts, given.steering, max_new_tokens=longest, monitor=monitor, name=name)
