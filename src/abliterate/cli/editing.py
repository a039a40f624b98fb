"""Commands that find a direction, prove it, and take it out of a model or put it back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from abliterate.cli.arguments import (
    DirectionFile,
    Json,
    Model,
    OptionalDirection,
    Quiet,
    SiteOption,
    monitor_for,
    refuse_idle,
    refuse_set,
    site_of,
)
from abliterate.cli.options import with_settings
from abliterate.config import (
    EditSettings,
    EvalSettings,
    FileSettings,
    FindSettings,
    HardenSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RunSettings,
    SearchSettings,
)
from abliterate.errors import GateNotMet, UsageError

#: What `verify --direction`, which counts refusals, has no use for.
_UNUSED_BY_VERIFY = (
    *("thinking", "thinking_tokens", "capability", "tasks", "task_limit", "multiple_choice"),
    *("no_control", "keep_completions"),
)

#: What `search`, which judges refusals and edits nothing, has no use for.
_UNUSED_BY_SEARCH = ("early_stop", *_UNUSED_BY_VERIFY)


@with_settings(OutputSettings, ModelSettings, PromptSettings, FindSettings, SearchSettings, EditSettings, EvalSettings)
def run(
    output: OutputSettings,
    loading: ModelSettings,
    prompts: PromptSettings,
    finding: FindSettings,
    searching: SearchSettings,
    editing: EditSettings,
    evaluating: EvalSettings,
    /,
    *,
    model: Model,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole job: find the direction, search the edit, edit the weights, evaluate before and after."""
    refuse_set("with run", searching, "resume")
    from abliterate import pipeline
    from abliterate.cli.screen import show_run

    settings = RunSettings(
        model=model,
        loading=loading,
        prompts=prompts,
        finding=finding,
        evaluating=evaluating,
        editing=editing,
        searching=searching,
        output=output,
    )
    record = pipeline.run(settings, monitor_for(quiet))
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        show_run(record, Console())


@with_settings(ModelSettings, PromptSettings, FindSettings, SearchSettings, EditSettings, EvalSettings)
def search(
    loading: ModelSettings,
    prompts: PromptSettings,
    finding: FindSettings,
    searching: SearchSettings,
    editing: EditSettings,
    evaluating: EvalSettings,
    /,
    *,
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the record and the points' directions.", show_default=False)
    ],
    overwrite: Annotated[bool, typer.Option(help="Replace OUT when it holds a search.")] = False,
    force: Annotated[bool, typer.Option(help="Choose a point even when none keeps the constraints.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The front of refusals against damage: edits of which none is better than another in both. Edits nothing."""
    refuse_set("with search", evaluating, *_UNUSED_BY_SEARCH)
    from abliterate import pipeline
    from abliterate.cli.searching import ask_point, show_search

    settings = RunSettings(
        model=model,
        loading=loading,
        prompts=prompts,
        finding=finding,
        searching=searching,
        editing=editing,
        evaluating=evaluating,
        output=OutputSettings(out=out, overwrite=overwrite, force=force),
    )
    record = pipeline.search(settings, monitor_for(quiet))
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
        return
    console = Console()
    if record.search is not None:
        show_search(record.search, console)
        asks = sys.stdin.isatty() and console.is_terminal and searching.pick is None and not quiet
        if asks and (number := ask_point(record.search, console)) != record.search.chosen:
            pipeline.pick(out, number)
    console.print(f"Direction: [bold]{out / 'direction.safetensors'}[/]", soft_wrap=True)


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
    from abliterate.cli.screen import show_selection
    from abliterate.directions import save_direction

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


@with_settings(ModelSettings, PromptSettings, FindSettings, EditSettings, EvalSettings)
def verify(
    loading: ModelSettings,
    prompts: PromptSettings,
    finding: FindSettings,
    editing: EditSettings,
    evaluating: EvalSettings,
    /,
    *,
    model: Model,
    direction: OptionalDirection = None,
    site: SiteOption = None,
    source: Annotated[
        Path | None, typer.Option(help="Of OUT: the folder of the original, if it has moved.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ablate a direction with hooks and see whether the model stops refusing; or, without --direction, prove of an
    OUT that every byte outside its plan equals the original's.
    """
    if direction is None:
        refuse_idle("verify OUT", loading, prompts, finding, editing, evaluating, site)
        _verify_files(Path(model), source, as_json=as_json, quiet=quiet)
        return
    if source is not None:
        raise UsageError("--source: expected an OUT to compare with it, found --direction")
    from abliterate import pipeline
    from abliterate.cli.verification import as_dict, show
    from abliterate.directions import load_direction

    refuse_set("with verify", evaluating, *_UNUSED_BY_VERIFY)
    loaded = load_direction(direction)
    chosen = site_of(site)
    session = pipeline.open_session(
        model,
        loading=loading,
        prompts=prompts,
        positions=finding.positions,
        learnt_from=loaded.learnt_from,
        monitor=monitor_for(quiet),
    )
    result = pipeline.verify(
        session,
        loaded,
        site=chosen,
        editing=editing,
        finding=finding,
        evaluating=evaluating,
        seed=prompts.seed,
    )
    if as_json:
        typer.echo(json.dumps(as_dict(result), indent=1))
    else:
        show(result, Console())
    if not result.verified:
        raise GateNotMet(
            f"not verified: {result.after.refusals} of {result.before.refusals} refusals are left "
            f"(at most half expected), {result.control.refusals} with a random direction, KL {result.kl:.3f} "
            f"(at most {finding.max_kl:g}); try another --site or direction"
        )


def _verify_files(out: Path, source: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Compare an OUT with its original, byte by byte."""
    from abliterate.record import FILE_NAME

    if not (out / FILE_NAME).is_file():
        raise UsageError(f"verify {out}: expected --direction FILE, or an OUT that holds {FILE_NAME}; found neither")
    from abliterate import restoring
    from abliterate.cli.verification import comparison_as_dict, show_comparison

    found = restoring.compare(out, source, monitor_for(quiet))
    if as_json:
        typer.echo(json.dumps(comparison_as_dict(found), indent=1))
    else:
        show_comparison(found, Console())
    if not found.intact:
        raise GateNotMet(f"{out}: not what its record says; see the list above")


@with_settings(OutputSettings, EditSettings, FileSettings)
def apply(
    output: OutputSettings,
    editing: EditSettings,
    loading: FileSettings,
    /,
    *,
    model: Model,
    direction: DirectionFile,
    site: SiteOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take a direction out of a model's weights, streaming over its files; or write an adapter that does."""
    from abliterate import pipeline
    from abliterate.cli.screen import show_run

    record = pipeline.apply(
        model,
        direction,
        output,
        site=site_of(site),
        editing=editing,
        loading=loading,
        monitor=monitor_for(quiet),
    )
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        show_run(record, Console())


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
    from abliterate import restoring
    from abliterate.cli.verification import show_undone, undone_as_dict

    undone = restoring.undo(out, target=target, source=source, monitor=monitor_for(quiet))
    if as_json:
        typer.echo(json.dumps(undone_as_dict(undone), indent=1))
    else:
        show_undone(undone, Console())


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
    from abliterate import repairing
    from abliterate.cli.repairing import repaired_as_dict, show_repaired

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
    from abliterate import hardening as making
    from abliterate.cli.auditing import hardened_as_dict, show_hardened

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
