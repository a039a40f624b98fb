"""The stages in order; the command line and the Python API call them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from abliterate import record as rec
from abliterate.config import (
    EditSettings,
    EngineSettings,
    EvalSettings,
    FileSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RunSettings,
)
from abliterate.edit.direction import Direction, chosen_site, learnt_by, load_direction, save_direction
from abliterate.edit.hooks import addition
from abliterate.edit.options import plan_for
from abliterate.edit.plan import Plan
from abliterate.edit.weights import weights_from
from abliterate.edit.write import EditTarget, Realised, check_realisation, dry_run_plan, opened, realise, refuse, untied
from abliterate.errors import UsageError
from abliterate.evaluation.engines import Pair, open_engine
from abliterate.evaluation.examine import (
    Evaluation,
    Exam,
    Examiner,
    as_loaded,
    control_of,
    exam_of,
    examine,
    examine_engine,
    examiner_of,
    try_judge,
)
from abliterate.evaluation.judging import Judge
from abliterate.evaluation.judging.choice import open_judge
from abliterate.evaluation.results import Subject
from abliterate.files.checkpoint import bytes_to_write, check_output, ensure_space, left_bytes
from abliterate.finding.find import (
    Findings,
    Found,
    best_separated,
    check_planned,
    choose,
    find,
    find_or_force,
    projections,
)
from abliterate.finding.search import Search, check_search, method_of
from abliterate.finding.search import search as find_front
from abliterate.finding.selection import Site
from abliterate.finding.verify import Verification, at_site, say_caveat, verify
from abliterate.model.batches import share_prefixes
from abliterate.model.generation import end_tokens
from abliterate.model.loading import load, load_tokenizer
from abliterate.monitor import Monitor
from abliterate.prompts import ChatRenderer
from abliterate.prompts.rendering import read_template
from abliterate.report.assemble import (
    FRONT,
    anatomy_part,
    answer_parts,
    behaviour_part,
    command,
    direction_metadata,
    evaluation_part,
    model_part,
    now,
    plan_part,
    point_file,
    rate_part,
    run_record,
    save_points,
    saved_metadata,
    search_metadata,
    search_record,
    selection_part,
    separation_part,
    source_hashes,
    versions,
    write_all,
    write_told,
    written_hashes,
)
from abliterate.report.html import FILE_NAME as REPORT
from abliterate.session import Session, load_contrast, locate_model, open_model, open_session, warn_of_leaks

#: The trials of a black-box search, in OUT.
JOURNAL = "trials.log"


def run(settings: RunSettings, monitor: Monitor | None = None) -> rec.Record:
    """The whole job: find, verify, apply, evaluate. OUT appears only when all of it is done.

    Raises `GateNotMet` when the model hardly refuses or no direction passes (unless forced), `UsageError` for an OUT
    that is in the way or an edit that cannot be realised, and the errors of every stage.
    """
    monitor = monitor or Monitor()
    output = settings.output
    if output is None:
        raise UsageError("run: expected an output folder, found none; give -o OUT")
    judge = open_judge(settings.evaluating.judge, device=settings.loading.device)
    exam = exam_of(settings.evaluating, settings.prompts.seed)
    method = method_of(settings.searching, settings.finding, settings.editing, output)
    check_search(settings.searching, method, settings.finding, settings.editing)
    try_judge(judge, monitor)
    with monitor.phase("find model"):
        files = locate_model(settings.model, settings.loading)
        check_realisation(files, output)
        check_output(output.out, overwrite=output.overwrite, source=files.folder)
        if output.realisation == "weights":
            ensure_space(output.out.parent, bytes_to_write(files.checkpoint) - left_bytes(output.out))
    session = open_session(
        files,
        loading=settings.loading,
        prompts=settings.prompts,
        positions=settings.finding.positions,
        monitor=monitor,
    )
    dry_run_plan(session.anatomy, settings.finding, settings.editing, output)
    findings, finding = find_or_force(session, settings.finding, settings.editing, output.force)
    settings = settings.model_copy(update={"finding": finding})
    searched = method != "closed-form"
    force, seed = output.force, settings.prompts.seed
    found = choose(session, findings, settings.finding, seed=seed, force=force, searched=searched)
    separation = _separation(session, findings, found.direction)
    result = None
    if searched:
        result = _search(session, findings, found.direction, settings, method, judge)
        found = replace(found, direction=replace(result.point.direction, candidates=findings.candidates))
    plan = session.plan(found.direction, EditSettings() if searched else settings.editing)
    if not searched:
        say_caveat(plan, settings.editing, monitor)
        check_planned(session, found, plan, settings.finding, settings.editing, force)
    target = EditTarget(files, session.anatomy, session.named_model, session.loaded)
    with opened(output, target, plan) as staging:
        done = realise(plan, found.direction, target, staging, output, monitor)
        evaluation = evaluation_part(_evaluate(session, staging.folder, plan, done, settings, judge, exam))
        record = run_record(
            session, settings, output, found, plan, done, staging.folder, evaluation, separation, result
        )
        metadata = saved_metadata(session, found, record)
        save_direction(staging.folder / "direction.safetensors", found.direction, metadata=metadata)
        if result is not None:
            save_points(result, staging.folder, metadata)
        write_all(record, staging.folder)
    return record


def search(settings: RunSettings, monitor: Monitor | None = None) -> rec.Record:
    """Find the front of refusals against damage. OUT then holds the record and a direction file for every point.

    Nothing is edited. Raises what `run` raises, `UsageError` for an OUT that is in the way.
    """
    monitor = monitor or Monitor()
    output = settings.output
    if output is None:
        raise UsageError("search: expected an output folder, found none; give -o OUT")
    method = method_of(settings.searching, settings.finding, settings.editing)
    check_search(settings.searching, method, settings.finding, settings.editing)
    _check_folder(output, settings.searching.resume)
    judge = open_judge(settings.evaluating.judge, device=settings.loading.device)
    try_judge(judge, monitor)
    session = open_session(
        settings.model,
        loading=settings.loading,
        prompts=settings.prompts,
        positions=settings.finding.positions,
        monitor=monitor,
    )
    findings = find(session, settings.finding, settings.editing)
    start = best_separated(session, findings, settings.finding, settings.prompts.seed)
    separation = _separation(session, findings, start)
    output.out.mkdir(parents=True, exist_ok=True)
    result = _search(session, findings, start, settings, method, judge, output.out / JOURNAL)
    record = search_record(session, settings, findings, separation, result)
    metadata = search_metadata(session, findings, start, record)
    save_points(result, output.out, metadata)
    chosen = replace(result.point.direction, candidates=findings.candidates)
    save_direction(output.out / "direction.safetensors", chosen, metadata=metadata)
    write_told(record, output.out)
    return record


def pick(folder: Path, number: int) -> rec.Record:
    """Make another point of a finished search the chosen one, in its record and as its direction."""
    record = rec.read_record(folder)
    if record.search is None or record.plan is not None:
        raise UsageError(f"{folder}: expected what `search` wrote, found another record")
    direction = load_direction(folder / "direction.safetensors")
    other = load_direction(folder / point_file(number))
    direction = replace(other, metadata=direction.metadata, candidates=direction.candidates)
    save_direction(folder / "direction.safetensors", direction)
    part = record.search.model_copy(update={"chosen": number, "why": "picked"})
    record = record.model_copy(update={"search": part})
    write_told(record, folder)
    return record


def _separation(session: Session, findings: Findings, direction: Direction) -> rec.SeparationPart | None:
    """Where the direction was measured; None of one that does not say where."""
    site = chosen_site(direction)
    return None if site is None else separation_part(session, findings, site, projections(session, findings, site))


def _search(
    session: Session,
    findings: Findings,
    start: Direction,
    settings: RunSettings,
    method: str,
    judge: Judge,
    journal: Path | None = None,
) -> Search:
    output, finding = settings.output, settings.finding
    return find_front(
        session,
        findings,
        start,
        settings.searching,
        method,
        judge,
        finding=finding,
        editing=settings.editing,
        evaluating=settings.evaluating,
        seed=settings.prompts.seed,
        journal=journal,
        norms=output is None or output.realisation == "weights",
        force=output is not None and output.force,
    )


def _check_folder(output: OutputSettings, resume: bool) -> None:
    """Raise `UsageError` for an OUT that holds something, unless it is a search that may be replaced or goes on."""
    out = output.out
    if any(above.is_file() for above in (out, *out.absolute().parents)):
        raise UsageError(f"-o {out}: expected a folder, found a file; give another -o")
    inside = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = {rec.FILE_NAME, FRONT, JOURNAL, REPORT, "direction.safetensors"}
    if resume:
        if JOURNAL in inside and inside <= ours:
            return
        raise UsageError(f"-o {out}: expected the trials of a search to go on with ({JOURNAL}), found none")
    if not inside:
        return
    if not output.overwrite or not inside <= ours:
        hint = "--overwrite replaces a search" if inside <= ours else "give another -o"
        raise UsageError(f"-o {out}: expected a new or empty folder, found {len(inside)} files; {hint}")
    (out / JOURNAL).unlink(missing_ok=True)


def apply(
    model: str,
    direction: Path,
    output: OutputSettings,
    *,
    site: Site | None = None,
    editing: EditSettings = EditSettings(),
    loading: FileSettings = FileSettings(),
    monitor: Monitor | None = None,
) -> rec.Record:
    """Write MODEL with a direction taken out of its weights, or what takes it out (`output.realisation`).

    The model is never loaded, unless its numbers can only be had from a live one (an adapter for quantised weights).

    Raises `UsageError` when the direction does not fit the model or the edit cannot be realised, `AnatomyError` when
    a writer is not known.
    """
    monitor = monitor or Monitor()
    chosen = at_site(load_direction(direction), site)
    with monitor.phase("find model"):
        files = locate_model(model, loading)
        check_realisation(files, output)
        check_output(output.out, overwrite=output.overwrite, source=files.folder)
    with monitor.phase("know every writer"):
        anatomy, skeleton = files.anatomy(loading.max_leak), files.skeleton(loading.max_leak)
    warn_of_leaks(anatomy, monitor)
    plan = plan_for(anatomy, chosen, editing)
    say_caveat(plan, editing, monitor)
    refuse(plan, anatomy, output)
    loaded = None if files.storage.editable else load(files)
    target = EditTarget(files, anatomy, skeleton, loaded)
    with opened(output, target, plan) as staging:
        done = realise(plan, chosen, target, staging, output, monitor)
        settings = {
            "model": model,
            "direction": str(direction),
            "site": site,
            "editing": editing.model_dump(mode="json"),
            "output": output.model_dump(mode="json"),
        }
        hashes = source_hashes(done, files)
        record = rec.Record(
            created=now(),
            versions=versions(),
            command=command(),
            settings=settings,
            model=model_part(
                files, skeleton, anatomy, str(skeleton.config.dtype).removeprefix("torch."), "none", hashes
            ),
            anatomy=anatomy_part(anatomy),
            plan=plan_part(plan, done, output, editing, staging.folder),
            warnings=monitor.warnings,
            left_out=[] if done.surgery is None else list(done.surgery.files.left_out),
            output=str(output.out),
            output_sha256=written_hashes(done, staging.folder),
            timings_s=monitor.timings(),
            peak_memory_bytes=monitor.peak_bytes,
        )
        save_direction(staging.folder / "direction.safetensors", chosen, metadata=chosen.metadata)
        write_all(record, staging.folder)
    return record


def evaluate(
    session: Session,
    evaluating: EvalSettings,
    *,
    base: Session | None = None,
    plan: Plan | None = None,
    editing: EditSettings = EditSettings(),
    seed: int = 0,
) -> Evaluation:
    """Answers to held-out prompts of one model; or of two states, before and after, with the shift between them.

    `plan` compares the session's model with itself under hooks, beside a random direction on the same writers;
    `base` with another model of the same tokenizer.
    """
    exam, judge = exam_of(evaluating, seed), open_judge(evaluating.judge, device=session.loading.device)
    try_judge(judge, session.monitor)
    examiner = examiner_of(session, evaluating, judge)
    if plan is not None:
        original = as_loaded(session)
        edited = Subject(session.model, functools.partial(session.ablated, plan))
        control = None if evaluating.no_control else control_of(session, plan, seed, original)
        return examine(session, examiner, exam, original, edited, control)
    if base is None:
        return examine(session, examiner, exam, as_loaded(session))
    if base.encoded != session.encoded:
        raise UsageError("--base: expected a model with the same tokenizer and chat template, found another one")
    return examine(session, examiner, exam, as_loaded(base), Subject(session.model))


def evaluate_elsewhere(
    model: str,
    engine: EngineSettings,
    *,
    loading: ModelSettings = ModelSettings(),
    prompts: PromptSettings = PromptSettings(),
    evaluating: EvalSettings = EvalSettings(),
    monitor: Monitor | None = None,
) -> Evaluation:
    """Answers to held-out prompts by vLLM or a server; MODEL's weights are not loaded here, its tokenizer is.

    Nothing is compared token by token. Raises `UsageError` for what the engine cannot do, `AbliterateError` when a
    server does not answer.
    """
    monitor = monitor or Monitor()
    is_server = engine.engine.startswith(("http://", "https://"))
    if engine.edited if is_server else engine.served or engine.served_edited:
        raise UsageError(
            f"--engine {engine.engine}: expected "
            + ("--served and --served-edited, found --edited" if is_server else "--edited, found names of a server")
        )
    judge = open_judge(evaluating.judge, device=loading.device)
    try_judge(judge, monitor)
    with monitor.phase("find model"):
        files = locate_model(model, loading)
        tokenizer, settings = load_tokenizer(files)
    renderer = ChatRenderer(tokenizer, read_template(loading.chat_template), loading.system)
    seen = learnt_by(str(files.folder)) | learnt_by(str(engine.edited or ""))
    contrast = load_contrast(prompts, monitor, seen)
    texts = contrast.test_texts
    encoded = share_prefixes({name: renderer.encode(group) for name, group in texts.items()}, share=False)
    examiner = Examiner(renderer, contrast, texts, encoded, evaluating, judge, monitor)
    ends = end_tokens(SimpleNamespace(generation_config=settings), tokenizer)
    pair = Pair(
        tokenizer,
        ends,
        folder=files.folder,
        edited=engine.edited,
        served=engine.served,
        edited_as=engine.served_edited,
    )
    with monitor.phase(f"open engine {engine.engine}"):
        opened = open_engine(engine.engine, pair)
    return examine_engine(opened, examiner, edited=bool(engine.edited or engine.served_edited))


def _evaluate(
    session: Session, folder: Path, plan: Plan, done: Realised, settings: RunSettings, judge: Judge, exam: Exam
) -> Evaluation:
    """Before: the original weights. After: the tensors that were saved, read back from disk.

    Where no weights were saved, or live ones are quantised, after is what was written as hooks. Vectors that are added
    have no control.
    """
    examiner = examiner_of(session, settings.evaluating, judge)

    def examined(base: Subject, edited: Subject) -> Evaluation:
        control = None
        if not (settings.evaluating.no_control or done.vectors):
            control = control_of(session, plan, settings.prompts.seed, base)
        return examine(session, examiner, exam, base, edited, control)

    if done.names is None or session.loaded.quantised:
        hooks = functools.partial(_hooked, session, plan, done)
        return examined(Subject(session.model, unchanged=session.loaded), Subject(session.model, hooks))
    with contextlib.ExitStack() as stack:
        with session.monitor.phase("read edited weights back"):
            stack.enter_context(untied(session.model, plan))
            saved = stack.enter_context(weights_from(session.model, folder, plan, done.names))
        return examined(Subject(session.model, saved.original, session.loaded), Subject(session.model))


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
    "Verification",
    "answer_parts",
    "apply",
    "at_site",
    "behaviour_part",
    "choose",
    "direction_metadata",
    "evaluate",
    "evaluate_elsewhere",
    "evaluation_part",
    "find",
    "open_model",
    "open_session",
    "pick",
    "rate_part",
    "run",
    "search",
    "selection_part",
    "verify",
    "versions",
]
