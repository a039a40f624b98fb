"""How a verification, a comparison with the original and a restoration are shown."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from abliterate.cli.arguments import (
    Json,
    Model,
    OptionalDirection,
    Quiet,
    SiteOption,
    monitor_for,
    refuse_idle,
    say,
    site_of,
)
from abliterate.cli.options import with_settings
from abliterate.cli.terminal import Table, plain, write
from abliterate.config import EditSettings, ModelSettings, PromptSettings, ReplySettings, VerifySettings
from abliterate.errors import GateNotMet, UsageError
from abliterate.report.wording import rate, words_of

if TYPE_CHECKING:
    from abliterate.monitor import Monitor
    from abliterate.record import IntegrityPart, VerificationPart


def show_verification(part: VerificationPart, console: Console) -> None:
    """Refusals and scores of the original, the ablated model and the control."""
    words = words_of(part.behaviour)
    table = Table(title=f"Ablated at inference time, {words('harmful')} prompts held out", title_justify="left")
    rows = [
        ("no intervention", part.before, part.bypass_before, part.induce_before, "0"),
        ("direction", part.after, part.bypass, part.induce, f"{part.kl:.3f}"),
        ("random direction", part.control, part.bypass_control, None, ""),
    ]
    scored = part.bypass is not None  # else first tokens do not tell this behaviour
    for column in ("", words.shown, *(("bypass ↓", "induce ↑") if scored else ()), "KL"):
        table.add_column(column)
    for name, refused, bypass, induced, kl in rows:
        unknown = "unknown layer" if name == "direction" else ""
        scores = (_score(bypass), _score(induced) or unknown) if scored else ()
        table.add_row(name, rate(refused), *scores, kl)
    write(console, table)
    if part.verified:
        stops = "the model stops refusing" if part.behaviour is None else f"at most half as many replies {words.shown}"
        write(console, f"Verified: without this direction {stops}; not so without a random one.")


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


#: What a comparison may find wrong, in words.
_WRONG = {
    "damaged": "differ outside the plan",
    "reshaped": "have another dtype or shape",
    "missing": "are missing",
    "extra": "are not in the original",
    "headers": "have another header",
    "wrong_hashes": "have another SHA-256 than recorded",
}


def show_integrity(part: IntegrityPart, console: Console) -> None:
    """What was compared and what is wrong."""
    for field, words in _WRONG.items():
        names: list[str] = getattr(part, field)
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            write(console, plain(f"{words}:", "red"), f" {', '.join(names[:5])}{more}", whole=True)
    planned = len(part.changed) + len(part.unchanged)
    write(
        console,
        f"{planned} tensors in the plan, {len(part.changed)} of them changed; {len(part.sha256)} weight files hashed.",
    )
    if part.not_original:
        write(console, plain("not the original's:", "red"), f" {', '.join(part.not_original)}", whole=True)
    for names, words in (
        (part.unknown, "neither the original's nor results that the record knows"),
        (part.changed_files, "not as the record says, or gone"),
    ):
        if names:
            write(console, plain(f"{words}:", "red"), f" {', '.join(names)}", whole=True)
    if not part.proved:
        why = " the record is of an earlier version, without hashes of the files beside the weights."
        write(console, plain("Not proved:", "red"), why, whole=True)
    if part.rewritten:
        write(console, f"Rewritten by the edit: {', '.join(part.rewritten)}.", whole=True)
    if part.of_hub:
        write(console, f"Added by the hub, no part of the model: {', '.join(part.of_hub)}.", whole=True)
    if part.intact:
        write(console, "Verified: every byte outside the plan equals the original's.")


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
    direction: OptionalDirection = None,
    site: SiteOption = None,
    source: Annotated[
        Path | None, typer.Option(help="Of OUT: the folder of the original, if it has moved.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ablate a direction with hooks and see whether the model stops refusing; or, without --direction, prove of an
    OUT that every byte outside its plan equals the original's.
    """
    if direction is None:
        unused = (given.loading, given.prompts, given.finding, given.editing, given.replies, site)
        refuse_idle("verify OUT", *unused)
        _verify_files(Path(os.path.expanduser(model)), source, as_json=as_json, quiet=quiet)
        return
    if source is not None:
        raise UsageError("--source: expected an OUT to compare with it, found --direction")
    part = _verified(model, given, direction, site, monitor_for(quiet))
    say(part, show_verification, as_json)
    if not part.verified:
        raise GateNotMet(
            f"not verified: {part.after.refusals} of {part.before.refusals} refusals are left (at most half "
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


def _verify_files(out: Path, source: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Compare an OUT with its original, byte by byte."""
    from abliterate.record import FILE_NAME

    if not (out / FILE_NAME).is_file():
        raise UsageError(f"verify {out}: expected --direction FILE, or an OUT that holds {FILE_NAME}; found neither")
    from abliterate.edit.undo import verify_files

    part = verify_files(out, source, monitor_for(quiet))
    say(part, show_integrity, as_json)
    if not part.intact:
        raise GateNotMet(f"{out}: not what its record says; see the list above")
