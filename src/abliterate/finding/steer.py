"""Steering tried out: replies to given prompts, and behaviour and damage on held-out ones against the coefficient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from abliterate.config import RefusalSettings, ReplySettings, SteerSettings
from abliterate.edit.hooks import steered
from abliterate.edit.steering import Steering, SteeringVectors, steering_of
from abliterate.errors import GateNotMet
from abliterate.evaluation.answering import ModelState, as_loaded
from abliterate.evaluation.examine import chosen_decoding, ready_judge
from abliterate.evaluation.judging.choice import bind_judge
from abliterate.evaluation.parts import (
    Corrections,
    answer_parts,
    corrections_of,
    decoding_part,
    estimate_part,
    judge_part,
    rate_parts,
    sought_part,
)
from abliterate.evaluation.probe import Level, Measured, Probe
from abliterate.evaluation.results import manner
from abliterate.evaluation.statistics import bootstrap_mean
from abliterate.finding.find import refusal_tokens
from abliterate.model.batches import auto_batch_size, share_prefix
from abliterate.model.generation import Reply, complete
from abliterate.monitor import Monitor
from abliterate.record import AnswerPart, DosePart, SteeringPart
from abliterate.session import OpenedModel, Session

#: The name of the model as it is, among answers by coefficient.
AS_IT_IS = "none"

#: The set of the user's own prompts.
GIVEN = "given"

#: What vectors are called that come from no file.
IN_PYTHON = "given in Python"


def sweep(
    session: Session,
    vectors: SteeringVectors,
    steer: SteerSettings = SteerSettings(),
    *,
    finding: RefusalSettings = RefusalSettings(),
    replies: ReplySettings = ReplySettings(),
    name: str = IN_PYTHON,
) -> SteeringPart:
    """What every coefficient does to held-out prompts, beside the model as it is and a random direction.

    The vectors are called `name`.

    Raises `UsageError` for vectors that do not fit the model.
    """
    steering = steering_of(vectors, steer, session.anatomy.layers, session.anatomy.d_model)
    behaviour = session.prompts.behaviour
    judge = ready_judge(replies, behaviour, session.loading.judge_device, session.monitor)
    judge = bind_judge(judge, as_loaded(session), session.monitor)
    probe = Probe(session, _tokens(session, finding), "test", judge, replies)
    ends = () if steer.no_control else tuple(dict.fromkeys((steer.doses[0], steer.doses[-1])))
    with session.monitor.phase("steer", 1 + len(steer.doses) + len(ends)) as advance:
        plain = probe.measure(None, Level.REPLIES)
        advance(1)
        steered_ones = list(_measured(session, probe, steering, steer.doses, plain, advance))
        control = list(_measured(session, probe, steering.random(session.seed), ends, plain, advance))
    measured: list[tuple[float | None, Measured]] = [(None, plain), *steered_ones]
    states = [one.replies for _, one in (*measured, *control) if one.replies]
    corrections = corrections_of(judge, session.loaded.files.name, states, behaviour)
    sensitive = () if steer.keep_completions else session.prompts.sensitive
    decoding = chosen_decoding(session.model.generation_config, replies, session.seed, session.monitor)
    return SteeringPart(
        **_said(session.loaded.files.name, name, steering, vectors),
        max_new_tokens=replies.max_new_tokens,
        decoding=decoding_part(decoding, replies),
        judge=judge_part(judge, corrections),
        behaviour=sought_part(behaviour),
        sources=session.prompts.sources,
        prompts_sha256=session.prompts.sha256,
        doses=[_dose(dose, one, corrections, probe) for dose, one in measured],
        control=[_dose(dose, one, corrections, probe) for dose, one in control],
        answers={named(dose): answer_parts(one.replies or {}, sensitive) for dose, one in measured},
    )


def _measured(
    session: Session,
    probe: Probe,
    steering: Steering,
    doses: Sequence[float],
    plain: Measured,
    advance: Callable[[int], None],
) -> Iterator[tuple[float, Measured]]:
    """Every coefficient; one that changes nothing is not measured, but as the model is (`plain`)."""
    for dose in doses:
        one = steering.by(dose)
        state = ModelState(session, functools.partial(steered, session.blocks, one))
        yield dose, probe.measure(state, Level.REPLIES) if one.changes else plain
        advance(1)


def _tokens(session: Session, finding: RefusalSettings) -> list[int]:
    """First tokens of refusals; none of a model that hardly refuses, which may still be steered."""
    try:
        return [token.token for token in refusal_tokens(session, finding)]
    except GateNotMet as error:
        session.monitor.warn(f"{error}; scores of first tokens are left out")
        return []


def _dose(dose: float | None, measured: Measured, corrections: Corrections, probe: Probe) -> DosePart:
    replies = measured.replies or {}
    scores = {"harmful": measured.harmful, "harmless": measured.harmless}
    return DosePart(
        coefficient=dose,
        behaviour=rate_parts(replies, corrections),
        score={name: float(values.mean()) if probe.tokens else None for name, values in scores.items()},
        kl=estimate_part(bootstrap_mean(measured.kl.tolist(), seed=probe.session.seed)),
        repetition={name: estimate_part(manner(group).repetition) for name, group in replies.items()},
    )


def reply(
    opened: OpenedModel,
    vectors: SteeringVectors,
    prompts: Sequence[str],
    steer: SteerSettings = SteerSettings(),
    *,
    max_new_tokens: int = 128,
    monitor: Monitor | None = None,
    name: str = IN_PYTHON,
) -> SteeringPart:
    """Greedy replies to `prompts` as the model is, and with every coefficient. Nobody judges them.

    Raises `UsageError` for vectors that do not fit the model.
    """
    steering = steering_of(vectors, steer, opened.anatomy.layers, opened.anatomy.d_model)
    encoded = share_prefix(opened.renderer.encode(prompts), share=False)
    model, tokenizer = opened.loaded.model, opened.loaded.tokenizer
    blocks = [model.get_submodule(one) for one in opened.anatomy.blocks]
    size = auto_batch_size(model, opened.loading.rows)
    answers: dict[str, dict[str, list[AnswerPart]]] = {}
    doses: tuple[float | None, ...] = (None, *steer.doses)
    with (monitor or Monitor()).phase("answers", len(prompts) * len(doses)) as advance:
        for dose in doses:
            state = contextlib.nullcontext() if dose is None else steered(blocks, steering.by(dose))
            with state:
                found = complete(model, tokenizer, encoded, max_new_tokens, size, advance)
            answers[named(dose)] = {GIVEN: [_unjudged(*pair) for pair in zip(prompts, found, strict=True)]}
    said = _said(opened.loaded.files.name, name, steering, vectors)
    return SteeringPart(**said, max_new_tokens=max_new_tokens, answers=answers)


def _unjudged(prompt: str, found: Reply) -> AnswerPart:
    tokens = len(found.tokens)
    return AnswerPart(prompt=prompt, label="", evidence="", tokens=tokens, text=found.text, redacted=False)


def named(dose: float | None) -> str:
    """The key of a coefficient's answers."""
    return AS_IT_IS if dose is None else f"{dose:g}"


def _said(model: str, name: str, steering: Steering, vectors: SteeringVectors) -> dict[str, Any]:
    """What is done, as it stands in the record."""
    fields = ("operation", "tokens", "layers", "lengths")
    return {"model": model, "direction": name, "unit": vectors.unit} | {key: getattr(steering, key) for key in fields}
