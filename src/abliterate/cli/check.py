"""`abliterate check`: every byte of an edited model beside the original's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli.arguments import Json, Quiet, monitor_for, say
from abliterate.errors import GateNotMet, UsageError
from abliterate.report.tables.files import show_integrity

if TYPE_CHECKING:
    pass


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
