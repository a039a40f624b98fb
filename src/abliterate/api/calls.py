"""The verbs of the command line as functions: the same words for options, as keyword arguments.

Each also takes the settings of `abliterate.config` that its engine takes, for callers that have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Unpack, overload

from pydantic import BaseModel

from abliterate import pipeline
from abliterate.api.model import DirectionLike, Model, SteeringLike, as_direction, as_vectors, load
from abliterate.api.options import (
    EditOptions,
    EngineOptions,
    EvalOptions,
    FileOptions,
    FindOptions,
    HardenOptions,
    InspectOptions,
    ModelOptions,
    OtherPromptOptions,
    OutputOptions,
    Place,
    PromptOptions,
    Prompts,
    RefusalOptions,
    RepairOptions,
    ReplyOptions,
    SearchOptions,
    SelectOptions,
    SteerOptions,
    ThinkingOptions,
    VerifyOptions,
    WriterOptions,
)
from abliterate.api.progress import progress
from abliterate.api.results import FoundDirection
from abliterate.api.settings import Options
from abliterate.config import (
    ApplySettings,
    EditSettings,
    EngineSettings,
    EvalSettings,
    FileSettings,
    FindSettings,
    HardenSettings,
    InspectSettings,
    MeasureSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RefusalSettings,
    RepairSettings,
    ReplySettings,
    RunSettings,
    SearchSettings,
    SelectSettings,
    SteerSettings,
    ThinkingSettings,
    VerifySettings,
    WriterSettings,
)
from abliterate.config.natural import as_type
from abliterate.edit import undo as undoing
from abliterate.edit.direction import Direction, Site, learnt_by
from abliterate.edit.plan import Plan
from abliterate.edit.steering import SteeringVectors
from abliterate.errors import UsageError
from abliterate.evaluation import compare as comparing
from abliterate.evaluation.judging import Exchange, Verdict
from abliterate.evaluation.judging.calibration import calibrate as calibrate_judge
from abliterate.evaluation.judging.choice import bind_judge, open_judge, opening
from abliterate.evaluation.judging.labelled import label_file
from abliterate.finding import steer as steering
from abliterate.finding.find import Findings
from abliterate.finding.reading import read_texts
from abliterate.forensics import audit as auditing
from abliterate.forensics import harden as hardening
from abliterate.forensics import inspect as inspecting
from abliterate.forensics import repair as repairing
from abliterate.lab.opening import with_direction
from abliterate.model.on_disk import ModelOnDisk
from abliterate.monitor import Monitor
from abliterate.prompts import ContrastiveSet
from abliterate.record import (
    AuditPart,
    CalibrationPart,
    ComparedAnswersPart,
    ComparisonPart,
    EvaluationPart,
    HardeningPart,
    InspectionPart,
    IntegrityPart,
    JudgedPart,
    ReadingPart,
    Record,
    RepairPart,
    SteeringPart,
    UndonePart,
    VerificationPart,
    read_record,
)
from abliterate.report.publish import publish
from abliterate.session import Session, load_contrast, open_model


class RunVerb(
    ModelOptions, PromptOptions, FindOptions, EvalOptions, EditOptions, SearchOptions, OutputOptions, total=False
):
    """Options of `run` and `search`."""

    out: Place


class FindVerb(ModelOptions, PromptOptions, FindOptions, WriterOptions, total=False):
    """Options of `find`."""

    force: bool


class VerifyVerb(ModelOptions, PromptOptions, VerifyOptions, ReplyOptions, EditOptions, total=False):
    """Options of `verify`."""


class ApplyVerb(FileOptions, EditOptions, OutputOptions, total=False):
    """Options of `apply`."""

    out: Place


class EvaluateVerb(ModelOptions, PromptOptions, EvalOptions, EditOptions, EngineOptions, total=False):
    """Options of `evaluate`."""


class CompareVerb(ModelOptions, PromptOptions, EvalOptions, total=False):
    """Options of `compare`."""


class InspectVerb(ModelOptions, PromptOptions, InspectOptions, ReplyOptions, ThinkingOptions, total=False):
    """Options of `inspect`."""


class AuditVerb(ModelOptions, PromptOptions, SelectOptions, ReplyOptions, total=False):
    """Options of `audit`."""


class HardenVerb(ModelOptions, PromptOptions, SelectOptions, EvalOptions, HardenOptions, total=False):
    """Options of `harden`."""


class RepairVerb(ModelOptions, PromptOptions, RefusalOptions, EvalOptions, RepairOptions, total=False):
    """Options of `repair`."""


class LabVerb(ModelOptions, PromptOptions, FindOptions, total=False):
    """Options of `lab`."""


class SteerVerb(ModelOptions, PromptOptions, RefusalOptions, ReplyOptions, SteerOptions, total=False):
    """Options of `steer`."""


class ChatVerb(ModelOptions, EditOptions, total=False):
    """Options of `chat`."""


def run(model: Place | RunSettings, monitor: Monitor | None = None, **options: Unpack[RunVerb]) -> Record:
    """The whole job: find, verify, search, write the edited model to `out`, evaluate; `ab.run("id", out="out")`.

    Raises `GateNotMet` when the model hardly refuses or no direction passes (unless `force`), `UsageError` for an
    `out` that is in the way. Nothing is left behind by a run that fails.
    """
    return pipeline.run(_run_settings("run", model, options), monitor or progress())


def search(
    model: Place | RunSettings, *, resume: bool = False, monitor: Monitor | None = None, **options: Unpack[RunVerb]
) -> Record:
    """The front of refusals against damage, written to `out`: the record, and a direction file for every point.

    With `resume` the trials of a search that was broken off go on. `Model.search` does it with a model in memory.
    """
    return pipeline.search(_run_settings("search", model, options), resume=resume, monitor=monitor or progress())


def _run_settings(verb: str, model: Place | RunSettings, options: RunVerb) -> RunSettings:
    given = Options(verb, options)
    if isinstance(model, RunSettings):
        given.done()
        return model
    measuring = given.measuring()
    settings = RunSettings(
        model=str(model),
        **dict(measuring),
        editing=given.take(EditSettings),
        searching=given.take(SearchSettings),
        output=given.take(OutputSettings) if "out" in options else None,
    )
    given.done()
    return settings


def find(
    model: Place | Model | Session,
    settings: SelectSettings | None = None,
    writers: WriterSettings | None = None,
    *,
    out: Place | None = None,
    overwrite: bool = False,
    **options: Unpack[FindVerb],
) -> Any:
    """The direction of a model, found on harmful and harmless prompts; into the file `out`, if that is given.

    Of a `Session` (see `open_session`) its `Findings`: all candidates, of which `choose` takes one. Raises what
    `Model.find` raises.
    """
    if isinstance(model, Session):
        Options("find", options).done()
        findings: Findings = pipeline.find(model, settings or FindSettings(), writers or WriterSettings())
        return findings
    if settings is not None or writers is not None:
        raise UsageError("find: expected settings only beside a session, found a model; give them as keywords")
    if out is not None and Path(out).exists() and not overwrite:
        raise UsageError(f"find: {out} exists; give another out, or overwrite=True")
    opened, rest = _opened("find", model, options, PromptSettings, FindSettings, WriterSettings)
    found: FoundDirection = opened.find(**rest)
    if out is not None:
        found.save(out)
    return found


@overload
def verify(
    model: Place | Model | Session, direction: DirectionLike, *, site: Site | None = None, **options: Any
) -> VerificationPart: ...
@overload
def verify(model: Place, *, source: Place | None = None) -> IntegrityPart: ...
def verify(
    model: Place | Model | Session,
    direction: DirectionLike | None = None,
    *,
    site: Site | None = None,
    source: Place | None = None,
    **options: Any,
) -> VerificationPart | IntegrityPart:
    """Proof by intervention: without the direction refusals stop, without a random one they do not.

    Of an edited model without a direction: whether its files are the original's but for the edit (`verify_files`).
    Options are those of `VerifyVerb`; beside a `Session` the settings `editing`, `finding` and `replies`.
    """
    if direction is None:
        if isinstance(model, Model | Session):
            raise UsageError("verify: expected a direction, found none")
        Options("verify", options).done()
        return verify_files(model, source)
    chosen = as_direction(direction)
    if isinstance(model, Session):
        return pipeline.verify(model, chosen, site=site, **options)
    kinds = (PromptSettings, VerifySettings, ReplySettings, EditSettings)
    opened, rest = _opened("verify", model, options, *kinds)
    return opened.verify(chosen.at(site), **rest)


def apply(
    model: Place | ModelOnDisk,
    direction: DirectionLike,
    output: OutputSettings | None = None,
    *,
    site: Site | None = None,
    also: Sequence[DirectionLike | tuple[DirectionLike, float]] = (),
    editing: EditSettings | None = None,
    loading: FileSettings | None = None,
    monitor: Monitor | None = None,
    **options: Unpack[ApplyVerb],
) -> Record:
    """Write a model with a direction taken out of its weights to `out`; the model is never loaded.

    `direction` is a file or a direction, and `also` are others, taken out of what is left then: each alone, or with how
    many times the strength. `as_` "gguf", "lora", "gguf-lora" and "control-vector" write these instead. Raises
    `UsageError` when the direction does not fit the model or the edit cannot be held, `AnatomyError` when a writer is
    not known.
    """
    given = Options("apply", options)
    if output is None and "out" not in options:
        raise UsageError("apply: expected an output folder, found none; give out=")
    settings = ApplySettings(
        output=output or given.take(OutputSettings),
        editing=editing or given.take(EditSettings),
        loading=loading or given.take(FileSettings),
    )
    given.done()
    where = model if isinstance(model, ModelOnDisk) else str(model)
    pairs = [one if isinstance(one, tuple | list) and len(one) == 2 else (one, 1.0) for one in also]
    others = [(_file_or_direction(one), float(times)) for one, times in pairs]
    chosen = _file_or_direction(direction)
    return pipeline.apply(where, chosen, settings, site=site, also=others, monitor=monitor or progress())


def _file_or_direction(value: DirectionLike) -> Path | Direction:
    return Path(value) if isinstance(value, str | PathLike) else as_direction(value)


def evaluate(
    model: Place | Model | Session,
    evaluating: EvalSettings | None = None,
    *,
    direction: DirectionLike | None = None,
    site: Site | None = None,
    base: Any = None,
    plan: Plan | None = None,
    **options: Unpack[EvaluateVerb],
) -> EvaluationPart:
    """Replies to held-out prompts: of a model alone, beside its `base`, or before and after a `direction`.

    Prompts that the direction, or the model's own record, was learnt from are left out. `engine` asks vLLM or a server
    instead.
    """
    if isinstance(model, Session):
        Options("evaluate", options).done()
        return pipeline.evaluate(model, evaluating or EvalSettings(), base=base, plan=plan)
    if evaluating is not None or plan is not None:
        raise UsageError("evaluate: expected evaluating and plan only beside a session; give keywords and a direction")
    if base is not None and direction is not None:
        raise UsageError("evaluate: expected a base or a direction, found both")
    if "engine" in options or base is not None:
        if isinstance(model, Model) or direction is not None:
            raise UsageError("evaluate: expected the name of a model, and no direction, with engine or base")
        return _evaluated(str(model), base, options)
    opened, rest = _opened("evaluate", model, options, PromptSettings, EvalSettings, EditSettings)
    return opened.evaluate(None if direction is None else as_direction(direction).at(site), **rest)


def _evaluated(model: str, base: Any, options: EvaluateVerb) -> EvaluationPart:
    """By another engine, or beside a base."""
    given, monitor = Options("evaluate", options), progress()
    loading, prompts, evaluating = given.take(ModelSettings), given.take(PromptSettings), given.take(EvalSettings)
    engine = given.take(EngineSettings)
    given.done()
    if base is None:
        measuring = MeasureSettings(loading=loading, prompts=prompts, evaluating=evaluating)
        return pipeline.evaluate_elsewhere(model, engine, measuring, monitor)
    seen, longest = learnt_by(model), evaluating.longest_reply
    mine, other = (
        pipeline.open_session(
            one, loading=loading, prompts=prompts, learnt_from=seen, reply_tokens=longest, monitor=monitor
        )
        for one in (model, str(base))
    )
    return pipeline.evaluate(mine, evaluating, base=other)


def compare(
    models: Sequence[Any],
    measuring: MeasureSettings | None = None,
    monitor: Monitor | None = None,
    **options: Unpack[CompareVerb],
) -> ComparisonPart:
    """Several models or plans on the same prompts, each set beside the first.

    Each of `models` is MODEL, MODEL+DIRECTION.safetensors, MODEL+ADAPTER_FOLDER or MODEL+random, or a pair of a model
    and a direction.
    """
    given = Options("compare", options)
    measuring = measuring or given.measuring(finding=None)
    given.done()
    named = [spec if isinstance(spec, tuple) else as_type("compare: models", spec, str) for spec in models]
    return comparing.compare(named, measuring, monitor or progress())


def inspect(
    model: Place,
    settings: InspectSettings | None = None,
    measuring: MeasureSettings | None = None,
    monitor: Monitor | None = None,
    **options: Unpack[InspectVerb],
) -> InspectionPart:
    """Whether directions were taken out of a model's weights: which, where, how strongly.

    With `base`, the model it was made from, tensor by tensor. Without it only strong traces can be seen; a `verdict`
    of "no trace" is not `decided`.
    """
    given = Options("inspect", options)
    settings = settings or given.take(InspectSettings)
    measuring = measuring or given.measuring(finding=None, evaluating=ReplySettings, more=ThinkingSettings)
    given.done()
    return inspecting.inspect(str(model), settings, measuring, monitor or progress())


def audit(
    model: Place,
    measuring: MeasureSettings | None = None,
    *,
    out: Place | None = None,
    monitor: Monitor | None = None,
    **options: Unpack[AuditVerb],
) -> AuditPart:
    """How brittle a model's refusal is: what is left of it as more is taken out, and what that costs."""
    given = Options("audit", options)
    measuring = measuring or given.measuring(finding=SelectSettings, evaluating=ReplySettings)
    given.done()
    return auditing.audit(str(model), measuring, out=None if out is None else Path(out), monitor=monitor or progress())


def harden(
    model: Place,
    out: Place | None = None,
    settings: HardenSettings | None = None,
    measuring: MeasureSettings | None = None,
    *,
    overwrite: bool = False,
    monitor: Monitor | None = None,
    **options: Unpack[HardenVerb],
) -> HardeningPart:
    """Write the model to `out` with its refusal spread over several directions, audited before and after."""
    given = Options("harden", options)
    settings = settings or given.take(HardenSettings)
    measuring = measuring or given.measuring(finding=SelectSettings, evaluating=EvalSettings)
    given.done()
    place = _place("harden", out)
    return hardening.harden(str(model), place, settings, measuring, overwrite=overwrite, monitor=monitor or progress())


def repair(
    model: Place,
    out: Place | None = None,
    settings: RepairSettings | None = None,
    measuring: MeasureSettings | None = None,
    *,
    overwrite: bool = False,
    monitor: Monitor | None = None,
    **options: Unpack[RepairVerb],
) -> RepairPart:
    """Write the model to `out` with its refusals given back: exactly by undo file, `base` or `adapter`, else nearly."""
    given = Options("repair", options)
    settings = settings or given.take(RepairSettings)
    measuring = measuring or given.measuring(finding=RefusalSettings, evaluating=EvalSettings)
    given.done()
    place = _place("repair", out)
    return repairing.repair(str(model), place, settings, measuring, overwrite=overwrite, monitor=monitor or progress())


def undo(
    out: Place,
    *,
    target: Place | None = None,
    source: Place | None = None,
    confirm: Callable[[Path], bool] | None = None,
    monitor: Monitor | None = None,
) -> UndonePart:
    """Take back the edit of the model in `out`, in place or into the new folder `target` (see `edit.undo.undo`)."""
    places = {"target": target, "source": source}
    into = {name: None if place is None else Path(place) for name, place in places.items()}
    return undoing.undo(Path(out), **into, confirm=confirm, monitor=monitor or progress())


def verify_files(out: Place, source: Place | None = None, monitor: Monitor | None = None) -> IntegrityPart:
    """Compare the files in `out` with those of the original, byte by byte (see `edit.undo.verify_files`)."""
    return undoing.verify_files(Path(out), None if source is None else Path(source), monitor or progress())


def chat(
    model: Place | Model,
    direction: DirectionLike | None = None,
    prompt: str | Sequence[str] = (),
    *,
    site: Site | None = None,
    max_new_tokens: int = 200,
    **options: Unpack[ChatVerb],
) -> list[ComparedAnswersPart]:
    """Answers of the original and of the ablated model to the same prompts, side by side.

    Without a direction `model` is what `run` or `apply` wrote: its record knows the original and the direction.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UsageError("chat: expected a prompt or several, found none; give prompt=")
    given = Options("chat", options)
    editing, loading = given.take(EditSettings), given.take(ModelSettings)
    given.done()
    if direction is None:
        if isinstance(model, Model):
            raise UsageError("chat: expected a direction, found none")
        monitor = progress()
        with monitor.phase("find model"):
            known = with_direction(str(model), None, loading)
        opened, direction = Model(open_model(known.files, known.loading, monitor)), known.direction
    else:
        opened = model if isinstance(model, Model) else load(model, **_set(loading))
    before = opened.answer(prompts, max_new_tokens=max_new_tokens)
    with opened.ablate(as_direction(direction).at(site), **editing.model_dump(exclude_unset=True)):
        after = opened.answer(prompts, max_new_tokens=max_new_tokens)
    return [
        ComparedAnswersPart(prompt=asked, original=one, ablated=other)
        for asked, one, other in zip(prompts, before, after, strict=True)
    ]


@overload
def judge(reply: str, prompt: str = "", *, judge: str = "rules", device: str = "auto") -> Verdict: ...
@overload
def judge(*, replies: Place, judge: str = "rules", device: str = "auto") -> list[JudgedPart]: ...
@overload
def judge(
    *, calibrate: Place, model: str | None = None, set_: str | None = None, judge: str = "rules", device: str = "auto"
) -> CalibrationPart: ...
def judge(
    reply: str | None = None,
    prompt: str = "",
    *,
    replies: Place | None = None,
    calibrate: Place | None = None,
    model: str | None = None,
    set_: str | None = None,
    judge: str = "rules",
    device: str = "auto",
) -> Verdict | list[JudgedPart] | CalibrationPart:
    """The verdict on one reply to a prompt ("" where that is not known); or, of the file `replies`, one for each row.

    `judge` is who reads: rules, learnt, minos, protectai, classifier:ID, llm:MODEL@URL … With `calibrate`, a file of
    labelled replies (of `model`, to the prompts `set_`), it is measured how often it is right, and remembered.

    Raises `UsageError` for none or several of these, and for a judge that cannot be used.
    """
    given = [
        name for name, value in (("reply", reply), ("replies", replies), ("calibrate", calibrate)) if value is not None
    ]
    if len(given) != 1:
        raise UsageError(
            f"judge: expected a reply, replies=FILE or calibrate=FILE, found {' and '.join(given) or 'none'}"
        )
    monitor = progress()
    with opening(judge, monitor):
        chosen = bind_judge(open_judge(judge, device=device), None, monitor)
    if calibrate is not None:
        return calibrate_judge(chosen, Path(calibrate), model, set_)
    if replies is not None:
        return label_file(chosen, Path(replies))
    (verdict,) = chosen.judge([Exchange(prompt, str(reply))])
    return verdict


def open_lab(
    target: Place,
    *,
    direction: Place | None = None,
    port: int | None = None,
    no_browser: bool = False,
    **options: Unpack[LabVerb],
) -> None:
    """The original and the edited model side by side in this machine's browser, until it is interrupted."""
    from abliterate.lab import serve

    given = Options("open_lab", options)
    measuring = given.measuring(evaluating=None)
    given.done()
    file = None if direction is None else Path(direction)
    serve(str(target), measuring, direction=file, port=port, open_browser=not no_browser, monitor=progress())


def show(out: Place) -> Record:
    """The record of what `run`, `search`, `apply` or `audit` wrote; printed or in a notebook it is drawn as tables."""
    return read_record(Path(out))


def push(out: Place, repository: str, *, public: bool = False, force: bool = False) -> str:
    """Upload an edited model with its card and record to the hub; the address. Private unless `public`.

    Raises `GateNotMet` for what was saved past a gate (unless `force`), `AbliterateError` when the hub refuses.
    """
    return publish(Path(out), repository, public=public, force=force, monitor=progress())


def write_report(out: Place) -> Path:
    """Write the record of `out` as one HTML page into it, and say where."""
    from abliterate.report.html import refresh_report

    return refresh_report(Path(out))


def load_prompts(
    harmful: Prompts | None = None, harmless: Prompts | None = None, **options: Unpack[OtherPromptOptions]
) -> ContrastiveSet:
    """The prompts that a verb given the same options uses, in their parts; `ab.load_prompts(limit=32).harmful.train`.

    `harmful` and `harmless` have `train` (directions are made of these), `val` (they are chosen by these) and `test`
    (evaluated on, as is `borderline`); all are tuples of texts. Raises `PromptError` for what cannot be read.
    """
    sides = {name: side for name, side in (("harmful", harmful), ("harmless", harmless)) if side is not None}
    given = Options("load_prompts", {**options, **sides})
    settings = given.take(PromptSettings)
    given.done()
    return load_contrast(settings, progress())


def steer(
    model: Place | Model,
    direction: SteeringLike,
    prompt: str | Sequence[str] = (),
    *,
    site: Site | None = None,
    out: Place | None = None,
    **options: Unpack[SteerVerb],
) -> SteeringPart:
    """Replies to `prompt` (one or several) of the model as it is and steered; without it, behaviour by coefficient.

    That is measured on held-out prompts, and goes into record and report in the folder `out` if that is given.
    `Model.steer` steers a model in memory for whatever runs it, `Model.sweep` gives something to plot.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    name = _named(direction)
    vectors = _vectors(direction, site)
    if isinstance(model, Model) and out is not None:
        raise UsageError("steer: expected the name of a model with out, found a model in memory")
    if not prompts and not isinstance(model, Model):
        given = Options("steer", options)
        settings = given.take(SteerSettings)
        measuring = given.measuring(finding=RefusalSettings, evaluating=ReplySettings)
        given.done()
        place = None if out is None else Path(out)
        return pipeline.steer(str(model), vectors, settings, measuring, name=name, out=place, monitor=progress())
    opened, rest = _opened("steer", model, options, PromptSettings, RefusalSettings, ReplySettings, SteerSettings)
    if not prompts:
        how = {field: rest.pop(field) for field in ("operation", "layers", "tokens") if field in rest}
        doses = SteerSettings(**{field: rest.pop(field) for field in ("coefficient", "coefficients") if field in rest})
        return opened.sweep(vectors, doses.doses, **how, **rest).part
    given = Options("steer", rest)
    settings, replies = given.take(SteerSettings), given.take(ReplySettings)
    longest = replies.max_new_tokens
    return steering.reply(
        opened.opened, vectors, prompts, settings, max_new_tokens=longest, monitor=progress(), name=name
    )


def read(
    model: Place | Model,
    direction: SteeringLike,
    text: Any = None,
    *,
    site: Site | None = None,
    file: Place | None = None,
    layer: int | None = None,
    limit: int = 16,
    out: Place | None = None,
    overwrite: bool = False,
    **options: Unpack[ModelOptions],
) -> ReadingPart:
    """What the stream holds along a direction at every token of a text (see `Model.read`), or of the texts in `file`.

    `out` is a page (.html) to write, with all layers to choose from. Raises `PromptError` for a file that cannot be
    read.
    """
    from abliterate.report.html.reading import check_page, write_reading

    if (text is None) == (file is None):
        raise UsageError("read: expected a text or file, found both or neither")
    if out is not None:
        check_page(Path(out), overwrite=overwrite)
    vectors = _vectors(direction, site)
    texts = [text] if file is None else read_texts(Path(file))
    opened, _ = _opened("read", model, options)
    found: ReadingPart = opened.read(text if file is None else list(texts[:limit]), vectors, layer=layer)
    more: dict[str, Any] = {"left_out": max(0, len(texts) - limit)} if file is not None else {}
    found = found.model_copy(update={**more, "direction": _named(direction)})
    if out is not None:
        write_reading(found, Path(out))
    return found


def _named(direction: SteeringLike) -> str:
    """What a direction is called in results: its file."""
    return str(direction) if isinstance(direction, str | PathLike) else steering.IN_PYTHON


def _vectors(direction: SteeringLike, site: Site | None) -> SteeringVectors:
    """What to steer along; of a direction with candidates, the one at `site`."""
    if site is None:
        return as_vectors(direction)
    if isinstance(direction, str | PathLike):
        return SteeringVectors.load(Path(direction), site)
    if isinstance(direction, Mapping | SteeringVectors):
        raise UsageError("site: expected a direction with candidates, found vectors by layer; leave it out")
    return SteeringVectors.of(as_direction(direction).at(site))


def _place(verb: str, out: Place | None) -> Path:
    if out is None:
        raise UsageError(f"{verb}: expected an output folder, found none; give out=")
    return Path(out)


def _set(settings: BaseModel | None) -> dict[str, Any]:
    """The settings that were given, as keywords."""
    return {} if settings is None else settings.model_dump(exclude_unset=True)


def _opened(verb: str, model: Place | Model, options: Any, *kinds: type[BaseModel]) -> tuple[Model, dict[str, Any]]:
    """The model, loaded by the options for that, and the other options: all of them read before anything is loaded."""
    given = Options(verb, options)
    loading = given.take(ModelSettings)
    given.pop("force", None)
    for kind in kinds:
        given.take(kind)
    given.done()
    if not isinstance(model, Model):
        return load(model, **_set(loading)), {
            name: options[name] for name in options.keys() - ModelSettings.model_fields
        }
    if loading.model_fields_set:
        raise UsageError(
            f"{verb}: {min(loading.model_fields_set)} does nothing for a model that is loaded; leave it out"
        )
    return model, dict(options)
