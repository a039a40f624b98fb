"""What a repair did, in words and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from abliterate.cli.arguments import (
    Json,
    OptionalDirection,
    Quiet,
    monitor_for,
    refuse_idle,
)
from abliterate.cli.options import with_settings
from abliterate.cli.tables import show_evaluation
from abliterate.config import (
    EvalSettings,
    FindSettings,
    ModelSettings,
    PromptSettings,
)

if TYPE_CHECKING:
    from abliterate.forensics.repair import Repaired

_HOW = {
    "undo": "Restored with what the edit kept for undo",
    "base": "Restored from the base",
    "adapter": "Restored by taking the merged adapter out",
    "approximation": "Repaired approximately, by a rank-one addition fitted on prompts",
}


def show_repaired(done: Repaired, console: Console) -> None:
    """How exact it is comes first."""
    from abliterate.report.assemble import evaluation_part

    console.print(f"[bold]{_HOW[done.how]}.[/]", highlight=False)
    for count, what in (
        (len(done.exact), "the original's bytes"),
        (len(done.restored), "restored, not byte for byte"),
        (len(done.added), "with an addition"),
    ):
        if count:
            console.print(f"{count} {'files' if done.how == 'undo' and what.startswith('the') else 'tensors'}: {what}.")
    if done.note:
        console.print(escape(done.note[0].upper() + done.note[1:] + "."), highlight=False)
    if done.evaluation is not None:
        show_evaluation(evaluation_part(done.evaluation), console)
    console.print(f"Model: [bold]{escape(str(done.folder))}[/]", soft_wrap=True)


def repaired_as_dict(done: Repaired) -> dict[str, Any]:
    """The same for machines."""
    from abliterate.report.assemble import evaluation_part

    return {
        "folder": str(done.folder),
        "how": done.how,
        "exact": list(done.exact),
        "restored": list(done.restored),
        "added": list(done.added),
        "note": done.note,
        "size": done.size,
        "evaluation": None if done.evaluation is None else evaluation_part(done.evaluation).model_dump(mode="json"),
    }


@with_settings(ModelSettings, PromptSettings, EvalSettings)
def repair(
    loading: ModelSettings,
    prompts: PromptSettings,
    evaluating: EvalSettings,
    /,
    *,
    model: Annotated[str, typer.Argument(help="The edited model: hub id, folder or .gguf.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write the repaired model to.", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option(help="The model that it was made from: restores exactly.", show_default=False)
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="The PEFT adapter that was merged into it.", show_default=False)
    ] = None,
    direction: OptionalDirection = None,
    refusal_tokens: Annotated[
        str | None, typer.Option(help="First tokens of a refusal, for an approximation.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when it holds a model.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give an edited model its refusals back: exactly with an undo file, base or adapter, else approximately."""
    if base is not None or adapter is not None:
        refuse_idle("repair with --base or --adapter", prompts, evaluating)
    from abliterate.forensics import repair as repairing

    done = repairing.repair(
        model,
        out,
        base=base,
        adapter=adapter,
        direction=direction,
        overwrite=overwrite,
        loading=loading,
        prompts=prompts,
        finding=FindSettings(refusal_tokens=refusal_tokens),
        evaluating=evaluating,
        monitor=monitor_for(quiet),
    )
    if as_json:
        typer.echo(json.dumps(repaired_as_dict(done), indent=1))
    else:
        show_repaired(done, Console())
