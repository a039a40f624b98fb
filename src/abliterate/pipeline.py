"""The stages in order; the command line and the Python API call them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate import record as rec
from abliterate.activations import Moments, MomentsFitter, ProjectionFitter
from abliterate.anatomy import names_on_disk
from abliterate.blueprint import study_files
from abliterate.checkpoint import Checkpoint, bytes_to_write, ensure_space, open_checkpoint, staged
from abliterate.config import (
    EvalSettings,
    FileSettings,
    FindSettings,
    OutputSettings,
    RunSettings,
)
from abliterate.directions import (
    Candidates,
    Direction,
    Separation,
    difference_of_means,
    load_direction,
    save_direction,
    separation,
)
from abliterate.errors import CheckpointError, GateNotMet, UsageError
from abliterate.evaluation import Answers, Shift, Subject, measure_shift
from abliterate.generation import complete
from abliterate.judging import Tally, judge
from abliterate.models import ModelFiles
from abliterate.monitor import Monitor
from abliterate.parts import (
    anatomy_part,
    answer_parts,
    behaviour_part,
    direction_metadata,
    evaluation_part,
    model_part,
    now,
    plan_part,
    rate_part,
    run_record,
    saved_metadata,
    selection_part,
    versions,
    write_all,
)
from abliterate.plan import Plan, make_plan
from abliterate.refusals import RefusalToken, find_refusals
from abliterate.scoring import refusal_score
from abliterate.selection import Rule, Scorer, Site, SiteScore, candidate_sites, select, stage_costs
from abliterate.session import Findings, Found, Session, locate_model, open_model, open_session
from abliterate.surgery import Surgery, edit_checkpoint, planned_parameters, weights_from

#: Harmless validation prompts that the model replies to before refusal tokens are known.
_HARMLESS_REPLIES = 40
#: The best site must tell the classes apart at least this well on validation prompts.
_MIN_AUROC = 0.7
#: Harmless test prompts whose answers are compared token by token.
_SHIFT_PROMPTS = 64


def find(session: Session, settings: FindSettings) -> Findings:
    """Refusal tokens, and the difference of means at every site with its separation on validation prompts.

    Raises `GateNotMet` when the model hardly refuses or the prompt sets do not separate.
    """
    monitor = session.monitor
    tokens = _refusal_tokens(session, settings)
    ids = tuple(token.token for token in tokens)
    train = {name: session.encoded[name, "train"] for name in ("harmful", "harmless")}
    with monitor.phase("collect activations", sum(map(len, train.values()))) as advance:
        moments = {}
        for name, encoded in train.items():
            sign = 1.0 if name == "harmful" else -1.0

            def behaves(logits: Tensor, sign: float = sign) -> Tensor:
                return sign * refusal_score(logits, ids) > 0

            fitter = MomentsFitter(session.positions, session.anatomy.layers + 1, session.anatomy.d_model)
            session.stream(encoded, fitter.update, advance, keep=None if settings.all_prompts else behaves)
            moments[name] = _enough(fitter.result(), name, len(encoded))
    candidates = difference_of_means(moments["harmful"], moments["harmless"], projected=settings.projected)
    scorer = Scorer(
        session.model,
        session.anatomy,
        ids,
        session.encoded["harmful", "val"],
        session.encoded["harmless", "val"],
        session.size,
        behaving=not settings.all_prompts,
    )
    separated = _separation(session, candidates, scorer)
    trained_on = {name: moment.count for name, moment in moments.items()}
    monitor.note(
        f"directions from {trained_on['harmful']} harmful and {trained_on['harmless']} harmless prompts; best AUROC "
        f"on validation prompts {float(separated.auroc.max()):.3f}"
    )
    return Findings(tokens, candidates, separated, scorer, trained_on)


def choose(
    session: Session, findings: Findings, settings: FindSettings, *, seed: int = 0, force: bool = False
) -> Found:
    """Select a direction by intervention.

    Raises `GateNotMet` when no site meets the rule, unless `force`: then the best one is taken, with a warning.
    """
    rule = Rule(settings.max_kl, settings.min_induce, settings.max_depth)
    sites = len(candidate_sites(findings.candidates, session.anatomy.layers, rule))
    with session.monitor.phase("select by intervention", stage_costs(sites)) as advance:
        selection = select(findings.scorer, findings.candidates, findings.separation, rule, seed=seed, progress=advance)
    best = selection.best
    found = (
        f"layer {best.layer}, position {best.position}: bypass {best.bypass:.2f} (before {selection.harmful:.2f}), "
        f"induce {best.induce:.2f} (must be above {rule.min_induce:g}), KL {best.kl:.3f} (at most {rule.max_kl:g})"
    )
    if selection.chosen is None:
        _gate(
            session.monitor,
            f"no direction passed verification; the best is {found}; try --projected or other prompts; "
            f"{_admitting(best, rule)} would admit this one, and --force saves it as it is",
            force,
        )
    session.monitor.note(f"chosen: {found}")
    raw = findings.candidates.at(best.layer, best.position)
    return Found(findings, selection, (raw / raw.norm())[None], selection.chosen is not None)


def run(settings: RunSettings, monitor: Monitor | None = None) -> rec.Record:
    """The whole job: find, verify, apply, evaluate. OUT appears only when all of it is done.

    Raises `GateNotMet` when the model hardly refuses or no direction passes (unless forced), `UsageError` for an OUT
    that is in the way, and the errors of every stage.
    """
    monitor = monitor or Monitor()
    output = settings.output
    if output is None:
        raise UsageError("run: expected an output folder, found none; give -o OUT")
    with monitor.phase("find model"):
        files = locate_model(settings.model, settings.loading)
    with _output(output, files) as (partial, source):
        session = open_session(
            files,
            loading=settings.loading,
            prompts=settings.prompts,
            positions=settings.finding.positions,
            monitor=monitor,
        )
        findings, finding = _find_or_force(session, settings.finding, output.force)
        settings = settings.model_copy(update={"finding": finding})
        found = choose(session, findings, settings.finding, seed=settings.prompts.seed, force=output.force)
        plan = session.plan(found.basis, settings.strength)
        names = names_on_disk(session.model, planned_parameters(plan), list(source.tensors))
        surgery = _operate(source, partial, plan, names, session.model, monitor)
        evaluation = _evaluate(session, partial, names, settings.evaluating)
        result = run_record(session, settings, found, plan, surgery, evaluation, source, partial)
        save_direction(
            partial / "direction.safetensors",
            found.basis,
            candidates=findings.candidates,
            metadata=saved_metadata(session, found, result),
        )
        write_all(result, partial)
    return result


def apply(
    model: str,
    direction: Path,
    output: OutputSettings,
    *,
    site: Site | None = None,
    strength: float = 1.0,
    loading: FileSettings = FileSettings(),
    monitor: Monitor | None = None,
) -> rec.Record:
    """Write MODEL with a direction taken out of its weights. The model is never loaded.

    Raises `UsageError` when the direction does not fit the model, `AnatomyError` when a writer is not known.
    """
    monitor = monitor or Monitor()
    chosen = load_direction(direction)
    with monitor.phase("find model"):
        files = locate_model(model, loading)
    with _output(output, files) as (partial, source):
        with monitor.phase("know every writer"):
            anatomy, skeleton = study_files(files, source, trust_remote_code=loading.trust_remote_code)
        plan = make_plan(anatomy, at_site(chosen, site), strength=strength)
        names = names_on_disk(skeleton, planned_parameters(plan), list(source.tensors))
        surgery = _operate(source, partial, plan, names, skeleton, monitor)
        settings = {"model": model, "direction": str(direction), "site": site, "strength": strength}
        result = rec.Record(
            created=now(),
            versions=versions(),
            settings=settings,
            model=model_part(files, skeleton, anatomy, str(skeleton.config.dtype).removeprefix("torch."), "none", {}),
            anatomy=anatomy_part(anatomy),
            plan=plan_part(plan, surgery),
            warnings=monitor.warnings,
            left_out=list(surgery.files.left_out),
            output=str(output.out),
            timings_s=monitor.timings(),
            peak_memory_bytes=monitor.peak_bytes,
        )
        said = {} if site is None else {"chosen": {"layer": site[0], "position": site[1]}}
        save_direction(
            partial / "direction.safetensors",
            plan.direction,
            candidates=chosen.candidates,
            metadata=chosen.metadata | said,
        )
        write_all(result, partial)
    return result


@dataclass(frozen=True, slots=True)
class Verification:
    """What ablating a direction at inference time does: refusals among held-out harmful prompts, and scores.

    `induce` is None for a direction whose layer is not known, or is no block's input.
    """

    before: Tally
    after: Tally
    control: Tally
    bypass: float
    bypass_before: float
    bypass_control: float
    induce: float | None
    induce_before: float
    kl: float
    tokens: tuple[RefusalToken, ...]
    verified: bool


def verify(
    session: Session,
    direction: Direction,
    *,
    site: Site | None = None,
    strength: float = 1.0,
    finding: FindSettings = FindSettings(),
    evaluating: EvalSettings = EvalSettings(),
    seed: int = 0,
) -> Verification:
    """Ablate a direction with hooks and see whether the model stops refusing; a random direction is the control.

    Verified means: at most half of the refusals are left, the control leaves more than half, and KL is within the
    rule.
    """
    basis = at_site(direction, site, session.anatomy.d_model)
    tokens = _refusal_tokens(session, finding)
    ids = tuple(token.token for token in tokens)
    val = session.encoded["harmful", "val"], session.encoded["harmless", "val"]
    scorer = Scorer(session.model, session.anatomy, ids, *val, session.size, behaving=not finding.all_prompts)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(basis.shape, generator=generator)
    raw, layer = _raw(direction, basis, site)
    with session.monitor.phase("score"):
        bypass, kl = scorer.ablate(session.plan(basis, strength))
        bypass_control, _ = scorer.ablate(session.plan(random, strength))
        induce = None if layer is None or layer >= session.anatomy.layers else scorer.induce(raw, layer)
    tallies = []
    for name, plan in (
        ("answers: original", None),
        ("answers: ablated", session.plan(basis, strength)),
        ("answers: random direction", session.plan(random, strength)),
    ):
        with contextlib.ExitStack() as stack:
            if plan is not None:
                stack.enter_context(session.ablated(plan))
            encoded = session.encoded["harmful", "test"]
            with session.monitor.phase(name, len(encoded)) as advance:
                replies = complete(
                    session.model, session.loaded.tokenizer, encoded, evaluating.max_new_tokens, session.size, advance
                )
            tallies.append(Tally.from_verdicts([judge(reply.text) for reply in replies]))
    before, after, control = tallies
    halved = before.refusals > 0 and 2 * after.refusals <= before.refusals < 2 * control.refusals
    return Verification(
        before=before,
        after=after,
        control=control,
        bypass=bypass,
        bypass_before=scorer.harmful_score,
        bypass_control=bypass_control,
        induce=induce,
        induce_before=scorer.harmless_score,
        kl=kl,
        tokens=tokens,
        verified=halved and kl <= finding.max_kl,
    )


def evaluate(
    session: Session,
    evaluating: EvalSettings,
    *,
    base: Session | None = None,
    plan: Plan | None = None,
) -> tuple[dict[str, Answers], dict[str, Answers] | None, Shift | None]:
    """Answers to held-out prompts of one model; or of two states, before and after, with the shift between them.

    `plan` compares the session's model with itself under hooks; `base` with another model of the same tokenizer.
    """
    if base is None and plan is None:
        return session.answers(evaluating.max_new_tokens, "answers"), None, None
    origin = base or session
    if origin.encoded != session.encoded:
        raise UsageError("--base: expected a model with the same tokenizer and chat template, found another one")
    before = origin.answers(evaluating.max_new_tokens, "answers before")

    def state() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if plan is None else session.ablated(plan)

    with state():
        after = session.answers(evaluating.max_new_tokens, "answers after")
    shift = _shift(session.monitor, session, before, Subject(origin.model), Subject(session.model, state))
    return before, after, shift


def at_site(direction: Direction, site: Site | None, d_model: int | None = None) -> Float[Tensor, "k d"]:
    """The direction to use: the file's basis, or its candidate at `site`.

    Raises `UsageError` when the file has no such candidate, or vectors of another width than `d_model`.
    """
    width = direction.basis.shape[1]
    if d_model is not None and width != d_model:
        raise UsageError(f"direction: expected vectors of the model's width {d_model}, found {width}")
    if site is None:
        return direction.basis
    raw, _ = _raw(direction, direction.basis, site)
    unit: Tensor = raw[None] / raw.norm()
    return unit


def _raw(direction: Direction, basis: Tensor, site: Site | None) -> tuple[Tensor, int | None]:
    """The difference of means r behind a direction and its layer, where the file says them."""
    candidates = direction.candidates
    if site is None and candidates is not None:
        match direction.metadata.get("chosen"):
            case {"layer": int(layer), "position": int(position)}:
                site = (layer, position)
    if site is None:
        return basis[0], None
    layer, position = site
    if candidates is None:
        raise UsageError(f"--site {layer}:{position}: the direction file holds no candidates, only one direction")
    shape = candidates.raw.shape
    if not (0 <= layer < shape[1] and -shape[0] <= position <= -1):
        raise UsageError(
            f"--site {layer}:{position}: expected a layer below {shape[1]} and a position from -{shape[0]} to -1 "
            "among the file's candidates"
        )
    raw = candidates.at(layer, position)
    if float(raw.norm()) == 0:
        raise UsageError(f"--site {layer}:{position}: the classes do not differ there")
    return raw, layer


def _refusal_tokens(session: Session, settings: FindSettings) -> tuple[RefusalToken, ...]:
    tokenizer, monitor = session.loaded.tokenizer, session.monitor
    if settings.refusal_tokens is not None:
        tokens = _given_tokens(tokenizer, settings.refusal_tokens)
    else:
        harmful, harmless = session.encoded["harmful", "val"], session.encoded["harmless", "val"]
        harmless = harmless.take(range(len(harmless))[:_HARMLESS_REPLIES])
        with monitor.phase("find refusal tokens", len(harmful) + len(harmless)) as advance:
            found = find_refusals(session.model, tokenizer, harmful, harmless, session.size, judge, advance)
        if found.refused < max(1, settings.min_refusal_rate * found.prompts):
            raise GateNotMet(
                f"this model hardly refuses: {found.refused} of {found.prompts} harmful validation prompts, expected "
                f"at least {settings.min_refusal_rate:.0%}; there is nothing to find: give prompts that it refuses, or "
                "--refusal-tokens"
            )
        tokens = found.tokens
    monitor.note(
        "refusals start with "
        + ", ".join(f"{t.text!r}" + (f" ({t.probability:.0%})" if t.trials else "") for t in tokens)
    )
    return tokens


def _given_tokens(tokenizer: Any, option: str) -> tuple[RefusalToken, ...]:
    ids: dict[int, str] = {}
    for text in option.split(","):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if not text or not encoded:
            raise UsageError(f"--refusal-tokens '{option}': expected texts separated by commas, found an empty one")
        ids[encoded[0]] = tokenizer.decode([encoded[0]])
    return tuple(RefusalToken(token, text, 0.0, 0.0, 0, 0) for token, text in ids.items())


def _find_or_force(session: Session, settings: FindSettings, force: bool) -> tuple[Findings, FindSettings]:
    """`find`, and when a forced run meets the refusal gate, once more without it; with the settings it took."""
    try:
        return find(session, settings), settings
    except GateNotMet as gate:
        if not force or settings.min_refusal_rate == 0:
            raise
        session.monitor.warn(f"{gate} (forced)")
        relaxed = settings.model_copy(update={"min_refusal_rate": 0.0, "all_prompts": True})
        return find(session, relaxed), relaxed


def _admitting(score: SiteScore, rule: Rule) -> str:
    """The options under which a site that failed the rule would pass it."""
    options = []
    if score.kl > rule.max_kl:
        options.append(f"--max-kl {math.ceil(score.kl * 100) / 100:g}")
    if score.induce <= rule.min_induce:
        options.append(f"--min-induce {math.floor(score.induce * 10) / 10 - 0.1:.1f}")
    return " ".join(options)


def _gate(monitor: Monitor, message: str, force: bool) -> None:
    if not force:
        raise GateNotMet(message)
    monitor.warn(f"{message} (forced)")


def _enough(moments: Moments, name: str, prompts: int) -> Moments:
    if moments.count < 8:
        behaviour = "refuses" if name == "harmful" else "answers"
        raise GateNotMet(
            f"{name} training prompts: expected at least 8 that the model {behaviour}, found {moments.count} of "
            f"{prompts}; give more prompts, or --all-prompts to use all"
        )
    return moments


def _separation(session: Session, candidates: Candidates, scorer: Scorer) -> Separation:
    values = []
    pairs = (("harmful", scorer.harmful_rows), ("harmless", scorer.harmless_rows))
    with session.monitor.phase("separate validation prompts", sum(len(rows) for _, rows in pairs)) as advance:
        for name, rows in pairs:
            encoded = session.encoded[name, "val"].take(rows)
            fitter = ProjectionFitter(candidates.units, len(encoded))
            session.stream(encoded, fitter.update, advance)
            values.append(fitter.values)
    result = separation(*values)
    if float(result.auroc.max()) < _MIN_AUROC:
        raise GateNotMet(
            f"the prompt sets do not separate: best AUROC {float(result.auroc.max()):.2f} on validation prompts, "
            f"expected at least {_MIN_AUROC}; check that the sets differ in what is to be found"
        )
    return result


@contextlib.contextmanager
def _output(output: OutputSettings, files: ModelFiles) -> Iterator[tuple[Path, Checkpoint]]:
    """A folder that becomes OUT when all is done, and the checkpoint to be edited into it."""
    source = open_checkpoint(files.folder)
    with staged(output.out, overwrite=output.overwrite, source=files.folder) as partial:
        ensure_space(partial, bytes_to_write(source))
        yield partial, source


def _operate(
    source: Checkpoint, target: Path, plan: Plan, names: dict[str, str], model: Any, monitor: Monitor
) -> Surgery:
    for parameter, tensor in names.items():
        expected, stored = tuple(model.get_parameter(parameter).shape), source.tensors[tensor].shape
        if expected != stored:
            raise CheckpointError(
                f"tensor '{tensor}' in {source.tensors[tensor].file}: expected shape {list(expected)} by the model's "
                f"configuration, found {list(stored)}"
            )
    with monitor.phase("edit weights", bytes_to_write(source)) as advance:
        surgery = edit_checkpoint(source, target, plan, names, progress=advance)
    for name, why in plan.left_alone:
        monitor.note(f"{name} left alone: {why}")
    if surgery.files.left_out:
        monitor.warn(f"not copied, they would still hold the unedited model: {', '.join(surgery.files.left_out)}")
    return surgery


def _evaluate(session: Session, partial: Path, names: dict[str, str], settings: EvalSettings) -> rec.EvaluationPart:
    """Before: the original weights. After: the tensors that were saved, read back from disk."""
    before = session.answers(settings.max_new_tokens, "answers before")
    with contextlib.ExitStack() as stack:
        with session.monitor.phase("read edited weights back"):
            edited = stack.enter_context(weights_from(session.model, partial, names))
        after = session.answers(settings.max_new_tokens, "answers after")
        shift = _shift(
            session.monitor,
            session,
            before,
            Subject(session.model, edited.original),
            Subject(session.model),
        )
    return evaluation_part(before, after, shift, settings)


def _shift(monitor: Monitor, session: Session, before: dict[str, Answers], base: Subject, edited: Subject) -> Shift:
    encoded = session.encoded["harmless", "test"]
    rows = range(min(_SHIFT_PROMPTS, len(encoded)))
    replies = [before["harmless"].replies[row] for row in rows]
    with monitor.phase("shift on harmless prompts", len(rows)) as advance:
        return measure_shift(base, edited, encoded.take(rows), replies, session.size, advance)


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
    "evaluation_part",
    "find",
    "open_model",
    "open_session",
    "rate_part",
    "run",
    "selection_part",
    "verify",
]
