"""How a verification, a comparison with the original and a restoration are shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from abliterate.cli.arguments import (
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
    FindSettings,
    ModelSettings,
    PromptSettings,
)
from abliterate.errors import GateNotMet, UsageError
from abliterate.report.wording import rate

if TYPE_CHECKING:
    from abliterate.edit.undo import Comparison
    from abliterate.pipeline import Verification


def as_dict(result: Verification) -> dict[str, Any]:
    """The verification for machines."""
    from abliterate.report.assemble import rate_part

    tallies = {name: rate_part(getattr(result, name)).model_dump(mode="json") for name in _TALLIES}
    scores = asdict(result)
    return {**scores, **tallies}


_TALLIES = ("before", "after", "control")


def show(result: Verification, console: Console) -> None:
    """Refusals and scores of the original, the ablated model and the control."""
    from abliterate.report.assemble import rate_part

    table = Table(title="Ablated at inference time, harmful prompts held out", title_justify="left")
    for column in ("", "refused", "bypass ↓", "induce ↑", "KL"):
        table.add_column(column)
    induce = "unknown layer" if result.induce is None else f"{result.induce:.2f}"
    rows = (
        ("no intervention", result.before, result.bypass_before, f"{result.induce_before:.2f}", "0"),
        ("direction", result.after, result.bypass, induce, f"{result.kl:.3f}"),
        ("random direction", result.control, result.bypass_control, "", ""),
    )
    for name, tally, bypass, induced, kl in rows:
        table.add_row(name, rate(rate_part(tally)), f"{bypass:.2f}", induced, kl)
    console.print(table)
    if result.verified:
        console.print("Verified: without this direction the model stops refusing; without a random one it does not.")


#: What a comparison may find wrong, in words.
_WRONG = {
    "damaged": "differ outside the plan",
    "reshaped": "have another dtype or shape",
    "missing": "are missing",
    "extra": "are not in the original",
    "headers": "have another header",
    "wrong_hashes": "have another SHA-256 than recorded",
}


def comparison_as_dict(found: Comparison) -> dict[str, Any]:
    """The comparison for machines."""
    integrity = asdict(found.integrity)
    return {
        "intact": found.intact,
        "out": str(found.out),
        "source": str(found.source),
        "not_original": list(found.other_files),
        **integrity,
    }


def show_comparison(found: Comparison, console: Console) -> None:
    """What was compared and what is wrong."""
    integrity = found.integrity
    for field, words in _WRONG.items():
        names: tuple[str, ...] = getattr(integrity, field)
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            console.print(f"[red]{words}:[/] {', '.join(names[:5])}{more}", soft_wrap=True, highlight=False)
    planned = len(integrity.changed) + len(integrity.unchanged)
    console.print(
        f"{planned} tensors in the plan, {len(integrity.changed)} of them changed; "
        f"{len(integrity.sha256)} weight files hashed."
    )
    if found.other_files:
        console.print(f"[red]not the original's:[/] {', '.join(found.other_files)}", soft_wrap=True, highlight=False)
    rewritten = sorted(name for name in found.rewritten if integrity.other_files.get(name) == "different")
    if rewritten:
        console.print(f"Rewritten by the edit: {', '.join(rewritten)}.", soft_wrap=True, highlight=False)
    if found.intact:
        console.print("Verified: every byte outside the plan equals the original's.")


#: What `verify --direction`, which counts refusals, has no use for.
UNUSED_BY_VERIFY = (
    *("thinking", "thinking_tokens", "capability", "tasks", "task_limit", "multiple_choice"),
    *("no_control", "keep_completions"),
)


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
    from abliterate.edit.direction import load_direction

    refuse_set("with verify", evaluating, *UNUSED_BY_VERIFY)
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
    from abliterate.edit import undo as restoring

    found = restoring.compare(out, source, monitor_for(quiet))
    if as_json:
        typer.echo(json.dumps(comparison_as_dict(found), indent=1))
    else:
        show_comparison(found, Console())
    if not found.intact:
        raise GateNotMet(f"{out}: not what its record says; see the list above")
