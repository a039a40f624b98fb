"""`abliterate undo`: the original back from an edited model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from abliterate.cli.arguments import Json, Quiet, monitor_for, say
from abliterate.cli.terminal import plain, write
from abliterate.texts import printable

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

    ask = _confirm if sys.stdin.isatty() and sys.stderr.isatty() and not quiet else None
    undone = undo_edit(out, target=target, source=source, confirm=ask, monitor=monitor_for(quiet))
    say(undone, show_undone, as_json)


def _confirm(folder: Path) -> bool:
    """Ask whether the original may be read where a record that is not this user's own says it is."""
    return typer.confirm(
        f"The record says that the original is in {printable(str(folder))}. Take its files from there?", err=True
    )


def show_undone(undone: UndonePart, console: Console) -> None:
    """Whether it is the original or close to it, and where it lies."""
    if undone.exact:
        write(console, "Restored bit for bit: weights with the SHA-256 of the original's.")
    else:
        write(console, _restored(undone), whole=True)
    if undone.remains:
        write(console, f"Still as the edit left it: {', '.join(undone.remains)}.", whole=True)
    if undone.others:
        write(console, f"Left where they were, not known to the record: {', '.join(undone.others)}.", whole=True)
    write(console, "Model: ", plain(undone.folder, "bold"), whole=True)


def _restored(undone: UndonePart) -> str:
    """How close computed tensors come to the original's, and why they were computed."""
    told = f"Restored {len(undone.tensors)} tensors"
    if undone.steps is None:
        return (
            f"{told} from what the edit kept: {undone.reason}. How close they are to the original is not known: "
            "nothing was kept to compare them with."
        )
    equal = 100 * undone.equal / undone.compared
    return (
        f"{told} to within {undone.steps} unit in the last place of the stored format, from what the edit kept: "
        f"{undone.reason}. Compared with {undone.compared:,} numbers of the original, {equal:.1f} % are equal."
    )
