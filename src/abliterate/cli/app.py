"""The commands. Each parses its options into settings, calls the pipeline, and prints what came back."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import BaseModel
from rich.console import Console

from abliterate.cli.options import flag_of, with_settings
from abliterate.config import (
    EditSettings,
    EngineSettings,
    EvalSettings,
    FileSettings,
    FindSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RunSettings,
    SearchSettings,
)
from abliterate.errors import AbliterateError, GateNotMet, UsageError

if TYPE_CHECKING:
    from abliterate.monitor import Monitor

app = typer.Typer(
    name="abliterate",
    help="Find, prove and edit behavioural directions in open-weight language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: What `verify --direction`, which counts refusals, has no use for.
_UNUSED_BY_VERIFY = (
    *("thinking", "thinking_tokens", "capability", "tasks", "task_limit", "multiple_choice"),
    *("no_control", "keep_completions"),
)

#: What `search`, which judges refusals and edits nothing, has no use for.
_UNUSED_BY_SEARCH = ("early_stop", *_UNUSED_BY_VERIFY)

Model = Annotated[str, typer.Argument(help="Hub id, folder with safetensors, or .gguf file.", show_default=False)]
DirectionFile = Annotated[
    Path, typer.Option("--direction", help="A direction file (.safetensors).", show_default=False)
]
OptionalDirection = Annotated[
    Path | None, typer.Option("--direction", help="A direction file to ablate with hooks.", show_default=False)
]
SiteOption = Annotated[
    str | None,
    typer.Option("--site", help="LAYER:POSITION of a candidate in the file, e.g. 14:-1.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def _version(show: bool) -> None:
    if show:
        from abliterate import __version__

        typer.echo(f"abliterate {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find, prove and edit behavioural directions in open-weight language models."""


@app.command()
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
    _refuse_set("with run", searching, "resume")
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
    record = pipeline.run(settings, _monitor(quiet))
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        show_run(record, Console())


@app.command()
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
    _refuse_set("with search", evaluating, *_UNUSED_BY_SEARCH)
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
    record = pipeline.search(settings, _monitor(quiet))
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


@app.command()
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
    _refuse_idle("find", EditSettings(**editing.model_dump(exclude=chooses)))
    from abliterate import pipeline
    from abliterate.cli.screen import show_selection
    from abliterate.directions import save_direction

    session = pipeline.open_session(
        model, loading=loading, prompts=prompts, positions=finding.positions, monitor=_monitor(quiet)
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


@app.command()
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
        _refuse_idle("verify OUT", loading, prompts, finding, editing, evaluating, site)
        _verify_files(Path(model), source, as_json=as_json, quiet=quiet)
        return
    if source is not None:
        raise UsageError("--source: expected an OUT to compare with it, found --direction")
    from abliterate import pipeline
    from abliterate.cli.verification import as_dict, show
    from abliterate.directions import load_direction

    _refuse_set("with verify", evaluating, *_UNUSED_BY_VERIFY)
    loaded = load_direction(direction)
    chosen = _site(site)
    session = pipeline.open_session(
        model,
        loading=loading,
        prompts=prompts,
        positions=finding.positions,
        learnt_from=loaded.learnt_from,
        monitor=_monitor(quiet),
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


@app.command()
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
        site=_site(site),
        editing=editing,
        loading=loading,
        monitor=_monitor(quiet),
    )
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        show_run(record, Console())


@app.command(name="eval")
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
        _refuse_idle("eval without --direction", editing, site)
    if base is not None and direction is not None:
        raise UsageError("--base and --direction: expected one of them, found both")
    monitor, elsewhere = _monitor(quiet), engine.engine != "transformers"
    if elsewhere:
        _refuse_with_engine(engine, loading, evaluating, base, direction)
        evaluation = pipeline.evaluate_elsewhere(
            model, engine, loading=loading, prompts=prompts, evaluating=evaluating, monitor=monitor
        )
    else:
        _refuse_idle("eval without --engine", engine)
        loaded = None if direction is None else load_direction(direction)
        chosen = _site(site)
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


@app.command()
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
    _refuse_set("with compare", evaluating, "no_control", "keep_completions")
    from abliterate import comparing
    from abliterate.cli import comparison

    found = comparing.compare(models, loading=loading, prompts=prompts, evaluating=evaluating, monitor=_monitor(quiet))
    result = comparison.as_dict(found)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        comparison.show(result, Console())
    if csv is not None:
        partial = csv.with_name(f".{csv.name}.partial")
        partial.write_text(comparison.as_csv(result), encoding="utf-8")
        partial.replace(csv)


@app.command()
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


@app.command()
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
    chosen = _site(site)
    live, renderer, anatomy = pipeline.open_model(model, loading, _monitor(quiet))
    plan = plan_for(anatomy, pipeline.at_site(loaded, chosen, anatomy.d_model), editing)
    converse(live, renderer, plan, prompt, max_new_tokens, as_json=as_json)


@app.command()
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


@app.command()
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

    undone = restoring.undo(out, target=target, source=source, monitor=_monitor(quiet))
    if as_json:
        typer.echo(json.dumps(undone_as_dict(undone), indent=1))
    else:
        show_undone(undone, Console())


def _verify_files(out: Path, source: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Compare an OUT with its original, byte by byte."""
    from abliterate.record import FILE_NAME

    if not (out / FILE_NAME).is_file():
        raise UsageError(f"verify {out}: expected --direction FILE, or an OUT that holds {FILE_NAME}; found neither")
    from abliterate import restoring
    from abliterate.cli.verification import comparison_as_dict, show_comparison

    found = restoring.compare(out, source, _monitor(quiet))
    if as_json:
        typer.echo(json.dumps(comparison_as_dict(found), indent=1))
    else:
        show_comparison(found, Console())
    if not found.intact:
        raise GateNotMet(f"{out}: not what its record says; see the list above")


def _refuse_idle(command: str, *given: BaseModel | str | None) -> None:
    """Options that would do nothing are an error."""
    for settings in given:
        if isinstance(settings, BaseModel):
            _refuse_set(f"in {command}", settings, *settings.model_fields_set)
        elif settings is not None:
            raise UsageError(f"--site: does nothing in {command}; leave it out")


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
    _refuse_set(f"with --engine {engine.engine}", evaluating, *idle)
    _refuse_set(f"with --engine {engine.engine}", loading, "dtype", "device", "batch_size", "quantization", "max_leak")


def _refuse_set(where: str, settings: BaseModel, *names: str) -> None:
    """Some of the settings would do nothing there."""
    for name in names:
        if getattr(settings, name) != type(settings).model_fields[name].default:
            raise UsageError(f"{flag_of(name)}: does nothing {where}; leave it out")


def _site(option: str | None) -> tuple[int, int] | None:
    if option is None:
        return None
    layer, colon, position = option.partition(":")
    if not colon or not layer.isdecimal() or not position.removeprefix("-").isdecimal() or int(position) >= 0:
        raise UsageError(f"--site {option}: expected LAYER:POSITION with a negative position, e.g. 14:-1")
    return int(layer), int(position)


def _monitor(quiet: bool) -> Monitor:
    if quiet:
        from abliterate.monitor import Monitor

        return Monitor()
    from abliterate.cli.screen import Screen

    return Screen(Console(stderr=True))


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 usage, 3 a gate was not met, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
    except AbliterateError as error:
        _say(str(error), error.exit_code)
    except typer.Abort:
        _say("interrupted", 130)
    except KeyboardInterrupt:
        _say("interrupted", 130)
    except BrokenPipeError:  # `… | head`
        os._exit(1)
    except OSError as error:
        _say(f"{error.filename or 'file'}: {error.strerror or error}", 1)
    except Exception as error:
        _unexpected(error)
    if code == 130:  # newer versions of typer catch the interrupt themselves and say nothing
        _say("interrupted", code)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _unexpected(error: Exception) -> NoReturn:
    """Usage errors of the parser are one line like all others; anything else is a fault of ours and shows where."""
    usage: Any = typer.BadParameter.__base__  # click's, which newer versions of typer bring along under another name
    if isinstance(error, usage):
        message = error.format_message()
        _say(message, error.exit_code) if message.strip() else sys.exit(error.exit_code)  # no message: help was shown
    raise error


def _say(text: str, code: int) -> NoReturn:
    label = "not done" if code == GateNotMet.exit_code else "error"
    print(f"{label}: {' '.join(text.split())}", file=sys.stderr)  # noqa: T201 - rich would wrap the one line
    sys.exit(code)
