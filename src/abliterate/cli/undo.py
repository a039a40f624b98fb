"""`abliterate undo`: the original back from an edited model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli.arguments import Json, Quiet, monitor_for, say
from abliterate.report.tables.files import show_undone
from abliterate.texts import printable

if TYPE_CHECKING:
    pass


def undo(
    out: Annotated[Path, typer.Argument(help="What `run` or `apply` wrote.", show_default=False)],
    target: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to restore into; default: in place.", show_default=False)
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="The folder of the original, if it has moved.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Restore the original: bit for bit where it is still there, else from what the edit kept."""
    from abliterate.edit.undo import undo as undo_edit

    ask = _confirm if sys.stdin.isatty() and sys.stderr.isatty() and not quiet else None
    undone = undo_edit(out, target=target, source=source, confirm=ask, monitor=monitor_for(quiet))
    say(undone, show_undone, as_json)


def _confirm(folder: Path) -> bool:
    """Ask whether the original may be read where a record that is not this user's own says it is."""
    return typer.confirm(
        f"The record says that the original is in {printable(str(folder))}. Take its files from there?", err=True
    )
