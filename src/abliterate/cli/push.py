"""`abliterate push`: an edited model on the hub, private unless asked otherwise."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli.arguments import Json, Quiet, monitor_for
from abliterate.texts.terminal import plain, terminal, write, write_json


def push(
    out: Annotated[Path, typer.Argument(help="What `run` or `apply` wrote.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where to, on the hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; else it is private.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Upload also what was saved past a gate.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload an edited model with its card and record to the hub, privately; log in with `hf auth login` first."""
    from abliterate.report.publish import publish

    url = publish(out, repository, public=public, force=force, monitor=monitor_for(quiet))
    if as_json:
        write_json(json.dumps({"url": url, "public": public}))
        return
    console = terminal()
    write(console, f"{'Public' if public else 'Private'}: ", plain(url, "bold"), whole=True)
    by_hand = f"hf upload {shlex.quote(repository)} {shlex.quote(str(out))} --private"
    write(console, f"By hand it would be: {by_hand}", style="dim", whole=True)
