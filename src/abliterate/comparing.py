"""Several models or plans on the same prompts, each set beside the first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from abliterate.config import EvalSettings, ModelSettings, PromptSettings
from abliterate.directions import learnt_by, load_direction
from abliterate.errors import UsageError
from abliterate.evaluation import Shift, Subject
from abliterate.judging.choice import open_judge
from abliterate.measuring import Exam, Examiner, Marks, Sets, answers_of, exam_of, examiner_of, shift_of, try_judge
from abliterate.monitor import Monitor
from abliterate.session import Session, open_session


@dataclass(frozen=True, slots=True)
class Contender:
    """A model, alone or with what changes it: a direction file (as hooks) or a PEFT adapter."""

    name: str
    model: str
    kind: Literal["model", "direction", "adapter"] = "model"
    extra: Path | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """What was measured of one contender; `shift` is None for the first, and where tokenizers differ."""

    contender: Contender
    answers: Sets
    shift: Shift | None
    marks: Marks


def contender(spec: str) -> Contender:
    """Read `MODEL`, `MODEL+DIRECTION.safetensors` or `MODEL+ADAPTER_FOLDER`.

    Raises `UsageError` when what follows the plus is neither.
    """
    if Path(spec).exists() or "+" not in spec:
        return Contender(spec, spec)
    model, _, extra = spec.rpartition("+")
    path = Path(extra).expanduser()
    if path.is_file():
        return Contender(spec, model, "direction", path)
    if (path / "adapter_config.json").is_file():
        return Contender(spec, model, "adapter", path)
    raise UsageError(
        f"compare '{spec}': expected MODEL, MODEL+DIRECTION.safetensors or MODEL+ADAPTER_FOLDER, found no such file or "
        f"adapter at {path}"
    )


def compare(
    specs: Sequence[str],
    *,
    loading: ModelSettings = ModelSettings(),
    prompts: PromptSettings = PromptSettings(),
    evaluating: EvalSettings = EvalSettings(),
    monitor: Monitor | None = None,
) -> list[Entry]:
    """Ask all contenders the same prompts. The first is what the others are compared with; it stays loaded.

    Raises `UsageError` for fewer than two contenders, or one that names nothing.
    """
    contenders = [contender(spec) for spec in specs]
    if len(contenders) < 2:
        raise UsageError(f"compare: expected two or more models or plans, found {len(contenders)}")
    monitor = monitor or Monitor()
    judge, exam = open_judge(evaluating.judge, device=loading.device), exam_of(evaluating, prompts.seed)
    try_judge(judge, monitor)

    opened = functools.partial(
        open_session, loading=loading, prompts=prompts, learnt_from=_learnt_from(contenders), monitor=monitor
    )
    first = opened(contenders[0].model)
    base = _subject(first, contenders[0])
    entries = [_entry(first, base, examiner_of(first, evaluating, judge), exam, contenders[0])]
    for one in contenders[1:]:  # one at a time beside the first
        # An adapter is put into the model for good.
        shared = one.model == contenders[0].model and "adapter" not in (one.kind, contenders[0].kind)
        session = first if shared else opened(one.model)
        examiner, subject = examiner_of(session, evaluating, judge), _subject(session, one)
        entry = _entry(session, subject, examiner, exam, one)
        if session.encoded == first.encoded:
            shift = shift_of(first, examiner, base, [subject], entries[0].answers)[0]
            entry = replace(entry, shift=shift)
        entries.append(entry)
        del session, examiner, subject
    return entries


def _learnt_from(contenders: Sequence[Contender]) -> frozenset[str]:
    """Prompts that the direction of any contender has seen."""
    seen = [learnt_by(one.model) for one in contenders]
    seen += [load_direction(one.extra).learnt_from for one in contenders if one.kind == "direction" and one.extra]
    return frozenset().union(*seen)


def _entry(session: Session, subject: Subject, examiner: Examiner, exam: Exam, one: Contender) -> Entry:
    with subject.state():
        answers = examiner.ask(answers_of(session, subject, examiner), f"answers {one.name}")
    return Entry(one, answers, None, exam.take(session, subject, f"capability {one.name}"))


def _subject(session: Session, one: Contender) -> Subject:
    if one.kind == "direction" and one.extra is not None:
        plan = session.plan(load_direction(one.extra))
        return Subject(session.model, functools.partial(session.ablated, plan))
    if one.kind == "adapter":
        session.model.load_adapter(str(one.extra))
        return Subject(session.model)
    return Subject(session.model, unchanged=session.loaded)
