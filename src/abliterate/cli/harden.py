"""`abliterate harden`: spread a model's refusal over several directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from abliterate.cli.arguments import (
    Json,
    Model,
    Quiet,
    monitor_for,
)
from abliterate.cli.audit import audit_table
from abliterate.cli.options import with_settings
from abliterate.cli.tables import show_evaluation
from abliterate.config import (
    EvalSettings,
    FindSettings,
    HardenSettings,
    ModelSettings,
    PromptSettings,
)
from abliterate.report.wording import audited

if TYPE_CHECKING:
    from abliterate.forensics.harden import Hardened


@with_settings(HardenSettings, ModelSettings, PromptSettings, FindSettings, EvalSettings)
def harden(
    hardening: HardenSettings,
    loading: ModelSettings,
    prompts: PromptSettings,
    finding: FindSettings,
    evaluating: EvalSettings,
    /,
    *,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the hardened model.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when it holds a model.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Spread a model's refusal over several directions, and measure what that is worth against ablation."""
    from abliterate.forensics import harden as making

    done = making.harden(
        model,
        out,
        hardening,
        overwrite=overwrite,
        loading=loading,
        prompts=prompts,
        finding=finding,
        evaluating=evaluating,
        monitor=monitor_for(quiet),
    )
    if as_json:
        typer.echo(json.dumps(hardened_as_dict(done), indent=1))
    else:
        show_hardened(done, Console())


def show_hardened(done: Hardened, console: Console) -> None:
    """Ordinary behaviour, then the audits before and after, side by side."""
    from abliterate.report.assemble import evaluation_part

    show_evaluation(evaluation_part(done.evaluation), console)
    for when, part in (("Before", done.before), ("After", done.after)):
        console.print(f"[bold]{when}[/]: {' '.join(audited(part))}", highlight=False)
    console.print(audit_table(done.before, done.after))
    console.print(f"{len(done.tensors)} tensors have an addition.", highlight=False)
    console.print(f"Model: [bold]{escape(str(done.folder))}[/]", soft_wrap=True)


def hardened_as_dict(done: Hardened) -> dict[str, Any]:
    """The same for machines."""
    from abliterate.report.assemble import evaluation_part

    return {
        "folder": str(done.folder),
        "tensors": list(done.tensors),
        "size": done.size,
        "before": done.before.model_dump(mode="json"),
        "after": done.after.model_dump(mode="json"),
        "evaluation": evaluation_part(done.evaluation).model_dump(mode="json"),
    }
