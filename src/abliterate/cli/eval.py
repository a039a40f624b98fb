"""`abliterate eval`: refusals on held-out prompts, before and after."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
from abliterate.cli.tables import show_evaluation
from abliterate.config import (
    EditSettings,
    EngineSettings,
    EvalSettings,
    ModelSettings,
    PromptSettings,
)
from abliterate.errors import UsageError


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
    from abliterate.edit.direction import learnt_by, load_direction

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
