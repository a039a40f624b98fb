"""`abliterate verify`: proof by intervention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from abliterate.cli.arguments import (
    DirectionFile,
    Json,
    Model,
    Quiet,
    SiteOption,
    monitor_for,
    say,
    site_of,
)
from abliterate.cli.options import with_settings
from abliterate.config import EditSettings, ModelSettings, PromptSettings, ReplySettings, VerifySettings
from abliterate.errors import GateNotMet
from abliterate.report.tables.verification import show_verification

if TYPE_CHECKING:
    from abliterate.monitor import Monitor
    from abliterate.record import VerificationPart


@dataclass(frozen=True, slots=True)
class _Groups:
    loading: ModelSettings
    prompts: PromptSettings
    finding: VerifySettings
    editing: EditSettings
    replies: ReplySettings


@with_settings
def verify(
    given: _Groups,
    /,
    *,
    model: Model,
    direction: DirectionFile,
    site: SiteOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ablate a direction with hooks and see whether the model stops refusing; without a random one it does not.

    Of an OUT, `abliterate check OUT` compares the bytes.
    """
    part = _verified(model, given, direction, site, monitor_for(quiet))
    say(part, show_verification, as_json)
    if not part.verified:
        left = "refusals" if part.behaviour is None else f"replies that {part.behaviour.shown}"
        raise GateNotMet(
            f"not verified: {part.after.refusals} of {part.before.refusals} {left} are left (at most half "
            f"expected), {part.control.refusals} with a random direction, KL {part.kl:.3f} (at most "
            f"{part.max_kl:g}); try another --site or direction"
        )


def _verified(model: str, given: _Groups, direction: Path, site: str | None, monitor: Monitor) -> VerificationPart:
    """By intervention: without the direction, and without a random one."""
    from abliterate import pipeline
    from abliterate.edit.direction import load_direction

    loaded = load_direction(direction)
    chosen = site_of(site)
    session = pipeline.open_session(
        model,
        loading=given.loading,
        prompts=given.prompts,
        learnt_from=loaded.learnt_from,
        reply_tokens=given.replies.max_new_tokens,
        monitor=monitor,
    )
    return pipeline.verify(
        session, loaded, site=chosen, editing=given.editing, finding=given.finding, replies=given.replies
    )
