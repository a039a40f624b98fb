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
from typing import Any, Protocol

import torch

from abliterate.algebra import orthonormal
from abliterate.config import EditSettings, EvalSettings
from abliterate.edit.direction import Direction, Recipe
from abliterate.edit.plan import Plan
from abliterate.errors import UsageError
from abliterate.evaluation.capability import Score, Task, TaskResult, Way, check, lm_eval_tasks, load_tasks
from abliterate.evaluation.engines import Engine
from abliterate.evaluation.judging import Exchange, Judge, Label, RuleJudge
from abliterate.evaluation.judging.calibration import calibration_of
from abliterate.evaluation.reply_cache import keep, kept_replies, key_of
from abliterate.evaluation.results import Answers, Shift, Subject, judged, measure_shifts
from abliterate.model.batches import Encoded, share_prefixes
from abliterate.model.generation import Reply, Settled, complete
from abliterate.monitor import Monitor
from abliterate.prompts import ChatRenderer, ContrastiveSet
from abliterate.prompts.thinking import answer_of, opens_thinking
from abliterate.record import FILE_NAME
from abliterate.session import Session

#: Harmless test prompts whose answers are compared token by token.
SHIFT_PROMPTS = 64

Sets = dict[str, Answers]


class Answering(Protocol):
    """Whatever gives greedy replies to encoded prompts: at most so many tokens, reporting progress.

    It may leave replies that are settled.
    """

    def __call__(
        self, prompts: Encoded, max_new_tokens: int, progress: Callable[[int], None], settled: Settled | None, /
    ) -> list[Reply]:
        """Replies in the order of the prompts."""
        ...


@dataclass(frozen=True, slots=True)
class Examiner:
    """Held-out prompts by set, as text and (with closed thinking) as tokens, and who judges the replies."""

    renderer: ChatRenderer
    prompts: ContrastiveSet
    texts: Mapping[str, Sequence[str]]
    closed: Mapping[str, Encoded]
    settings: EvalSettings
    judge: Judge
    monitor: Monitor

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
        settled = None if thinking else self._settled()
        sets, start = {}, 0
        with self.monitor.phase(name, len(joined)) as advance:
            replies = answering(joined, limit, advance, settled)
            for key, texts in self.texts.items():
                part = replies[start : start + len(texts)]
                sets[key] = judged(texts, part, self._answers(texts, part, thinking), self.judge)
                start += len(part)
            tallies = {key: answers.tally for key, answers in sets.items()}
            said = ", ".join(f"{tally.refusals}/{tally.n} {key}" for key, tally in tallies.items() if tally.n)
            self.monitor.note(f"refused: {said}")
        return sets

    def _settled(self) -> Settled | None:
        """Which replies need not go on: refusals, and none to harmless prompts, whose length is measured."""
        judge = self.judge
        if not self.settings.early_stop or not isinstance(judge, RuleJudge):
            return None
        prompts = [(key, text) for key, texts in self.texts.items() for text in texts]

        def settled(rows: Sequence[int], replies: Sequence[str]) -> list[bool]:
            decided = judge.settled(
                [Exchange(prompts[row][1], reply) for row, reply in zip(rows, replies, strict=True)]
            )
            return [prompts[row][0] != "harmless" and known for row, known in zip(rows, decided, strict=True)]

        return settled

    @property
    def stopping(self) -> str:
        """What settles replies early: the judge, and the set of every prompt."""
        return " ".join([self.judge.fingerprint, *(f"{name}:{len(texts)}" for name, texts in self.texts.items())])

    @property
    def open(self) -> Mapping[str, Encoded]:
        """The prompts rendered with the thinking left open."""
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
class Marks:
    """Results of an exam."""

    files: tuple[TaskResult, ...] = ()
    tasks: tuple[Score, ...] = ()


NO_MARKS = Marks()


@dataclass(frozen=True, slots=True)
class Exam:
    """Questions on what a model can do: local files, and tasks of lm-eval."""

    files: tuple[Task, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    way: Way = "letter"
    seed: int = 0

    def take(self, session: Session, subject: Subject, name: str) -> Marks:
        """The results of a model in its state."""
        if not (self.files or self.tasks):
            return NO_MARKS
        questions = sum(len(task.items) for task in self.files)
        with subject.state(), session.monitor.phase(name, questions or None) as advance:
            return Marks(
                tuple(self._check(session, subject, advance)),
                self._harness(session, subject),
            )

    def _harness(self, session: Session, subject: Subject) -> tuple[Score, ...]:
        if not self.tasks:
            return ()
        rows, tokenizer = session.size.rows, session.loaded.tokenizer
        scores = lm_eval_tasks(subject.model, tokenizer, self.tasks, limit=self.limit, batch_size=rows, seed=self.seed)
        return tuple(scores)

    def _check(self, session: Session, subject: Subject, progress: Callable[[int], None]) -> list[TaskResult]:
        tokenizer, renderer = session.loaded.tokenizer, session.renderer
        return check(subject.model, tokenizer, renderer, self.files, session.size, progress, way=self.way)


def exam_of(settings: EvalSettings, seed: int = 0) -> Exam:
    """The exam that settings ask for, read before any model is loaded.

    Raises `UsageError` for a file that holds no questions, and when the extra for lm-eval is missing.
    """
    if settings.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks: it needs an extra; pip install 'abliterate[eval]'")
    files = load_tasks([Path(name) for name in _names(settings.capability)], settings.task_limit, seed)
    return Exam(tuple(files), _names(settings.tasks), settings.task_limit, settings.multiple_choice, seed)


def _names(option: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (option or "").split(",") if name.strip())


@dataclass(frozen=True, slots=True)
class Control:
    """A random direction in the edit's place. Sizes are relative changes of the edited weights."""

    subject: Subject
    seed: int
    size: float | None
    size_of_edit: float | None


@dataclass(frozen=True, slots=True)
class ControlEffect:
    """What the control did."""

    control: Control
    answers: Sets
    shift: Shift


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that was measured; of one model alone only `before`. `thinking` has the answers with open thinking."""

    settings: EvalSettings
    judge: Judge
    prompts: ContrastiveSet
    before: Sets
    after: Sets | None = None
    shift: Shift | None = None
    control: ControlEffect | None = None
    thinking: tuple[Sets, Sets | None] | None = None
    marks: tuple[Marks, Marks | None] = (NO_MARKS, None)
    engine: str = "transformers"


def try_judge(judge: Judge, monitor: Monitor) -> None:
    """Let a judge that may fail read one reply before hours of work depend on it.

    Raises `AbliterateError` when it cannot be reached or used; warns when it gives no verdict.
    """
    calibration_of(judge)  # a damaged one is an error now and not at the end
    if isinstance(judge, RuleJudge):
        return
    with monitor.phase("try the judge"):
        (verdict,) = judge.judge([Exchange("What is the capital of France?", "The capital of France is Paris.")])
    if verdict.label is Label.UNKNOWN:
        monitor.warn(
            f"judge {judge.name}: no verdict on a plain answer ({verdict.evidence}); others may be unknown too"
        )


def examiner_of(session: Session, settings: EvalSettings, judge: Judge, sets: Sequence[str] | None = None) -> Examiner:
    """An examiner with the held-out prompts of a session: of all its sets, or of those named.

    Raises `UsageError` for an early stop by a judge that cannot say what is certain, or of open thinking.
    """
    if settings.early_stop and not isinstance(judge, RuleJudge):
        raise UsageError(f"--early-stop: only --judge rules can say what is certain early, found {judge.name}")
    _say_whether_it_thinks(session, settings)
    if settings.early_stop and settings.thinking == "open":
        raise UsageError("--early-stop: expected closed thinking with it, found --thinking open")
    texts = {name: texts for name, texts in session.test_texts.items() if sets is None or name in sets}
    encoded = {name: session.encoded[name, "test"] for name in texts}
    return Examiner(session.renderer, session.prompts, texts, encoded, settings, judge, session.monitor)


def _say_whether_it_thinks(session: Session, settings: EvalSettings) -> None:
    text = next(iter(session.prompts.harmful.test))
    renderer = session.renderer
    if settings.thinking != "closed" and renderer.render(text) == replace(renderer, thinking=True).render(text):
        session.monitor.warn(
            f"--thinking {settings.thinking}: the chat template renders prompts the same with open and with closed "
            "thinking; this model may not think"
        )


def examine(
    session: Session,
    examiner: Examiner,
    exam: Exam,
    base: Subject,
    edited: Subject | None = None,
    control: Control | None = None,
) -> Evaluation:
    """Ask the original, the edited model and the control the same, and compare their distributions."""
    modes = {"closed": (False,), "open": (True,), "both": (False, True)}[examiner.settings.thinking]

    def ask(subject: Subject, name: str, thinking: bool = modes[0]) -> Sets:
        with subject.state():
            return examiner.ask(answers_of(session, subject, examiner), name, thinking=thinking)

    before = ask(base, "answers" if edited is None else "answers before")
    after = None if edited is None else ask(edited, "answers after")
    shown = None if control is None else ask(control.subject, "answers: random direction")
    shifts: list[Shift] = []
    if edited is not None:
        shifts = shift_of(session, examiner, base, [edited] + ([] if control is None else [control.subject]), before)
        _say_shifts(session, shifts)
    thinking = None
    if len(modes) > 1:
        first = ask(base, "answers before, thinking", True)
        thinking = first, None if edited is None else ask(edited, "answers after, thinking", True)
    marks = exam.take(session, base, "capability before")
    return Evaluation(
        examiner.settings,
        examiner.judge,
        examiner.prompts,
        before,
        after,
        shifts[0] if shifts else None,
        None if control is None or shown is None else ControlEffect(control, shown, shifts[1]),
        thinking,
        (marks, None if edited is None else exam.take(session, edited, "capability after")),
    )


def _say_shifts(session: Session, shifts: Sequence[Shift]) -> None:
    for name, shift in zip(("the edit", "the random direction"), shifts, strict=False):
        if shift.kl_first is not None and shift.kl_reply is not None:
            first, whole = shift.kl_first.mean.value, shift.kl_reply.mean.value
            session.monitor.note(f"KL of {name}: {first:.3f} nats at the first token, {whole:.3f} over replies")


def answers_of(session: Session, subject: Subject, examiner: Examiner) -> Answering:
    """Replies of a live model in the state in which it is; those of unchanged models are kept and taken up again."""

    def answering(
        prompts: Encoded, max_new_tokens: int, progress: Callable[[int], None], settled: Settled | None, /
    ) -> list[Reply]:
        tokenizer, key = session.loaded.tokenizer, None
        if subject.unchanged is not None and not examiner.settings.no_cache:
            stopping = "" if settled is None else examiner.stopping
            key = key_of(subject.unchanged, prompts, max_new_tokens, stopping=stopping)
        if (kept := kept_replies(key, tokenizer)) is not None:
            session.monitor.note("answers of the unchanged model taken from the cache (--no-cache asks again)")
            progress(len(kept))
            return kept
        replies = complete(subject.model, tokenizer, prompts, max_new_tokens, session.size, progress, settled)
        keep(key, replies)
        return replies

    return answering


def examine_engine(engine: Engine, examiner: Examiner, *, edited: bool) -> Evaluation:
    """Ask the models behind an engine. It gives replies only: there is no shift and no control."""

    def answering(
        prompts: Encoded, max_new_tokens: int, progress: Callable[[int], None], _: Settled | None, /
    ) -> list[Reply]:
        return engine.complete([prompts.prefix + suffix for suffix in prompts.suffixes], max_new_tokens, progress)

    def ask(name: str, thinking: bool) -> tuple[Sets, Sets | None]:
        before = examiner.ask(answering, f"{name} before" if edited else name, thinking=thinking)
        if not edited:
            return before, None
        with engine.edited():
            return before, examiner.ask(answering, f"{name} after", thinking=thinking)

    before, after = ask("answers", examiner.thinks_first)
    thinking = ask("answers, thinking", True) if examiner.settings.thinking == "both" else None
    return Evaluation(
        examiner.settings, examiner.judge, examiner.prompts, before, after, thinking=thinking, engine=engine.name
    )


def shift_of(
    session: Session, examiner: Examiner, base: Subject, edited: Sequence[Subject], before: Sets
) -> list[Shift]:
    """How far answers to harmless prompts moved, for each of `edited`."""
    encoded = examiner.encoded["harmless"]
    answers = before["harmless"]
    rows = range(min(SHIFT_PROMPTS, len(encoded)))
    texts, replies = [answers.prompts[row] for row in rows], [answers.replies[row] for row in rows]
    with session.monitor.phase("shift on harmless prompts", len(rows)) as advance:
        return measure_shifts(base, edited, texts, encoded.take(rows), replies, session.size, advance)


def as_loaded(session: Session) -> Subject:
    """A session's model as its files have it. Answers of models that this package has edited are not kept."""
    edited = (session.loaded.files.folder / FILE_NAME).exists()
    return Subject(session.model, unchanged=None if edited else session.loaded)


def control_of(session: Session, plan: Plan, seed: int, base: Subject) -> Control:
    """A random direction on the same writers at the same strengths, as hooks on `base`."""
    other = random_plan(session, plan, seed)
    with base.state():
        sizes = [relative_change(session.model, one) for one in (other, plan)]
    return Control(_hooked(session, base, other), seed, *sizes)


def random_plan(session: Session, plan: Plan, seed: int) -> Plan:
    """`plan` with random orthonormal directions in place of its own, plain where it is a variant."""
    rank, width = plan.direction.shape
    recipe = Recipe({edit.writer.name: edit.strength for edit in plan.edits})
    return session.plan(random_direction(rank, width, seed, recipe), EditSettings(untie=plan.untie))


def random_direction(rank: int, width: int, seed: int, recipe: Recipe | None = None) -> Direction:
    """Random orthonormal vectors [rank, width], to be taken out by `recipe`."""
    generator = torch.Generator().manual_seed(seed)
    return Direction(orthonormal(torch.randn(rank, width, generator=generator)), {}, recipe=recipe)


def relative_change(model: Any, plan: Plan) -> float | None:
    """‖s L R W‖ / ‖W‖ over all weights that a plan edits: what is taken out. None where live weights are codes."""
    taken = total = 0.0
    for edit in plan.edits:
        if edit.writer.weight is None:
            continue
        weight = model.get_parameter(edit.writer.weight).detach()
        if not weight.is_floating_point():
            return None
        # In the weight's own precision: a float32 copy of an embedding takes longer than all the rest.
        inside = (weight.movedim(edit.writer.axis, -1) @ edit.reads.T.to(weight)).float()
        gram = (edit.basis @ edit.basis.T).to(inside)
        taken += edit.strength**2 * float(((inside @ gram) * inside).sum())
        total += float(torch.linalg.vector_norm(weight, dtype=torch.float32)) ** 2
    return (taken / total) ** 0.5 if total else None


def _hooked(session: Session, base: Subject, plan: Plan) -> Subject:
    @contextlib.contextmanager
    def state() -> Iterator[None]:
        with base.state(), session.ablated(plan):
            yield

    return Subject(base.model, state)
