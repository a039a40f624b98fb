"""`abliterate find`: directions at every site into one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from abliterate.cli.arguments import (
    Json,
    Model,
    Quiet,
    monitor_for,
    refuse_idle,
)
from abliterate.cli.options import with_settings
from abliterate.cli.run import show_selection
from abliterate.config import (
    EditSettings,
    FindSettings,
    ModelSettings,
    PromptSettings,
)
from abliterate.errors import UsageError


@with_settings(ModelSettings, PromptSettings, FindSettings, EditSettings)
def find(
    loading: ModelSettings,
    prompts: PromptSettings,
    finding: FindSettings,
    editing: EditSettings,
    /,
    *,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (.safetensors).", show_default=False)],
    overwrite: Annotated[bool, typer.Option(help="Replace the file when it exists.")] = False,
    force: Annotated[bool, typer.Option(help="Save the best direction even when none passes.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Directions at every site, scored by intervention, into one file."""
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; give another -o or --overwrite")
    if out.suffix != ".safetensors":
        raise UsageError(f"-o {out}: expected a file name ending in .safetensors")
    if any(above.is_file() for above in out.absolute().parents):
        raise UsageError(f"-o {out}: expected a file in a folder, found one below a file; give another -o")
    chooses = {"layers", "components", "strengths", "untie"}
    refuse_idle("find", EditSettings(**editing.model_dump(exclude=chooses)))
    from abliterate import pipeline
    from abliterate.edit.direction import save_direction

    session = pipeline.open_session(
        model, loading=loading, prompts=prompts, positions=finding.positions, monitor=monitor_for(quiet)
    )
    findings = pipeline.find(session, finding, editing)
    found = pipeline.choose(session, findings, finding, seed=prompts.seed, force=force)
    save_direction(out, found.direction, metadata=pipeline.direction_metadata(session, found))
    part = pipeline.selection_part(found)
    if as_json:
        typer.echo(json.dumps({"file": str(out), "selection": part.model_dump(mode="json")}, indent=1))
    else:
        console = Console()
        show_selection(part, session.anatomy.layers, console)
        console.print(f"Direction: [bold]{out}[/]", soft_wrap=True)
