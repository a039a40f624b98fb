"""`abliterate check`: every byte of an edited model beside the original's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from abliterate.cli.arguments import Json, Quiet, monitor_for, say
from abliterate.cli.terminal import plain, write
from abliterate.errors import GateNotMet, UsageError

if TYPE_CHECKING:
    from abliterate.record import IntegrityPart

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


def check(
    *,
    out: Annotated[Path, typer.Argument(help="What `run`, `apply`, `harden` or `repair` wrote.", show_default=False)],
    source: Annotated[
        Path | None, typer.Option(help="The folder of the original, if it has moved.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prove of an OUT that every byte outside its plan equals the original's, and name every file that is neither."""
    from abliterate.record import FILE_NAME

    out = Path(os.path.expanduser(out))
    if not (out / FILE_NAME).is_file():
        raise UsageError(f"check {out}: expected an OUT that holds {FILE_NAME}, found none")
    from abliterate.edit.undo import verify_files

    part = verify_files(out, source, monitor_for(quiet))
    say(part, show_integrity, as_json)
    if not part.intact:
        raise GateNotMet(f"{out}: not what its record says; see the list above")
