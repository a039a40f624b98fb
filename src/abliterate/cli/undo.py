"""`abliterate undo`: the original back from an edited model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from abliterate.cli.arguments import Json, Quiet, monitor_for, say
from abliterate.cli.terminal import plain, write

if TYPE_CHECKING:
    from abliterate.record import UndonePart


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

    undone = undo_edit(out, target=target, source=source, monitor=monitor_for(quiet))
    say(undone, show_undone, as_json)


def show_undone(undone: UndonePart, console: Console) -> None:
    """Whether it is the original or close to it, and where it lies."""
    if undone.exact:
        write(console, "Restored bit for bit: the original's files, with the recorded SHA-256.")
    else:
        write(
            console,
            f"Restored {len(undone.tensors)} tensors to within {undone.steps} unit in the last place of the stored "
            f"format, from what the edit kept: {undone.reason}.",
            whole=True,
        )
    if undone.remains:
        write(console, f"Still as the edit left it: {', '.join(undone.remains)}.", whole=True)
    write(console, "Model: ", plain(undone.folder, "bold"), whole=True)
