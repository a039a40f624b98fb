"""`abliterate eval`: refusals on held-out prompts, before and after."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli.arguments import (
    Json,
    Model,
    OptionalDirection,
    Quiet,
    SiteOption,
    monitor_for,
    refuse_idle,
    refuse_set,
    say,
    site_of,
)
from abliterate.cli.options import with_settings
from abliterate.config import (
    CapabilitySettings,
    EditSettings,
    EngineSettings,
    EvalSettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
)
from abliterate.errors import UsageError
from abliterate.report.tables.evaluation import show_evaluation

if TYPE_CHECKING:
    from abliterate.monitor import Monitor
    from abliterate.record import EvaluationPart


@dataclass(frozen=True, slots=True)
class _Groups:
    loading: ModelSettings
    prompts: PromptSettings
    editing: EditSettings
    evaluating: EvalSettings
    engine: EngineSettings


@with_settings
def evaluate(
    given: _Groups,
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
    if direction is None:
        refuse_idle("eval without --direction", given.editing, site)
    if base is not None and direction is not None:
        raise UsageError("--base and --direction: expected one of them, found both")
    from abliterate.record import EvaluatedPart, versions

    measuring = MeasureSettings(loading=given.loading, prompts=given.prompts, evaluating=given.evaluating)
    if given.engine.engine != "transformers":
        part = _elsewhere(model, given, measuring, base or direction, monitor_for(quiet))
    else:
        refuse_idle("eval without --engine", given.engine)
        part = _here(model, given, base, (direction, site), monitor_for(quiet))
    asked = measuring.model_dump(mode="json", exclude={"finding"})
    result = EvaluatedPart(model=model, versions=versions(), settings=asked, evaluation=part)
    say(result, lambda one, console: show_evaluation(one.evaluation, console), as_json)


def _here(
    model: str, given: _Groups, base: str | None, edit: tuple[Path | None, str | None], monitor: Monitor
) -> EvaluationPart:
    """By the live model: alone, beside a base, or under hooks."""
    from abliterate import pipeline
    from abliterate.edit.direction import learnt_by, load_direction
    from abliterate.evaluation.examine import exam_of

    exam_of(given.evaluating, given.prompts.seed)  # what is wrong with its files is said before a model is loaded
    direction, site = edit
    loaded = None if direction is None else load_direction(direction)
    seen = learnt_by(model) if loaded is None else loaded.learnt_from
    opened = functools.partial(
        pipeline.open_session,
        loading=given.loading,
        prompts=given.prompts,
        learnt_from=seen,
        reply_tokens=given.evaluating.longest_reply,
        monitor=monitor,
    )
    session, other = opened(model), None if base is None else opened(base)
    plan = None
    if loaded is not None:
        plan = session.plan(loaded.at(site_of(site), session.anatomy.d_model), given.editing)
    return pipeline.evaluate(session, given.evaluating, base=other, plan=plan)


def _elsewhere(
    model: str, given: _Groups, measuring: MeasureSettings, edited: str | Path | None, monitor: Monitor
) -> EvaluationPart:
    """By another engine: what needs the live model cannot be had from it."""
    where = f"with --engine {given.engine.engine}"
    if edited is not None:
        raise UsageError(
            f"--engine {given.engine.engine}: expected no --base or --direction; write the edit with 'abliterate "
            "apply' and give --edited (vllm) or --served-edited (a server)"
        )
    refuse_set(where, given.evaluating, "early_stop", *CapabilitySettings.model_fields, "no_control", "no_cache")
    refuse_set(where, given.loading, "dtype", "device", "parallel", "batch_size", "quantization", "max_leak")
    from abliterate import pipeline

    return pipeline.evaluate_elsewhere(model, given.engine, measuring, monitor)
