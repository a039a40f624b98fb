"""An evaluation: the original, the edited model and a random control, on the same held-out prompts.

`Examiner` asks and judges, whoever answers; `examine` does it with live models, where next-token distributions can be
compared too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from abliterate.algebra import orthonormal
from abliterate.config import (
    CapabilitySettings,
    EditSettings,
    EvalSettings,
    MeasureSettings,
    ReplySettings,
    ThinkingSettings,
)
from abliterate.edit.direction import Direction, Recipe
from abliterate.edit.plan import Plan
from abliterate.errors import UsageError
from abliterate.evaluation.answering import Answering, ModelState, as_loaded
from abliterate.evaluation.capability import (
    Score,
    Task,
    TaskResult,
    Way,
    check,
    check_task_files,
    lm_eval_tasks,
    load_tasks,
)
from abliterate.evaluation.judging import Exchange, Judge, RuleJudge
from abliterate.evaluation.judging.calibration import own_calibrations
from abliterate.evaluation.judging.choice import PendingJudge, bind_judge, judge_of, opening
from abliterate.evaluation.judging.scorers import ScorerJudge
from abliterate.evaluation.results import Answers, Shift, judged, measure_shift
from abliterate.model.batches import Encoded, share_prefixes
from abliterate.model.decoding import GREEDY, Decoding, asked_by, decoding_of, in_words
from abliterate.model.generation import Reply
from abliterate.model.offloaded import value_of
from abliterate.monitor import Monitor, ranks
from abliterate.prompts import Behaviour, ChatRenderer, ContrastiveSet, load_behaviour
from abliterate.prompts.thinking import answer_of, opens_thinking
from abliterate.session import Session, open_session

#: Harmless test prompts whose answers are compared token by token: for the edit, and for the random control.
SHIFT_PROMPTS, CONTROL_SHIFT_PROMPTS = 64, 16

Sets = dict[str, Answers]


@dataclass(frozen=True)
class Examiner:
    """Held-out prompts by set, as text and (with closed thinking) as tokens, how replies are made, and who judges them.

    Where `decoding` samples, each prompt is answered `settings.samples` times: first all prompts once, then again.
    """

    renderer: ChatRenderer
    prompts: ContrastiveSet
    texts: Mapping[str, Sequence[str]]
    closed: Mapping[str, Encoded]
    settings: EvalSettings
    judge: Judge
    monitor: Monitor
    decoding: Decoding = GREEDY

    @property
    def thinks_first(self) -> bool:
        """Whether what is asked first, and measured token by token, is asked with open thinking."""
        return self.settings.thinking == "open"

    @property
    def encoded(self) -> Mapping[str, Encoded]:
        """The prompts as they are asked first."""
        return self.open if self.thinks_first else self.closed

    def ask(self, answering: Answering, name: str, *, thinking: bool = False) -> Sets:
        """Judged replies to the prompts of all sets, with the model's thinking closed or open."""
        encoded = self.open if thinking else self.closed
        limit = self.settings.max_new_tokens + (self.settings.thinking_tokens if thinking else 0)
        joined = functools.reduce(Encoded.__add__, encoded.values())
        decoding, times = self.decoding if thinking else self._stopping(), self.settings.samples
        sets, start = {}, 0
        with self.monitor.phase(name, times * len(joined)) as advance:
            rounds = [
                answering.complete(joined, limit, advance, replace(decoding, sample=number)) for number in range(times)
            ]
            for key, texts in self.texts.items():
                asked = [*texts] * times
                part = [reply for replies in rounds for reply in replies[start : start + len(texts)]]
                sets[key] = judged(asked, part, self._answers(asked, part, thinking), self.judge)
                start += len(texts)
            tallies = {key: answers.tally for key, answers in sets.items()}
            names = self.prompts.behaviour.names
            said = ", ".join(f"{tally.refusals}/{tally.n} {names[key]}" for key, tally in tallies.items() if tally.n)
            self.monitor.note(f"{self.prompts.behaviour.said}: {said}")
        return sets

    def few(self, count: int) -> Examiner:
        """The same with the first `count` prompts of every set."""
        texts = {name: texts[:count] for name, texts in self.texts.items()}
        closed = {name: prompts.take(range(len(prompts))[:count]) for name, prompts in self.closed.items()}
        return replace(self, texts=texts, closed=closed)

    def _stopping(self) -> Decoding:
        """The decoding; with an early stop it leaves refusals, but not those to harmless prompts: lengths count."""
        judge = self.judge
        if not self.settings.early_stop or not isinstance(judge, RuleJudge):
            return self.decoding
        prompts = [(key, text) for key, texts in self.texts.items() for text in texts]

        def settled(rows: Sequence[int], replies: Sequence[str]) -> list[bool]:
            decided = judge.settled(
                [Exchange(prompts[row][1], reply) for row, reply in zip(rows, replies, strict=True)]
            )
            return [prompts[row][0] != "harmless" and known for row, known in zip(rows, decided, strict=True)]

        rule = " ".join([judge.fingerprint, *(f"{name}:{len(texts)}" for name, texts in self.texts.items())])
        return replace(self.decoding, settled=settled, rule=rule)

    @functools.cached_property
    def open(self) -> Mapping[str, Encoded]:
        """The prompts rendered with the thinking left open, tokenised once."""
        renderer = replace(self.renderer, thinking=True)
        sequences = {key: renderer.encode(texts) for key, texts in self.texts.items()}
        return share_prefixes(sequences, share=bool(self._prefix))

    @property
    def _prefix(self) -> tuple[int, ...]:
        return next(iter(self.closed.values())).prefix

    def _answers(self, prompts: Sequence[str], replies: Sequence[Reply], thinking: bool) -> list[str | None]:
        """What the judge reads: replies, or what follows their thinking; None where that never ended.

        Some models think though the prompt closes it.
        """
        renderer, answers = replace(self.renderer, thinking=thinking), []
        for prompt, reply in zip(prompts, replies, strict=True):
            # Some models mark their thinking with special tokens, which `reply.text` leaves out.
            text = renderer.tokenizer.decode(list(reply.tokens))
            answer, finished = answer_of(text, thinking and opens_thinking(renderer.render(prompt)))
            answers.append((reply.text if answer == text else answer) if finished else None)
        return answers


@dataclass(frozen=True, slots=True)
class CapabilityScores:
    """Results of an exam."""

    files: tuple[TaskResult, ...] = ()
    tasks: tuple[Score, ...] = ()


NO_SCORES = CapabilityScores()


@dataclass(frozen=True, slots=True)
class Exam:
    """Questions on what a model can do: local files, and tasks of lm-eval."""

    files: tuple[Task, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    way: Way = "letter"
    seed: int = 0
    trust_task_code: bool = False

    def take(self, state: ModelState, name: str) -> CapabilityScores:
        """The results of a model in its state."""
        if not (self.files or self.tasks):
            return NO_SCORES
        questions = sum(len(task.items) for task in self.files)
        with state.state(), state.session.monitor.phase(name, questions or None) as advance:
            return CapabilityScores(tuple(self._check(state, advance)), self._harness(state))

    def _harness(self, state: ModelState) -> tuple[Score, ...]:
        if not self.tasks:
            return ()
        rows, tokenizer = state.session.size.rows, state.session.loaded.tokenizer
        scores = lm_eval_tasks(
            state.model,
            tokenizer,
            self.tasks,
            limit=self.limit,
            batch_size=rows,
            seed=self.seed,
            trust_task_code=self.trust_task_code,
        )
        return tuple(scores)

    def _check(self, state: ModelState, progress: Callable[[int], None]) -> list[TaskResult]:
        session = state.session
        return check(state.model, session.renderer, self.files, session.size, progress, way=self.way)


def exam_of(settings: CapabilitySettings, seed: int = 0) -> Exam:
    """The exam that settings ask for, read before any model is loaded.

    Raises `UsageError` for a file that holds no questions or names code that is not trusted, and when the extra for
    lm-eval is missing.
    """
    if settings.tasks and ranks.count() > 1:
        raise UsageError("--tasks: lm-eval runs in one process; leave it out, or start abliterate without torchrun")
    if settings.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks: it needs an extra; pip install 'abliterate[eval]'")
    files = load_tasks([Path(name) for name in _names(settings.capability)], settings.task_limit, seed)
    tasks, trusted = _names(settings.tasks), settings.trust_task_code
    if tasks and not trusted:
        check_task_files(tasks)
    return Exam(tuple(files), tasks, settings.task_limit, settings.multiple_choice, seed, trusted)


def _names(option: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (option or "").split(",") if name.strip())


@dataclass(frozen=True, slots=True)
class RandomControl:
    """A random direction in the edit's place. Sizes are relative changes of the edited weights."""

    state: ModelState
    seed: int
    size: float | None
    size_of_edit: float | None


@dataclass(frozen=True, slots=True)
class ControlEffect:
    """What the control did: its answers to the first prompts, beside those `before` to the same."""

    control: RandomControl
    answers: Sets
    before: Sets
    shift: Shift


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that was measured of `model`; alone only `before`. `thinking` has the answers with open thinking."""

    model: str
    settings: EvalSettings
    judge: Judge
    prompts: ContrastiveSet
    before: Sets
    after: Sets | None = None
    shift: Shift | None = None
    control: ControlEffect | None = None
    thinking: tuple[Sets, Sets | None] | None = None
    capability: tuple[CapabilityScores, CapabilityScores | None] = (NO_SCORES, None)
    engine: str = "transformers"
    decoding: Decoding = GREEDY


def ready_judge(settings: ReplySettings, behaviour: Behaviour, device: str, monitor: Monitor) -> Judge:
    """The judge that settings name, else that of the behaviour.

    One that may fail has read a reply before hours of work depend on it. One that asks the measured model is bound to
    it by `bind_judge`, once it is loaded. Of `auto` an early stop makes `rules`, which alone can say what is certain
    early.

    Raises `UsageError` for a spec that names none, `AbliterateError` when it cannot be reached or used; warns when it
    gives no verdict.
    """
    named = "rules" if settings.early_stop and settings.judge == "auto" else settings.judge
    with opening(named or behaviour.shows.judge, monitor):
        judge = judge_of(behaviour, named, device=device)
    own_calibrations(judge)  # a damaged one is an error now and not at the end
    if isinstance(judge, RuleJudge | PendingJudge | ScorerJudge):
        return judge
    with monitor.phase("try the judge"):
        (verdict,) = judge.judge([Exchange("What is the capital of France?", "The capital of France is Paris.")])
    if not verdict.given:
        monitor.warn(
            f"judge {judge.name}: no verdict on a plain answer ({verdict.evidence}); others may be unknown too"
        )
    return judge


def open_judged(model: str, measuring: MeasureSettings, monitor: Monitor) -> tuple[Session, Judge]:
    """A model's session and the judge that settings name, which was tried before the model was loaded.

    Raises `UsageError` for a behaviour that is no refusal: what is done with these is about refusals.
    """
    behaviour = load_behaviour(measuring.prompts.behaviour)
    if not behaviour.of_refusal or behaviour.keep is not None:
        raise UsageError(
            f"--behaviour {behaviour.name}: expected one of refusing here; audit, harden and repair know no other"
        )
    judge = ready_judge(measuring.evaluating, behaviour, measuring.loading.judge_device, monitor)
    session = open_session(
        model,
        loading=measuring.loading,
        prompts=measuring.prompts,
        reply_tokens=measuring.evaluating.longest_reply,
        monitor=monitor,
    )
    return session, bind_judge(judge, as_loaded(session), monitor)


def examiner_of(session: Session, settings: ReplySettings, judge: Judge, sets: Sequence[str] | None = None) -> Examiner:
    """An examiner with the held-out prompts of a session: of all its sets, or of those named.

    Raises `UsageError` for an early stop by a judge that cannot say what is certain, or of open thinking.
    """
    if settings.early_stop and not isinstance(judge, RuleJudge):
        raise UsageError(f"--early-stop: only --judge rules can say what is certain early, found {judge.name}")
    whole = settings if isinstance(settings, EvalSettings) else EvalSettings(**settings.model_dump())
    _say_whether_it_thinks(session, whole)
    if settings.early_stop and whole.thinking == "open":
        raise UsageError("--early-stop: expected closed thinking with it, found --thinking open")
    texts = {name: texts for name, texts in session.test_texts.items() if sets is None or name in sets}
    encoded = {name: session.encoded[name, "test"] for name in texts}
    decoding = chosen_decoding(session.model.generation_config, whole, session.seed, session.monitor)
    return Examiner(session.renderer, session.prompts, texts, encoded, whole, judge, session.monitor, decoding)


def chosen_decoding(generation_config: Any, settings: ReplySettings, seed: int, monitor: Monitor) -> Decoding:
    """How replies are decoded; greedy ones say, once, what the model's generation configuration would have asked for.

    Raises `UsageError` as `decoding_of` does, and for several samples where nothing is drawn.
    """
    if settings.decoding == "greedy":
        if asked := asked_by(generation_config):
            said = (
                f"the model's generation_config asks for {in_words(asked)}: replies here are plain greedy "
                "(--decoding model does as it asks)"
            )
            if said not in monitor.warnings:
                monitor.warn(said)
        return GREEDY
    found = decoding_of(generation_config, seed)
    if settings.samples > 1 and not found.samples:
        raise UsageError(
            f"--samples {settings.samples}: the model's generation_config asks for no sampling, so that all replies to "
            "a prompt would be alike"
        )
    return found


def _say_whether_it_thinks(session: Session, settings: ThinkingSettings) -> None:
    text = next(iter(session.prompts.harmful.test))
    renderer = session.renderer
    if settings.thinking != "closed" and renderer.render(text) == replace(renderer, thinking=True).render(text):
        session.monitor.warn(
            f"--thinking {settings.thinking}: the chat template renders prompts the same with open and with closed "
            "thinking; this model may not think"
        )


def examine(
    examiner: Examiner,
    exam: Exam,
    base: ModelState,
    edited: ModelState | None = None,
    control: RandomControl | None = None,
) -> Evaluation:
    """Ask the original and the edited model the same, and the control the first of it; compare their distributions."""
    before, after = _answered(examiner, base, edited, thinking=examiner.thinks_first)
    shift = None if edited is None else shift_of(examiner, base, edited, before)
    effect = None if control is None else _controlled(examiner, base, control, before)
    _say_shifts(base.session, {"the edit": shift, "the random direction": None if effect is None else effect.shift})
    thinking = _answered(examiner, base, edited, thinking=True) if examiner.settings.thinking == "both" else None
    scores = exam.take(base, "capability before")
    return Evaluation(
        base.session.loaded.files.name,
        examiner.settings,
        examiner.judge,
        examiner.prompts,
        before,
        after,
        shift,
        effect,
        thinking,
        (scores, None if edited is None else exam.take(edited, "capability after")),
        decoding=examiner.decoding,
    )


def examine_engine(
    examiner: Examiner, name: str, base: Answering, edited: Answering | None = None, *, model: str = ""
) -> Evaluation:
    """Ask `model`, and an edited one, behind the engine `name`. It gives replies only: no shift and no control."""
    before, after = _answered(examiner, base, edited, thinking=examiner.thinks_first)
    thinking = _answered(examiner, base, edited, thinking=True) if examiner.settings.thinking == "both" else None
    settings, judge, prompts = examiner.settings, examiner.judge, examiner.prompts
    return Evaluation(
        model, settings, judge, prompts, before, after, thinking=thinking, engine=name, decoding=examiner.decoding
    )


def _answered(
    examiner: Examiner, base: Answering, edited: Answering | None, *, thinking: bool
) -> tuple[Sets, Sets | None]:
    """Answers before and, of an edited model, after."""
    end = ", thinking" if thinking and not examiner.thinks_first else ""
    if edited is None:
        return examiner.ask(base, f"answers{end}", thinking=thinking), None
    before = examiner.ask(base, f"answers before{end}", thinking=thinking)
    return before, examiner.ask(edited, f"answers after{end}", thinking=thinking)


def _controlled(examiner: Examiner, base: ModelState, control: RandomControl, before: Sets) -> ControlEffect:
    few = examiner.few(examiner.settings.control_prompts)
    answers = few.ask(control.state, "answers: random direction", thinking=few.thinks_first)
    first = {name: before[name].to(answers[name].prompts) for name in answers}
    return ControlEffect(control, answers, first, shift_of(few, base, control.state, first, CONTROL_SHIFT_PROMPTS))


def _say_shifts(session: Session, shifts: Mapping[str, Shift | None]) -> None:
    for name, shift in shifts.items():
        if shift is not None and shift.kl_first is not None and shift.kl_reply is not None:
            first, whole = shift.kl_first.mean.value, shift.kl_reply.mean.value
            session.monitor.note(f"KL of {name}: {first:.3f} nats at the first token, {whole:.3f} over replies")


def shift_of(
    examiner: Examiner, base: ModelState, edited: ModelState, before: Sets, most: int = SHIFT_PROMPTS
) -> Shift:
    """How far answers to the first harmless prompts moved, to `most` of them."""
    session, encoded = base.session, examiner.encoded["harmless"]
    answers = before["harmless"]
    rows = range(min(most, len(encoded)))
    texts, replies = [answers.prompts[row] for row in rows], [answers.replies[row] for row in rows]
    with session.monitor.phase(
        f"shift on {examiner.prompts.behaviour.names['harmless']} prompts", len(rows)
    ) as advance:
        return measure_shift(base, edited, texts, encoded.take(rows), replies, session.size, advance)


def control_of(plan: Plan, base: ModelState) -> RandomControl:
    """A random direction on the same writers at the same strengths, as hooks on `base`."""
    session = base.session
    other = random_plan(session, plan)
    with base.state():
        sizes = [relative_change(session.model, one) for one in (other, plan)]
    return RandomControl(_hooked(base, other), session.seed, *sizes)


def random_plan(session: Session, plan: Plan) -> Plan:
    """`plan` with random orthonormal directions in place of its own, plain where it is a variant."""
    rank, width = plan.direction.shape
    recipe = Recipe({edit.writer.name: edit.strength for edit in plan.edits})
    return session.plan(random_direction(rank, width, session.seed, recipe), EditSettings(untie=plan.untie))


def random_direction(rank: int, width: int, seed: int, recipe: Recipe | None = None) -> Direction:
    """Random orthonormal vectors [rank, width], to be taken out by `recipe`."""
    generator = torch.Generator().manual_seed(seed)
    return Direction(orthonormal(torch.randn(rank, width, generator=generator)), recipe=recipe)


def relative_change(model: Any, plan: Plan) -> float | None:
    """‖s L R W‖ / ‖W‖ over all weights that a plan edits: what is taken out. None where live weights are codes."""
    taken = total = 0.0
    for edit in plan.edits:
        if edit.writer.weight is None:
            continue
        weight = value_of(model, edit.writer.weight)
        if not weight.is_floating_point():
            return None
        # In the weight's own precision: a float32 copy of an embedding takes longer than all the rest.
        inside = (weight.movedim(edit.writer.axis, -1) @ edit.reads.T.to(weight)).float()
        gram = (edit.basis @ edit.basis.T).to(inside)
        taken += edit.strength**2 * float(((inside @ gram) * inside).sum())
        total += float(torch.linalg.vector_norm(weight, dtype=torch.float32)) ** 2
    return (taken / total) ** 0.5 if total else None


def _hooked(base: ModelState, plan: Plan) -> ModelState:
    @contextlib.contextmanager
    def state() -> Iterator[None]:
        with base.state(), base.session.ablated(plan):
            yield

    return ModelState(base.session, state)
