"""Several models or plans on the same prompts, each set beside the first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from abliterate.config import EvalSettings, ModelSettings, PromptSettings
from abliterate.edit.direction import learnt_by, load_direction
from abliterate.errors import UsageError
from abliterate.evaluation.examine import (
    Exam,
    Examiner,
    Marks,
    Sets,
    answers_of,
    as_loaded,
    exam_of,
    examiner_of,
    random_direction,
    shift_of,
    try_judge,
)
from abliterate.evaluation.judging import Judge
from abliterate.evaluation.judging.choice import open_judge
from abliterate.evaluation.results import Shift, Subject
from abliterate.model._compat import load_adapter
from abliterate.monitor import Monitor
from abliterate.prompts import ContrastiveSet
from abliterate.session import Session, locate_model, open_session


@dataclass(frozen=True, slots=True)
class Contender:
    """A model, alone or with what changes it: a direction file or a random direction (as hooks), or a PEFT adapter."""

    name: str
    model: str
    kind: Literal["model", "direction", "random", "adapter"] = "model"
    extra: Path | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """What was measured of one contender; `shift` is None for the first, and where tokenizers differ."""

    contender: Contender
    answers: Sets
    shift: Shift | None
    marks: Marks


def contender(spec: str) -> Contender:
    """Read `MODEL`, `MODEL+DIRECTION.safetensors`, `MODEL+ADAPTER_FOLDER` or `MODEL+random` (a control).

    Raises `UsageError` when what follows the plus is neither.
    """
    if Path(spec).exists() or "+" not in spec:
        return Contender(spec, spec)
    model, _, extra = spec.rpartition("+")
    if extra == "random":
        return Contender(spec, model, "random")
    path = Path(extra).expanduser()
    if path.is_file():
        return Contender(spec, model, "direction", path)
    if (path / "adapter_config.json").is_file():
        return Contender(spec, model, "adapter", path)
    raise UsageError(
        f"compare '{spec}': expected MODEL, MODEL+DIRECTION.safetensors, MODEL+ADAPTER_FOLDER or MODEL+random, found "
        f"no such file at {path}, nor an adapter_config.json in it"
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """All contenders, the first the reference, and who judged them on which prompts."""

    entries: tuple[Entry, ...]
    judge: Judge
    prompts: ContrastiveSet
    evaluating: EvalSettings


def compare(
    specs: Sequence[str],
    *,
    loading: ModelSettings = ModelSettings(),
    prompts: PromptSettings = PromptSettings(),
    evaluating: EvalSettings = EvalSettings(),
    monitor: Monitor | None = None,
) -> Comparison:
    """Ask all contenders the same prompts. The first is what the others are compared with; it stays loaded.

    Raises `UsageError` for fewer than two contenders, or one that names nothing.
    """
    contenders = [contender(spec) for spec in specs]
    if len(contenders) < 2:
        raise UsageError(f"compare: expected two or more models or plans, found {len(contenders)}")
    if evaluating.thinking == "both":
        raise UsageError("compare --thinking both: expected closed or open; compare twice")
    monitor = monitor or Monitor()
    judge, exam = open_judge(evaluating.judge, device=loading.device), exam_of(evaluating, prompts.seed)
    try_judge(judge, monitor)
    with monitor.phase("find models"):
        for model in dict.fromkeys(one.model for one in contenders):
            locate_model(model, loading)
    opened = functools.partial(
        open_session, loading=loading, prompts=prompts, learnt_from=_learnt_from(contenders), monitor=monitor
    )
    first = opened(contenders[0].model)
    base = _subject(first, contenders[0], prompts.seed, kept=True)
    entries = [_entry(first, base, examiner_of(first, evaluating, judge), exam, contenders[0])]
    for one in contenders[1:]:  # one at a time beside the first
        # An adapter is put into the model for good.
        shared = one.model == contenders[0].model and "adapter" not in (one.kind, contenders[0].kind)
        session = first if shared else opened(one.model)
        examiner, subject = examiner_of(session, evaluating, judge), _subject(session, one, prompts.seed)
        entry = _entry(session, subject, examiner, exam, one)
        if session.encoded == first.encoded:
            shift = shift_of(first, examiner, base, [subject], entries[0].answers)[0]
            entry = replace(entry, shift=shift)
        else:
            monitor.note(f"{one.name}: its prompts have other tokens than the first model's, so there is no KL")
        entries.append(entry)
        del session, examiner, subject
    return Comparison(tuple(entries), judge, first.prompts, evaluating)


def _learnt_from(contenders: Sequence[Contender]) -> frozenset[str]:
    """Prompts that the direction of any contender has seen."""
    seen = [learnt_by(one.model) for one in contenders]
    seen += [learnt_by(str(one.extra)) for one in contenders if one.kind == "adapter"]
    seen += [load_direction(one.extra).learnt_from for one in contenders if one.kind == "direction" and one.extra]
    return frozenset().union(*seen)


def _entry(session: Session, subject: Subject, examiner: Examiner, exam: Exam, one: Contender) -> Entry:
    with subject.state():
        answering = answers_of(session, subject, examiner)
        answers = examiner.ask(answering, f"answers {_short(one)}", thinking=examiner.thinks_first)
    return Entry(one, answers, None, exam.take(session, subject, f"capability {_short(one)}"))


def _subject(session: Session, one: Contender, seed: int, *, kept: bool = False) -> Subject:
    """The contender; its answers may be `kept` when it is an unchanged model."""
    if one.kind == "model":
        return as_loaded(session) if kept else Subject(session.model)
    if one.kind == "adapter":
        load_adapter(session.model, str(one.extra))
        return Subject(session.model)
    width = session.anatomy.d_model
    plan = session.plan(random_direction(1, width, seed) if one.extra is None else load_direction(one.extra))
    return Subject(session.model, functools.partial(session.ablated, plan))


def _short(one: Contender) -> str:
    """The name without the folders above."""
    extra = "" if one.kind == "model" else f"+{'random' if one.extra is None else one.extra.name}"
    return Path(one.model).name + extra
