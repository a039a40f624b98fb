"""The stages in order; the command line and the Python API call them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from torch.nn.functional import normalize

from abliterate import record as rec
from abliterate.config import (
    ApplySettings,
    EditSettings,
    EngineSettings,
    EvalSettings,
    FileSettings,
    MeasureSettings,
    OutputSettings,
    RunSettings,
    SteerSettings,
)
from abliterate.edit.direction import Direction, Site, learnt_by, load_direction, save_direction
from abliterate.edit.hooks import addition
from abliterate.edit.options import plan_for
from abliterate.edit.plan import Plan, compose
from abliterate.edit.steering import SteeringVectors
from abliterate.edit.weights import weights_from
from abliterate.edit.write import (
    EditTarget,
    Realised,
    check_output_options,
    check_realisation,
    dry_run_plan,
    opened,
    realise,
    realised_elsewhere,
    refuse,
    untied,
)
from abliterate.errors import UsageError
from abliterate.evaluation.answering import ModelState, as_loaded
from abliterate.evaluation.engines import Pair, open_engine, states_of
from abliterate.evaluation.examine import (
    Exam,
    Examiner,
    chosen_decoding,
    control_of,
    exam_of,
    examine,
    examine_engine,
    examiner_of,
    ready_judge,
)
from abliterate.evaluation.judging import Judge
from abliterate.evaluation.judging.choice import bind_judge
from abliterate.evaluation.parts import evaluation_part
from abliterate.evaluation.probe import Probe
from abliterate.files.checkpoint import DIRECTION, FRONT, check_output
from abliterate.files.checkpoint import JOURNAL as JOURNAL
from abliterate.files.local import reserved
from abliterate.finding.find import (
    Findings,
    Found,
    best_separated,
    check_planned,
    choose,
    find,
    find_or_force,
    know_judge,
    projections,
)
from abliterate.finding.parts import point_file, save_points, search_part, separation_part, with_origin_of
from abliterate.finding.search import Search, check_search, evaluated, held_out, method_of, trials_in
from abliterate.finding.search import search as find_front
from abliterate.finding.steer import IN_PYTHON, sweep
from abliterate.finding.verify import say_caveat, verify
from abliterate.model.anatomy import Anatomy
from abliterate.model.batches import share_prefixes
from abliterate.model.generation import end_tokens
from abliterate.model.loading import load, load_tokenizer
from abliterate.model.on_disk import ModelOnDisk
from abliterate.monitor import Monitor, ranks
from abliterate.prompts import build_contrastive_set, load_behaviour
from abliterate.report.assemble import (
    anatomy_part,
    build_record,
    check_beside,
    check_results,
    model_part,
    session_model,
    session_record,
    source_hashes,
    with_hashes,
    write_all,
    write_beside,
    write_record_and_report,
    written_parts,
)
from abliterate.report.html import FILE_NAME as REPORT
from abliterate.session import (
    Session,
    load_contrast,
    locate_model,
    open_session,
    renderer_of,
    warn_of_files,
    warn_of_leaks,
)


def run(settings: RunSettings, monitor: Monitor | None = None) -> rec.Record:
    """The whole job: find, verify, apply, evaluate. OUT appears only when all of it is done.

    Raises `GateNotMet` when the model hardly refuses or no direction passes (unless forced), `UsageError` for an OUT
    that is in the way or an edit that cannot be realised, and the errors of every stage.
    """
    output = _output(settings, "run")
    with ranks.led_alone(lambda: reserved(output.out)):
        return _run(settings, output, monitor or Monitor())


def _run(settings: RunSettings, output: OutputSettings, monitor: Monitor) -> rec.Record:
    exam = exam_of(settings.evaluating, settings.prompts.seed)
    # A fault in a file of prompts is said before a model is fetched.
    behaviour = build_contrastive_set(settings.prompts).behaviour
    method = method_of(settings.searching, settings.finding, settings.editing, output, behaviour=behaviour)
    check_search(settings.searching, method, settings.finding, settings.editing)
    judge = ready_judge(settings.evaluating, behaviour, settings.loading.judge_device, monitor)
    files = _located(settings.model, settings.loading, output, monitor)
    session = _opened(files, settings, monitor)
    judge = bind_judge(judge, as_loaded(session), monitor)
    know_judge(session, judge)
    dry_run_plan(session.anatomy, settings.finding, settings.editing, output)
    done = _found(session, settings, method, judge)
    target = EditTarget(files, session.anatomy, session.named_model, session.loaded)
    if not ranks.leads():
        return _measured_beside(session, done, target, output, judge, exam)
    with opened(output, target, done.plan) as staging:
        written = realise(done.plan, done.direction, target, staging, output, monitor)
        ranks.agreed(str(staging.folder))
        evaluation, done = _evaluated(session, staging.folder, done, written, judge, exam)
        record = _run_record(session, done, written, staging.folder, evaluation)
        direction = with_hashes(done.direction, record)
        save_direction(staging.folder / DIRECTION, direction)
        if done.search is not None:
            save_points(done.search, staging.folder, direction)
        return _told(write_all(record, staging.folder, monitor))


def _measured_beside(
    session: Session, done: _Chosen, target: EditTarget, output: OutputSettings, judge: Judge, exam: Exam
) -> rec.Record:
    """The end of a run in a process that writes nothing: it measures what the one that leads has written.

    Raises `UsageError` where it cannot see that.
    """
    folder = Path(ranks.agreed(""))
    if not folder.is_dir():
        raise UsageError(f"-o {output.out}: expected a folder that all processes see, found none at {folder}")
    written = realised_elsewhere(done.plan, done.direction, target, output)
    _evaluated(session, folder, done, written, judge, exam)
    return _told(None)


def _told(record: rec.Record | None) -> rec.Record:
    """The record, in all of several processes; one that writes nothing has none."""
    text = ranks.agreed("" if record is None else record.model_dump_json())
    return rec.Record.model_validate_json(text) if record is None else record


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What a run edits with, and how it was chosen; `settings` are those that were used in the end."""

    settings: RunSettings
    findings: Findings
    found: Found
    direction: Direction
    plan: Plan
    separation: rec.SeparationPart | None
    search: Search | None


def _found(session: Session, settings: RunSettings, method: str, judge: Judge) -> _Chosen:
    """Find, choose, and search where that is asked for; the plan is what will be written."""
    findings, finding = find_or_force(session, settings)
    settings = settings.model_copy(update={"finding": finding})
    searched, force = method != "closed-form", _output(settings, "run").force
    found = choose(session, findings, finding, force=force, searched=searched)
    separation = _separation(session, findings, found.direction)
    if not searched:
        plan = session.plan(found.direction, settings.editing)
        say_caveat(plan, settings.editing, session.monitor)
        check_planned(session, findings, found, plan, settings)
        return _Chosen(settings, findings, found, found.direction, plan, separation, None)
    result = find_front(session, findings, found.direction, judge, settings, method)
    if settings.searching.held_out == "all":  # the chosen point is evaluated as it was written
        others = [number for number in range(len(result.points)) if number != result.chosen]
        result = held_out(result, _held_out_probe(session, findings, judge, settings), others)
    direction = _from_search(result, found.direction)
    return _Chosen(settings, findings, found, direction, session.plan(direction), separation, result)


def _held_out_probe(session: Session, findings: Findings, judge: Judge, settings: RunSettings) -> Probe:
    return Probe(session, findings.ids, "test", judge, settings.evaluating)


def _from_search(result: Search, start: Direction) -> Direction:
    """The chosen point, with the candidates and the origin of the direction that the search began with."""
    return replace(with_origin_of(result.point.direction, start), candidates=start.candidates)


def _run_record(
    session: Session, done: _Chosen, written: Realised, folder: Path, evaluation: rec.EvaluationPart
) -> rec.Record:
    settings = done.settings
    return session_record(
        session,
        settings.model_dump(mode="json"),
        model=session_model(session, source_hashes(written, session.loaded.files)),
        refusal_tokens=list(done.findings.tokens),
        separation=done.separation,
        selection=done.found.selection,
        search=None if done.search is None else search_part(done.search),
        evaluation=evaluation,
        **written_parts(done.plan, written, _output(settings, "run"), settings.editing, folder),
    )


def search(settings: RunSettings, *, resume: bool = False, monitor: Monitor | None = None) -> rec.Record:
    """Find the front of refusals against damage. OUT then holds the record and a direction file for every point.

    Nothing is edited; with `resume` the trials of a search that was broken off go on. Raises what `run` raises,
    `UsageError` for an OUT that is in the way.
    """
    output = _output(settings, "search")
    with ranks.led_alone(lambda: reserved(output.out)):
        if ranks.leads():
            _check_folder(output, resume)
        return _search(settings, output, resume, monitor or Monitor())


def _search(settings: RunSettings, output: OutputSettings, resume: bool, monitor: Monitor) -> rec.Record:
    behaviour = load_behaviour(settings.prompts.behaviour)
    method = method_of(settings.searching, settings.finding, settings.editing, behaviour=behaviour)
    check_search(settings.searching, method, settings.finding, settings.editing)
    judge = ready_judge(settings.evaluating, behaviour, settings.loading.judge_device, monitor)
    session = _opened(settings.model, settings, monitor)
    judge = bind_judge(judge, as_loaded(session), monitor)
    know_judge(session, judge)
    findings = find(session, settings.finding, settings.editing)
    start = best_separated(session, findings, settings.finding)
    separation = _separation(session, findings, start)
    with trials_in(output.out / JOURNAL, resume=resume) as journal:
        result = find_front(session, findings, start, judge, settings, method, journal)
    if settings.searching.held_out != "none":
        numbers = range(len(result.points)) if settings.searching.held_out == "all" else [result.chosen]
        result = held_out(result, _held_out_probe(session, findings, judge, settings), numbers)
    if not ranks.leads():
        return _told(None)
    record = session_record(
        session,
        settings.model_dump(mode="json"),
        refusal_tokens=list(findings.tokens),
        separation=separation,
        search=search_part(result),
        output=str(output.out),
    )
    direction = with_hashes(_from_search(result, start), record)
    save_points(result, output.out, direction)
    save_direction(output.out / DIRECTION, direction)
    points = [point.file for point in record.search.points if point.file] if record.search else []
    return _told(write_record_and_report(record, output.out, monitor, DIRECTION, *points))


def pick(folder: Path, number: int) -> rec.Record:
    """Make another point of a finished search the chosen one, in its record and as its direction.

    Raises `UsageError` when `folder` holds no search, or its record no point of that number.
    """
    record = rec.read_record(folder)
    if record.search is None or record.plan is not None:
        raise UsageError(f"{folder}: expected what `search` wrote, found another record")
    known = [point.number for point in record.search.points]
    if number not in known:
        raise UsageError(f"--pick {number}: expected a point of {folder}, one of {', '.join(map(str, known))}")
    before, other = (load_direction(rec.companion(folder, record, name)) for name in (DIRECTION, point_file(number)))
    search_of = record.search.model_copy(update={"chosen": number, "why": "picked"})
    record = record.model_copy(update={"search": search_of})
    save_direction(folder / DIRECTION, replace(other, facts=before.facts, candidates=before.candidates))
    return write_record_and_report(record, folder, Monitor(), DIRECTION)


def _output(settings: RunSettings, command: str) -> OutputSettings:
    if settings.output is None:
        raise UsageError(f"{command}: expected an output folder, found none; give -o OUT")
    return settings.output


def _located(model: str | ModelOnDisk, loading: FileSettings, output: OutputSettings, monitor: Monitor) -> ModelOnDisk:
    """The model on disk, once it is known that OUT is free and what is asked for can be written."""
    check_output_options(output)
    with monitor.phase("find model"):
        files = model if isinstance(model, ModelOnDisk) else locate_model(model, loading)
        if ranks.leads():  # the others write nothing
            check_output(output.out, overwrite=output.overwrite, source=files.folder)
        check_realisation(files, output)
    return files


def _opened(model: str | ModelOnDisk, settings: RunSettings, monitor: Monitor) -> Session:
    return open_session(
        model,
        loading=settings.loading,
        prompts=settings.prompts,
        positions=settings.finding.positions,
        reply_tokens=settings.evaluating.longest_reply,
        monitor=monitor,
    )


def _separation(session: Session, findings: Findings, direction: Direction) -> rec.SeparationPart | None:
    """How the classes separate where the direction was measured; None of one that does not say where."""
    site = direction.site
    return None if site is None else separation_part(session, findings, site, projections(session, findings, site))


def _check_folder(output: OutputSettings, resume: bool) -> None:
    """Raise `UsageError` for an OUT that holds something, unless it is a search that may be replaced or goes on."""
    out = output.out
    if any(above.is_file() for above in (out, *out.absolute().parents)):
        raise UsageError(f"-o {out}: expected a folder, found a file; give another -o")
    ours = {rec.FILE_NAME, FRONT, JOURNAL, REPORT, DIRECTION}
    inside = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if inside <= ours:
        check_results(out)
    if resume:
        if JOURNAL in inside and inside <= ours and not (out / JOURNAL).is_symlink():
            return
        raise UsageError(f"-o {out}: expected the trials of a search to go on with ({JOURNAL}), found none")
    if inside and (not output.overwrite or not inside <= ours):
        hint = "--overwrite replaces a search" if inside <= ours else "give another -o"
        raise UsageError(f"-o {out}: expected a new or empty folder, found {len(inside)} files; {hint}")


def apply(
    model: str | ModelOnDisk,
    direction: Path | Direction,
    settings: ApplySettings,
    *,
    site: Site | None = None,
    also: Sequence[tuple[Path | Direction, float]] = (),
    monitor: Monitor | None = None,
) -> rec.Record:
    """Write MODEL with a direction taken out of its weights, or what takes it out (`settings.output.realisation`).

    `also` are other directions, each taken out of what is left then, at so many times its strength.
    The model is never loaded, unless its numbers can only be had from a live one (an adapter for quantised weights).

    Raises `UsageError` when the direction does not fit the model or the edit cannot be realised, `AnatomyError` when
    a writer is not known.
    """
    monitor = monitor or Monitor()
    output, editing, loading = settings.output, settings.editing, settings.loading
    with reserved(output.out):
        chosen = _read(direction).at(site)
        others = [(_read(one), times) for one, times in also]
        files = _located(model, loading, output, monitor)
        with monitor.phase("prove that every writer is known"):
            anatomy, skeleton = files.anatomy(loading.max_leak), files.skeleton(loading.max_leak)
        warn_of_files(files, monitor)
        warn_of_leaks(anatomy, monitor)
        plan = _composed(anatomy, chosen, others, editing, monitor)
        say_caveat(plan, editing, monitor)
        refuse(plan, anatomy, output)
        target = EditTarget(files, anatomy, skeleton, None if files.storage.editable else load(files))
        with opened(output, target, plan) as staging:
            done = realise(plan, chosen, target, staging, output, monitor)
            dtype = str(skeleton.config.dtype).removeprefix("torch.")
            record = build_record(
                model_part(files, skeleton, anatomy, dtype=dtype, hashes=source_hashes(done, files)),
                monitor,
                {"model": files.name, **_asked(direction, site, also, settings)},
                anatomy=anatomy_part(anatomy),
                **written_parts(plan, done, output, editing, staging.folder),
            )
            save_direction(staging.folder / DIRECTION, chosen)
            return write_all(record, staging.folder, monitor)


def _read(direction: Path | Direction) -> Direction:
    return direction if isinstance(direction, Direction) else load_direction(direction)


def _composed(
    anatomy: Anatomy,
    first: Direction,
    others: Sequence[tuple[Direction, float]],
    editing: EditSettings,
    monitor: Monitor,
) -> Plan:
    """The plan of the first direction and then of the others, at so many times their strength."""
    plan = plan_for(anatomy, first, editing)
    if not others:
        return plan
    for number, (other, _) in enumerate(others, 2):
        most = float((normalize(first.basis) @ normalize(other.basis).T).abs().max())
        monitor.note(f"directions 1 and {number}: cosine {most:.3f} (0 is none of one in the other)")
    return compose(plan, *(plan_for(anatomy, other, editing, strength=times) for other, times in others))


def _asked(
    direction: Path | Direction,
    site: Site | None,
    also: Sequence[tuple[Path | Direction, float]],
    settings: ApplySettings,
) -> dict[str, object]:
    """What was asked of `apply`, as it stands in the record."""
    more = {"also": {_named(one): times for one, times in also}} if also else {}
    groups = settings.model_dump(mode="json", include={"editing", "output"})
    return {"direction": _named(direction), "site": site, **more, **groups}


def _named(direction: Path | Direction) -> str:
    return "given in Python" if isinstance(direction, Direction) else str(direction)


def evaluate(
    session: Session,
    evaluating: EvalSettings = EvalSettings(),
    *,
    base: Session | None = None,
    plan: Plan | None = None,
) -> rec.EvaluationPart:
    """Answers to held-out prompts of one model; or of two states, before and after, with the shift between them.

    `plan` compares the session's model with itself under hooks, beside a random direction on the same writers;
    `base` with another model of the same tokenizer.

    Raises `UsageError` for both at once, and for a base that reads prompts as other tokens.
    """
    if base is not None and plan is not None:
        raise UsageError("evaluate: expected a base or a plan, found both")
    exam = exam_of(evaluating, session.seed)
    original = as_loaded(base or session, evaluating)
    judge = ready_judge(evaluating, session.prompts.behaviour, session.loading.judge_device, session.monitor)
    examiner = examiner_of(session, evaluating, bind_judge(judge, original, session.monitor))
    if plan is not None:
        edited = ModelState(session, functools.partial(session.ablated, plan))
        control = None if evaluating.no_control else control_of(plan, original)
        return evaluation_part(examine(examiner, exam, original, edited, control))
    if base is None:
        return evaluation_part(examine(examiner, exam, original))
    if base.encoded != session.encoded:
        raise UsageError("--base: expected a model with the same tokenizer and chat template, found another one")
    return evaluation_part(examine(examiner, exam, original, ModelState(session)))


def evaluate_elsewhere(
    model: str, engine: EngineSettings, measuring: MeasureSettings = MeasureSettings(), monitor: Monitor | None = None
) -> rec.EvaluationPart:
    """Answers to held-out prompts by vLLM or a server; MODEL's weights are not loaded here, its tokenizer is.

    Nothing is compared token by token. Raises `UsageError` for what the engine cannot do, `AbliterateError` when a
    server does not answer.
    """
    monitor, loading, evaluating = monitor or Monitor(), measuring.loading, measuring.evaluating
    if ranks.count() > 1:
        raise UsageError(f"--engine {engine.engine}: it has processes of its own; start abliterate without torchrun")
    is_server = engine.engine.startswith(("http://", "https://"))
    if engine.edited if is_server else engine.served or engine.served_edited:
        raise UsageError(
            f"--engine {engine.engine}: expected "
            + ("--served and --served-edited, found --edited" if is_server else "--edited, found names of a server")
        )
    judge = bind_judge(
        ready_judge(evaluating, load_behaviour(measuring.prompts.behaviour), loading.judge_device, monitor),
        None,
        monitor,
    )
    with monitor.phase("find model"):
        files = locate_model(model, loading)
        tokenizer, settings = load_tokenizer(files)
    warn_of_files(files, monitor)
    renderer = renderer_of(tokenizer, loading, monitor)
    seen = learnt_by(str(files.folder)) | learnt_by(str(engine.edited or ""))
    contrast = load_contrast(measuring.prompts, monitor, seen)
    texts = contrast.test_texts
    encoded = share_prefixes({name: renderer.encode(group) for name, group in texts.items()}, share=False)
    decoding = chosen_decoding(settings, evaluating, measuring.prompts.seed, monitor)
    examiner = Examiner(renderer, contrast, texts, encoded, evaluating, judge, monitor, decoding)
    pair = Pair(
        tokenizer,
        end_tokens(SimpleNamespace(generation_config=settings), tokenizer),
        folder=files.folder,
        edited=engine.edited,
        served=engine.served,
        edited_as=engine.served_edited,
    )
    with monitor.phase(f"open engine {engine.engine}"):
        opened_engine = open_engine(engine.engine, pair)
    states = states_of(opened_engine, edited=bool(engine.edited or engine.served_edited))
    return evaluation_part(examine_engine(examiner, opened_engine.name, *states, model=model))


def steer(
    model: str | ModelOnDisk,
    vectors: SteeringVectors,
    settings: SteerSettings = SteerSettings(),
    measuring: MeasureSettings = MeasureSettings(),
    *,
    name: str = IN_PYTHON,
    out: Path | None = None,
    monitor: Monitor | None = None,
) -> rec.SteeringPart:
    """What every coefficient does to held-out prompts (see `finding.steer.sweep`).

    Record and report are written into `out`; a run's that are there get the steering added. Raises `UsageError` when
    `out` cannot be made or holds a record of another version, and for vectors that do not fit the model.
    """
    monitor = monitor or Monitor()
    check_beside(out)
    with contextlib.nullcontext() if out is None else reserved(out):
        session = open_session(
            model,
            loading=measuring.loading,
            prompts=measuring.prompts,
            learnt_from=vectors.learnt_from,
            reply_tokens=measuring.evaluating.max_new_tokens,
            monitor=monitor,
        )
        part = sweep(session, vectors, settings, finding=measuring.finding, replies=measuring.evaluating, name=name)
        if out is not None:
            asked = {"steering": settings.model_dump(mode="json"), **measuring.model_dump(mode="json")}
            write_beside(out, {"steering": part}, lambda: session_record(session, asked, steering=part), monitor)
    return part


def _evaluated(
    session: Session, folder: Path, done: _Chosen, written: Realised, judge: Judge, exam: Exam
) -> tuple[rec.EvaluationPart, _Chosen]:
    """Before: the original weights. After: the tensors that were saved, read back from disk.

    Where no weights were saved, or live ones are quantised or in parts, after is what was written as hooks. Vectors
    that are added have no control. What the evaluation says of the point that a search chose is added to that search.
    """
    plan, evaluating = done.plan, done.settings.evaluating
    unchanged = not evaluating.no_cache

    def examined(base: ModelState, edited: ModelState) -> tuple[rec.EvaluationPart, _Chosen]:
        examiner = examiner_of(session, evaluating, bind_judge(judge, base, session.monitor))
        control = None if evaluating.no_control or written.vectors else control_of(plan, base)
        found, search = examine(examiner, exam, base, edited, control), done.search
        if search is not None and done.settings.searching.held_out != "none":
            search = evaluated(search, Probe(session, done.findings.ids, "test"), (base, edited), found)
        return evaluation_part(found), replace(done, search=search)

    if written.names is None or session.loaded.quantised or session.loaded.partial:
        hooks = functools.partial(_hooked, session, plan, written)
        return examined(ModelState(session, unchanged=unchanged), ModelState(session, hooks))
    with contextlib.ExitStack() as stack:
        with session.monitor.phase("read edited weights back"):
            stack.enter_context(untied(session.model, plan))
            saved = stack.enter_context(weights_from(session.model, folder, plan, written.names))
        return examined(ModelState(session, saved.original, unchanged), ModelState(session))


@contextlib.contextmanager
def _hooked(session: Session, plan: Plan, done: Realised) -> Iterator[None]:
    """The live model with what was written as hooks: vectors that are added, else the plan."""
    with contextlib.ExitStack() as stack:
        if not done.vectors:
            stack.enter_context(session.ablated(plan))
        for layer, vector in done.vectors.items():
            stack.enter_context(addition(session.blocks[layer], vector[None]))
        yield


__all__ = [
    "Findings",
    "Found",
    "Session",
    "apply",
    "choose",
    "evaluate",
    "evaluate_elsewhere",
    "find",
    "open_session",
    "pick",
    "run",
    "search",
    "steer",
    "verify",
]
