"""Commands that measure, compare, judge, talk and show, and write no model by themselves."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

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
    EngineSettings,
    EvalSettings,
    FindSettings,
    InspectSettings,
    ModelSettings,
    PromptSettings,
)
from abliterate.errors import GateNotMet, UsageError


@with_settings(ModelSettings, PromptSettings, EditSettings, EvalSettings, EngineSettings)
def evaluate(
    loading: ModelSettings,
    prompts: PromptSettings,
    editing: EditSettings,
    evaluating: EvalSettings,
    engine: EngineSettings,
    /,
    *,
    model: Model,
    base: Annotated[
        str | None, typer.Option(help="A model to compare with (loaded beside it).", show_default=False)
    ] = None,
    direction: OptionalDirection = None,
    site: SiteOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Refusals on held-out prompts; with --base, --direction, or an engine's edited model also what changed."""
    from abliterate import pipeline
    from abliterate.cli.evaluating import show_evaluation
    from abliterate.directions import learnt_by, load_direction

    if direction is None:
        refuse_idle("eval without --direction", editing, site)
    if base is not None and direction is not None:
        raise UsageError("--base and --direction: expected one of them, found both")
    monitor, elsewhere = monitor_for(quiet), engine.engine != "transformers"
    if elsewhere:
        _refuse_with_engine(engine, loading, evaluating, base, direction)
        evaluation = pipeline.evaluate_elsewhere(
            model, engine, loading=loading, prompts=prompts, evaluating=evaluating, monitor=monitor
        )
    else:
        refuse_idle("eval without --engine", engine)
        loaded = None if direction is None else load_direction(direction)
        chosen = site_of(site)
        seen = learnt_by(model) if loaded is None else loaded.learnt_from
        opened = functools.partial(
            pipeline.open_session, loading=loading, prompts=prompts, learnt_from=seen, monitor=monitor
        )
        session, other = opened(model), None if base is None else opened(base)
        plan = None
        if loaded is not None:
            plan = session.plan(pipeline.at_site(loaded, chosen, session.anatomy.d_model), editing)
        evaluation = pipeline.evaluate(session, evaluating, base=other, plan=plan, editing=editing, seed=prompts.seed)
    part = pipeline.evaluation_part(evaluation)
    if as_json:
        settings = {"loading": loading, "prompts": prompts, "evaluating": evaluating}
        whole = {
            "model": model,
            "versions": pipeline.versions(),
            "settings": {name: value.model_dump(mode="json") for name, value in settings.items()},
            "evaluation": part.model_dump(mode="json"),
        }
        typer.echo(json.dumps(whole, indent=1))
    else:
        show_evaluation(part, Console())


def _refuse_with_engine(
    engine: EngineSettings,
    loading: ModelSettings,
    evaluating: EvalSettings,
    base: str | None,
    direction: Path | None,
) -> None:
    """What needs the live model cannot be had from another engine."""
    if base is not None or direction is not None:
        raise UsageError(
            f"--engine {engine.engine}: expected no --base or --direction; write the edit with 'abliterate apply' and "
            "give --edited (vllm) or --served-edited (a server)"
        )
    idle = ("early_stop", "capability", "tasks", "task_limit", "multiple_choice", "no_control", "no_cache")
    refuse_set(f"with --engine {engine.engine}", evaluating, *idle)
    refuse_set(f"with --engine {engine.engine}", loading, "dtype", "device", "batch_size", "quantization", "max_leak")


@with_settings(InspectSettings, ModelSettings, PromptSettings, EvalSettings)
def inspect(
    inspecting: InspectSettings,
    loading: ModelSettings,
    prompts: PromptSettings,
    evaluating: EvalSettings,
    /,
    *,
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, .gguf, .safetensors file or shard.", show_default=False)
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Was a direction taken out of this checkpoint? Which, where, how strongly? Exit code 3 when it was."""
    if not (inspecting.activations or inspecting.behavioural):
        refuse_idle("inspect without --activations or --behavioural", prompts)
    if not inspecting.behavioural:
        refuse_idle("inspect without --behavioural", evaluating)
    from abliterate import inspecting as inspection
    from abliterate.cli.inspecting import show_inspection

    part, _ = inspection.inspect(
        model, inspecting, loading=loading, prompts=prompts, evaluating=evaluating, monitor=monitor_for(quiet)
    )
    if as_json:
        typer.echo(part.model_dump_json(indent=1))
    else:
        show_inspection(part, Console())
    if part.verdict == "altered":
        raise typer.Exit(GateNotMet.exit_code)


@with_settings(ModelSettings, PromptSettings, FindSettings, EvalSettings)
def audit(
    loading: ModelSettings,
    prompts: PromptSettings,
    finding: FindSettings,
    evaluating: EvalSettings,
    /,
    *,
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for record and report.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How brittle is this model's refusal: what is left of it as more is taken out, and what that costs."""
    refuse_set("with audit", evaluating, "keep_completions", "no_control", "capability", "tasks", "task_limit")
    refuse_set("with audit", finding, "subspace", "rank")
    from abliterate import auditing
    from abliterate.cli.auditing import show_audit

    part, session = auditing.audit(
        model, loading=loading, prompts=prompts, finding=finding, evaluating=evaluating, monitor=monitor_for(quiet)
    )
    if out is not None:
        auditing.write_audit(part, session, out)
    if as_json:
        typer.echo(part.model_dump_json(indent=1))
    else:
        show_audit(part, Console())


@with_settings(ModelSettings, PromptSettings, EvalSettings)
def compare(
    loading: ModelSettings,
    prompts: PromptSettings,
    evaluating: EvalSettings,
    /,
    *,
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two or more of MODEL, MODEL+DIRECTION.safetensors, MODEL+ADAPTER_FOLDER, MODEL+random (a control); "
            "the first is the reference.",
            show_default=False,
        ),
    ],
    csv: Annotated[Path | None, typer.Option(help="Also write the table to this file.", show_default=False)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Several models or plans side by side on the same prompts, each compared with the first."""
    if csv is not None and (csv.is_dir() or not csv.absolute().parent.is_dir()):
        raise UsageError(f"--csv {csv}: expected a file in a folder that exists")
    refuse_set("with compare", evaluating, "no_control", "keep_completions")
    from abliterate import comparing
    from abliterate.cli import comparison

    monitor = monitor_for(quiet)
    found = comparing.compare(models, loading=loading, prompts=prompts, evaluating=evaluating, monitor=monitor)
    result = comparison.as_dict(found)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        comparison.show(result, Console())
    if csv is not None:
        partial = csv.with_name(f".{csv.name}.partial")
        partial.write_text(comparison.as_csv(result), encoding="utf-8")
        partial.replace(csv)


def judge(
    *,
    replies: Annotated[
        Path | None,
        typer.Argument(help="Replies to judge: .csv or .jsonl with prompt, response.", show_default=False),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Labelled replies: .csv or .jsonl with prompt, response, label.", show_default=False),
    ] = None,
    spec: Annotated[str, typer.Option("--judge", help="rules, classifier:ID, or llm:MODEL@URL.")] = "rules",
    errors: Annotated[bool, typer.Option(help="List the replies that it calls otherwise than labelled.")] = False,
    device: Annotated[str, typer.Option(help="Where a classifier runs: auto, cpu, cuda …")] = "auto",
    as_json: Json = False,
) -> None:
    """Judge replies in a file; or, with --calibrate, measure how often a judge is right and remember it."""
    if (replies is None) == (calibrate is None):
        raise UsageError("judge: expected a file of replies, or --calibrate FILE; found both or neither")
    from abliterate.cli import judging as shown
    from abliterate.judging import calibration
    from abliterate.judging.choice import open_judge

    if replies is not None:
        rows = shown.label_file(open_judge(spec, device=device), replies)
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False) if as_json else shown.as_csv(rows), nl=as_json)
        return
    if calibrate is None:
        return
    labelled = calibration.read_labelled(calibrate)
    chosen = open_judge(spec, device=device)
    verdicts = chosen.judge(labelled.exchanges)
    result = calibration.compare(chosen, labelled, verdicts, calibrate)
    replaced = calibration.calibration_of(chosen)
    stored = calibration.store(result)
    if as_json:
        typer.echo(json.dumps(shown.calibration_as_dict(result, stored), indent=1))
        return
    shown.show_calibration(result, Console(), stored)
    if replaced is not None:
        text = f"It takes the place of the one on {replaced.source}; remove that file to have the built-in one again."
        Console().print(text, highlight=False, soft_wrap=True)
    if errors:
        shown.show_errors(labelled, verdicts, Console())


@with_settings(ModelSettings, EditSettings)
def chat(
    loading: ModelSettings,
    editing: EditSettings,
    /,
    *,
    model: Model,
    direction: DirectionFile,
    site: SiteOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 200,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Answer this and end; may be given several times.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The original's and the ablated model's answer to the same prompt, side by side."""
    from abliterate import pipeline
    from abliterate.cli.chat import converse
    from abliterate.directions import load_direction
    from abliterate.variants import plan_for

    loaded = load_direction(direction)
    chosen = site_of(site)
    live, renderer, anatomy = pipeline.open_model(model, loading, monitor_for(quiet))
    plan = plan_for(anatomy, pipeline.at_site(loaded, chosen, anatomy.d_model), editing)
    converse(live, renderer, plan, prompt, max_new_tokens, as_json=as_json)


def show(
    out: Annotated[Path, typer.Argument(help="What `run`, `apply` or `search` wrote.", show_default=False)],
    as_json: Json = False,
) -> None:
    """What an OUT's record says, as tables: nothing is loaded or measured."""
    from abliterate.record import read_record

    record = read_record(out)
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
        return
    from abliterate.cli.showing import show_record

    show_record(record, Console())


@with_settings(ModelSettings, PromptSettings, FindSettings)
def lab(
    loading: ModelSettings,
    prompts: PromptSettings,
    finding: FindSettings,
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

    serve(
        target,
        loading=loading,
        prompts=prompts,
        finding=finding,
        direction=direction,
        port=port,
        open_browser=not no_browser,
        monitor=monitor_for(quiet=False),
    )


def report(
    out: Annotated[Path, typer.Argument(help="What `run`, `apply` or `search` wrote.", show_default=False)],
    as_json: Json = False,
) -> None:
    """One HTML page that tells what an OUT's record says, written into it; nothing is loaded or measured."""
    from abliterate.record import read_record

    record = read_record(out)
    from abliterate.report import write_report

    path = write_report(record, out)
    if as_json:
        typer.echo(json.dumps({"report": str(path)}))
    else:
        Console().print(f"Report: [bold]{escape(str(path))}[/]", highlight=False, soft_wrap=True)
