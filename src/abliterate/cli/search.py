"""`abliterate search`: a front of edits, and another point of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from abliterate.cli.arguments import Json, Model, Quiet, joined, monitor_for
from abliterate.cli.options import with_settings
from abliterate.config import (
    EditSettings,
    FindSettings,
    FolderSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    ReplySettings,
    RunSettings,
    SearchSettings,
    as_natural,
)
from abliterate.errors import UsageError
from abliterate.report.tables.search import show_search
from abliterate.texts.terminal import plain, terminal, write, write_json

if TYPE_CHECKING:
    from abliterate.record import SearchPart


def ask_point(part: SearchPart, console: Console) -> int:
    """The number of a point, asked for until one is given; nothing, or the end of the input, means the chosen one.

    Raises:
        UsageError: The input ends and no point was chosen.
    """
    numbers = [point.number for point in part.points]
    default = "" if part.chosen is None else f" [{part.chosen}]"
    while True:
        try:
            answer = console.input(plain(f"Point to take{default}: ")).strip()
        except EOFError:
            if part.chosen is None:
                raise UsageError("point: expected a number, found the end of the input; give --pick") from None
            return part.chosen
        if not answer and part.chosen is not None:
            return part.chosen
        if as_natural(answer) in numbers:
            return int(answer)
        write(console, f"Expected one of {', '.join(map(str, numbers))}.")


@dataclass(frozen=True, slots=True)
class _Groups:
    folder: FolderSettings
    loading: ModelSettings
    prompts: PromptSettings
    finding: FindSettings
    searching: SearchSettings
    editing: EditSettings
    replies: ReplySettings


@with_settings
def search(
    given: _Groups,
    /,
    *,
    model: Model,
    force: Annotated[bool, typer.Option(help="Choose a point even when none keeps the constraints.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with the trials of a search that was broken off.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The front of refusals against damage: edits of which none is better than another in both. Edits nothing."""
    from abliterate import pipeline

    out = given.folder.out
    settings = RunSettings(
        model=model,
        loading=given.loading,
        prompts=given.prompts,
        finding=given.finding,
        searching=given.searching,
        editing=given.editing,
        evaluating=joined(given.replies),
        output=OutputSettings(out=out, overwrite=given.folder.overwrite, force=force),
    )
    record = pipeline.search(settings, resume=resume, monitor=monitor_for(quiet))
    if as_json:
        write_json(record.model_dump_json(indent=1))
        return
    console = terminal()
    if record.search is not None:
        show_search(record.search, console)
        asks = sys.stdin.isatty() and console.is_terminal and given.searching.pick is None and not quiet
        if asks and (number := ask_point(record.search, console)) != record.search.chosen:
            pipeline.pick(out, number)
    write(console, "Direction: ", plain(str(out / "direction.safetensors"), "bold"), whole=True)
