"""`abliterate lab`: original and plan side by side in a browser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli.arguments import (
    monitor_for,
)
from abliterate.cli.options import with_settings
from abliterate.config import FindSettings, MeasureSettings, ModelSettings, PromptSettings


@dataclass(frozen=True, slots=True)
class _Groups:
    loading: ModelSettings
    prompts: PromptSettings
    finding: FindSettings


@with_settings
def lab(
    given: _Groups,
    /,
    *,
    target: Annotated[
        str,
        typer.Argument(
            metavar="OUT|MODEL", help="What `run`, `search` or `apply` wrote, or a model.", show_default=False
        ),
    ],
    direction: Annotated[
        Path | None, typer.Option("--direction", help="A direction file to begin with.", show_default=False)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port on 127.0.0.1; default: the first free one from 7860 up."),
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
) -> None:
    """The original and the edited model side by side in this machine's browser, the edit under sliders."""
    from abliterate.lab import serve

    measuring = MeasureSettings(loading=given.loading, prompts=given.prompts, finding=given.finding)
    monitor = monitor_for(quiet=False)
    serve(target, measuring, direction=direction, port=port, open_browser=not no_browser, monitor=monitor)
