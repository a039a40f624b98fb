"""Several models or plans on the same prompts, each set beside the first."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from abliterate.config import EvalSettings, MeasureSettings, ReplySettings
from abliterate.config.natural import as_type
from abliterate.edit.direction import Direction, learnt_by, load_direction
from abliterate.errors import UsageError
from abliterate.evaluation.answering import ModelState, as_loaded
from abliterate.evaluation.examine import (
    CapabilityScores,
    Exam,
    Examiner,
    Sets,
    exam_of,
    examiner_of,
    random_direction,
    ready_judge,
    shift_of,
)
from abliterate.evaluation.judging import Judge
from abliterate.evaluation.judging.choice import bind_judge
from abliterate.evaluation.parts import (
    Corrections,
    behaviour_part,
    capability_parts,
    corrections_of,
    decoding_part,
    estimate_part,
    judge_part,
    paired_parts,
    shift_part,
    sought_part,
)
from abliterate.evaluation.results import Shift, degenerate, manner
from abliterate.files.checkpoint import ADAPTER_CONFIG, ADAPTER_NAME
from abliterate.model._compat import load_adapter
from abliterate.model.completeness import check_adapter
from abliterate.monitor import Monitor
from abliterate.prompts import load_behaviour
from abliterate.record import ComparisonPart, ContenderPart, versions
from abliterate.session import Session, locate_model, open_session

#: How a contender is named (see `contender`).
Spec = str | tuple[str, Direction]


@dataclass(frozen=True, slots=True)
class Contender:
    """A model, alone or with what changes it: a direction file or a random direction (as hooks), or a PEFT adapter."""

    name: str
    model: str
    kind: Literal["model", "direction", "random", "adapter"] = "model"
    extra: Path | Direction | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    """What was measured of one contender; `shift` is None for the first, and where tokenizers differ."""

    contender: Contender
    answers: Sets
    shift: Shift | None
    scores: CapabilityScores


def contender(spec: Spec) -> Contender:
    """Read `MODEL`, `MODEL+DIRECTION.safetensors`, `MODEL+ADAPTER_FOLDER` or `MODEL+random` (a control).

    From Python also a pair of a model and a direction. Raises `UsageError` when what follows the plus is neither.
    """
    if not isinstance(spec, str):
        if not isinstance(spec, tuple) or len(spec) != 2:
            raise UsageError(f"compare: expected MODEL or (MODEL, DIRECTION), found {type(spec).__name__}")
        model, direction = as_type("compare: model", spec[0], str), as_type("compare: direction", spec[1], Direction)
        return Contender(f"{model}+{direction.site or 'direction'}", model, "direction", direction)
    if Path(spec).exists() or "+" not in spec:
        return Contender(spec, spec)
    model, _, extra = spec.rpartition("+")
    if extra == "random":
        return Contender(spec, model, "random")
    path = Path(os.path.expanduser(extra))
    if path.is_file():
        return Contender(spec, model, "direction", path)
    if (path / ADAPTER_CONFIG).is_file() and (path / ADAPTER_NAME).is_file():
        return Contender(spec, model, "adapter", path)
    raise UsageError(
        f"compare '{spec}': expected MODEL, MODEL+DIRECTION.safetensors, MODEL+ADAPTER_FOLDER or MODEL+random, found "
        f"no such file at {path}, nor {ADAPTER_CONFIG} and {ADAPTER_NAME} in it"
    )


def compare(
    specs: Sequence[Spec], measuring: MeasureSettings = MeasureSettings(), monitor: Monitor | None = None
) -> ComparisonPart:
    """Ask all contenders the same prompts. The first is what the others are compared with; it stays loaded.

    Raises `UsageError` for fewer than two contenders, or one that names nothing.
    """
    contenders = [contender(spec) for spec in specs]
    evaluating, loading = measuring.evaluating, measuring.loading
    if len(contenders) < 2:
        raise UsageError(f"compare: expected two or more models or plans, found {len(contenders)}")
    if evaluating.thinking == "both":
        raise UsageError("compare --thinking both: expected closed or open; compare twice")
    monitor = monitor or Monitor()
    exam = exam_of(evaluating, measuring.prompts.seed)
    judge = ready_judge(evaluating, load_behaviour(measuring.prompts.behaviour), loading.judge_device, monitor)
    with monitor.phase("find models"):
        for model in dict.fromkeys(one.model for one in contenders):
            locate_model(model, loading)
    seen = _learnt_from(contenders)
    opened = functools.partial(
        open_session,
        loading=loading,
        prompts=measuring.prompts,
        learnt_from=seen,
        reply_tokens=measuring.evaluating.longest_reply,
        monitor=monitor,
    )
    first = opened(contenders[0].model)
    judge = bind_judge(judge, as_loaded(first), monitor)
    base = _state(first, contenders[0], evaluating)
    examiner = examiner_of(first, evaluating, judge)
    entries = [_entry(base, examiner, exam, contenders[0])]
    for one in contenders[1:]:  # one at a time beside the first
        entries.append(_beside(one, base, entries[0], opened, exam, judge, evaluating))
    return _part(entries, judge, first, examiner)


def _beside(
    one: Contender,
    base: ModelState,
    reference: _Entry,
    opened: Callable[[str], Session],
    exam: Exam,
    judge: Judge,
    evaluating: EvalSettings,
) -> _Entry:
    """Another contender, with the shift from the first where both read prompts as the same tokens."""
    # An adapter is put into the model for good.
    first = base.session
    shared = one.model == reference.contender.model and "adapter" not in (one.kind, reference.contender.kind)
    session = first if shared else opened(one.model)
    examiner, state = examiner_of(session, evaluating, judge), _state(session, one)
    entry = _entry(state, examiner, exam, one)
    if session.encoded == first.encoded:
        shift = shift_of(examiner, base, state, reference.answers)
        return replace(entry, shift=shift)
    session.monitor.note(f"{one.name}: its prompts have other tokens than the first model's, so there is no KL")
    return entry


def _part(entries: Sequence[_Entry], judge: Judge, first: Session, examiner: Examiner) -> ComparisonPart:
    behaviour = first.prompts.behaviour
    corrections = [corrections_of(judge, entry.contender.model, [entry.answers], behaviour) for entry in entries]
    named = {
        f"{name} {number}": chosen  # as tables name the entries
        for number, found in enumerate(corrections, 1)
        for name, chosen in found.items()
    }
    return ComparisonPart(
        judge=judge_part(judge, named),
        decoding=decoding_part(examiner.decoding, examiner.settings),
        versions=versions(),
        settings=examiner.settings.model_dump(mode="json"),
        sources=first.prompts.sources,
        counts={name: len(set(answers.prompts)) for name, answers in entries[0].answers.items()},
        dropped=dict(first.prompts.dropped),
        prompts_sha256=first.prompts.sha256,
        behaviour=sought_part(behaviour),
        reference=entries[0].contender.name,
        entries=[_contender_part(entry, entries[0], found) for entry, found in zip(entries, corrections, strict=True)],
    )


def _contender_part(entry: _Entry, first: _Entry, corrections: Corrections) -> ContenderPart:
    style, other = manner(entry.answers["harmless"]), None if entry is first else entry
    return ContenderPart(
        name=entry.contender.name,
        behaviour=behaviour_part(entry.answers, corrections),
        tokens=estimate_part(style.tokens),
        repetition=estimate_part(style.repetition),
        capability=capability_parts(first.scores, None if other is None else other.scores),
        paired={} if other is None else paired_parts(first.answers, other.answers),
        degenerate={} if other is None else paired_parts(first.answers, other.answers, degenerate),
        shift=None if entry.shift is None else shift_part(entry.shift),
    )


def _learnt_from(contenders: Sequence[Contender]) -> frozenset[str]:
    """Prompts that the direction of any contender has seen."""
    seen = [learnt_by(one.model) for one in contenders]
    seen += [learnt_by(str(one.extra)) for one in contenders if one.kind == "adapter"]
    seen += [_direction(one.extra).learnt_from for one in contenders if one.kind == "direction" and one.extra]
    return frozenset().union(*seen)


def _direction(extra: Path | Direction) -> Direction:
    return extra if isinstance(extra, Direction) else load_direction(extra)


def _entry(state: ModelState, examiner: Examiner, exam: Exam, one: Contender) -> _Entry:
    answers = examiner.ask(state, f"answers {_short(one)}", thinking=examiner.thinks_first)
    return _Entry(one, answers, None, exam.take(state, f"capability {_short(one)}"))


def _state(session: Session, one: Contender, kept: ReplySettings | None = None) -> ModelState:
    """The contender; its answers may be `kept` when it is an unchanged model."""
    if one.kind == "model":
        return as_loaded(session, kept)
    if one.kind == "adapter":
        check_adapter(str(one.extra), load_adapter(session.model, str(one.extra)))
        return ModelState(session)
    width = session.anatomy.d_model
    plan = session.plan(random_direction(1, width, session.seed) if one.extra is None else _direction(one.extra))
    return ModelState(session, functools.partial(session.ablated, plan))


def _short(one: Contender) -> str:
    """The name without the folders above."""
    extra = one.extra.name if isinstance(one.extra, Path) else "random" if one.extra is None else "direction"
    return Path(one.model).name + ("" if one.kind == "model" else f"+{extra}")
