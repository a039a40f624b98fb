"""`abliterate report`: the record as one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli.arguments import Json
from abliterate.texts.terminal import plain, terminal, write, write_json


def report(
    out: Annotated[Path, typer.Argument(help="What `run`, `apply` or `search` wrote.", show_default=False)],
    as_json: Json = False,
) -> None:
    """One HTML page that tells what an OUT's record says, written into it; nothing is loaded or measured."""
    from abliterate.report.html import refresh_report

    path = refresh_report(out)
    if as_json:
        write_json(json.dumps({"report": str(path)}))
    else:
        write(terminal(), "Report: ", plain(str(path), "bold"), whole=True)
