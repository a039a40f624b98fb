"""`show`: the record of an OUT as tables, from its file alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli.arguments import Json, say
from abliterate.report.tables.record import show_record

if TYPE_CHECKING:
    pass


def show(
    out: Annotated[Path, typer.Argument(help="What `run`, `apply` or `search` wrote.", show_default=False)],
    as_json: Json = False,
) -> None:
    """What an OUT's record says, as tables: nothing is loaded or measured."""
    from abliterate.record import read_record

    say(read_record(out), show_record, as_json)
