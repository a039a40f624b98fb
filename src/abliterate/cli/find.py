"""`abliterate find`: directions at every site into one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import several
from abliterate.cli.arguments import (
    Json,
    Model,
    Quiet,
    monitor_for,
)
from abliterate.cli.options import with_settings
from abliterate.config import FindSettings, ModelSettings, PromptSettings, WriterSettings
from abliterate.errors import UsageError
from abliterate.files.atomic import refuse_other_kinds
from abliterate.report.tables.run import show_selection
from abliterate.texts.terminal import plain, terminal, write, write_json


@dataclass(frozen=True, slots=True)
class _Groups:
    loading: ModelSettings
    prompts: PromptSettings
    finding: FindSettings
    writers: WriterSettings


@with_settings
def find(
    given: _Groups,
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
    refuse_other_kinds(out)
    if out.suffix != ".safetensors":
        raise UsageError(f"-o {out}: expected a file name ending in .safetensors")
    if any(above.is_file() for above in out.absolute().parents):
        raise UsageError(f"-o {out}: expected a file in a folder, found one below a file; give another -o")
    from abliterate import pipeline
    from abliterate.edit.direction import save_direction

    session = pipeline.open_session(
        model,
        loading=given.loading,
        prompts=given.prompts,
        positions=given.finding.positions,
        monitor=monitor_for(quiet),
    )
    findings = pipeline.find(session, given.finding, given.writers)
    found = pipeline.choose(session, findings, given.finding, force=force)
    if several.leads():
        save_direction(out, found.direction)
    if as_json:
        from abliterate.record import FoundPart

        write_json(FoundPart(file=str(out), selection=found.selection).model_dump_json(indent=1))
    else:
        console = terminal()
        show_selection(found.selection, session.anatomy.layers, console)
        write(console, "Direction: ", plain(str(out), "bold"), whole=True)
