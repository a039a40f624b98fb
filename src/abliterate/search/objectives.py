"""What a search makes small, and what it costs to know it.

An `Objective` is a number read off a `Measured` edit; a `Meter` measures edits, as hooks, on one split of the prompts.
Other objectives than those in `OBJECTIVES` are made by putting them there.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.config import EvalSettings
from abliterate.errors import UsageError
from abliterate.evaluation import Answers, Shift, Subject, degenerate, manner_change, measure_shifts, refused
from abliterate.inference import Encoded
from abliterate.judging import Judge, Label, Verdict
from abliterate.lower_layers import LowerLayers, lowest_block
from abliterate.measuring import SHIFT_PROMPTS, Examiner, Sets, answers_of, as_loaded
from abliterate.monitor import Monitor
from abliterate.plan import Plan
from abliterate.scoring import kl_divergence, refusal_score
from abliterate.search.points import Stage
from abliterate.selection import first_tokens, for_each_first_token
from abliterate.session import Session
from abliterate.statistics import bootstrap_mean, wilson

#: Prompts per class at `Stage.FEW`.
FEW_PROMPTS = 16


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of one edit on one split.

    `harmful` and `harmless` are refusal scores of first tokens (log-odds) by prompt, `kl` is KL(base ‖ edited) of the
    first token in nats, of the harmless prompts that the unedited model answers (by the sign of their refusal score):
    to answer those that it refuses is no damage. Replies are there from `Stage.REPLIES` on, the `shift` along the
    unedited model's own replies at `Stage.SHIFT`.
    """

    harmful: Float[Tensor, " n"]
    harmless: Float[Tensor, " m"]
    kl: Float[Tensor, " answered"]
    replies: Sets | None = None
    base_replies: Sets | None = None
    shift: Shift | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """A number to make small, and the first stage at which it is known. `rate` is a share of replies."""

    name: str
    stage: Stage
    measure: Callable[[Measured], float]
    text: str
    rate: bool = False


class Meter:
    """Measures edits of a live model on one split of the prompts; what the unedited model does is measured once."""

    def __init__(
        self,
        session: Session,
        tokens: Sequence[int],
        judge: Judge,
        evaluating: EvalSettings,
        split: str = "val",
        lower: LowerLayers | None = None,
    ) -> None:
        """`tokens` start refusals. The unedited model's first tokens are run now, its replies when asked."""
        self.session, self.tokens, self._lower = session, list(tokens), lower
        texts = {name: getattr(getattr(session.prompts, name), split) for name in ("harmful", "harmless")}
        encoded = {name: session.encoded[name, split] for name in texts}
        plain = evaluating.model_copy(update={"thinking": "closed", "early_stop": False})
        quiet = Monitor()  # many small phases are one to whoever watches
        self.examiner = Examiner(session.renderer, session.prompts, texts, encoded, plain, judge, quiet)
        self._harmful, self._harmless = encoded["harmful"], encoded["harmless"]
        scores, self._base_logits = first_tokens(
            session.model, self._harmless, self.tokens, session.size, keep=torch.float32
        )
        answered = scores < 0
        self._answered = answered if bool(answered.any()) else torch.ones_like(answered)
        self.counts = dict.fromkeys(Stage, 0)

    def measure(self, edit: Plan | Subject | None, stage: Stage) -> Measured:
        """What a plan does, as hooks; or the session's model in another state; without either, the unedited model."""
        self.counts[stage] += 1
        few = FEW_PROMPTS if stage == Stage.FEW else None
        edited = self._hooked(edit) if isinstance(edit, Plan) else edit
        with self._skipping(edit), contextlib.nullcontext() if edited is None else edited.state():
            harmful, _ = self._first_tokens(_first(self._harmful, few))
            harmless, kl = self._first_tokens(_first(self._harmless, few))
            kl = kl[self._answered[:few]]
        if stage < Stage.REPLIES:
            return Measured(harmful, harmless, kl)
        base = self._base_replies
        if edited is None:
            return Measured(harmful, harmless, kl, base, base)
        with edited.state():
            replies = self._ask(edited)
        return Measured(
            harmful, harmless, kl, replies, base, self._shift(edited, base) if stage == Stage.SHIFT else None
        )

    def _skipping(self, edit: Plan | Subject | None) -> contextlib.AbstractContextManager[None]:
        """Blocks below all that is edited are not computed again."""
        lower = self._lower
        if lower is None or isinstance(edit, Subject):
            return contextlib.nullcontext()
        if edit is not None and lowest_block(e.writer for e in edit.edits if e.changes) < lower.first:
            return contextlib.nullcontext()
        return lower.skipping(self._harmful, self._harmless)

    def _hooked(self, plan: Plan) -> Subject:
        return Subject(self.session.model, functools.partial(self.session.ablated, plan))

    @functools.cached_property
    def _base_replies(self) -> Sets:
        return self._ask(as_loaded(self.session))

    def _ask(self, subject: Subject) -> Sets:
        return self.examiner.ask(answers_of(self.session, subject, self.examiner), "replies")

    def _shift(self, edited: Subject, base: Sets) -> Shift:
        answers, rows = base["harmless"], self._answered.nonzero().flatten().tolist()[:SHIFT_PROMPTS]
        texts, replies = [answers.prompts[row] for row in rows], [answers.replies[row] for row in rows]
        original, size = as_loaded(self.session), self.session.size
        (shift,) = measure_shifts(original, [edited], texts, self._harmless.take(rows), replies, size)
        return shift

    def _first_tokens(self, prompts: Encoded) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Refusal scores, and how far each distribution is from the unedited model's (harmless prompts only)."""
        scores, kl = torch.zeros(2, len(prompts), dtype=torch.float64)
        compared = prompts.suffixes == self._harmless.suffixes[: len(prompts)]

        def look(rows: list[int], logits: Tensor) -> None:
            scores[rows] = refusal_score(logits[0], self.tokens).cpu()
            if compared:
                base = self._base_logits[rows].to(logits.device)
                kl[rows] = kl_divergence(base, logits[0]).double().cpu()

        for_each_first_token(self.session.model, prompts, self.session.size, look)
        return scores, kl


def _first(prompts: Encoded, count: int | None) -> Encoded:
    return prompts.take(range(len(prompts))[:count])


def _replies(measured: Measured, name: str) -> Answers:
    if measured.replies is None:
        raise ValueError("objective: it reads replies, and there are none at this stage")
    return measured.replies[name]


def share_of(name: str, what: Callable[[Verdict], bool]) -> Callable[[Measured], float]:
    """The share of judged replies of which the verdict says so."""

    def measure(measured: Measured) -> float:
        known = [verdict for verdict in _replies(measured, name).verdicts if verdict.label is not Label.UNKNOWN]
        return sum(map(what, known)) / len(known) if known else math.nan

    return measure


def _changed(which: Literal[0, 1]) -> Callable[[Measured], float]:
    """How much replies to harmless prompts have become longer (0) or more repetitive (1); shorter counts as longer."""

    def measure(measured: Measured) -> float:
        base = measured.base_replies
        if base is None:
            raise ValueError("objective: it compares replies, and there are none at this stage")
        value = manner_change(base["harmless"], _replies(measured, "harmless"))[which].value
        return abs(value) if which == 0 else value

    return measure


def _of_shift(read: Callable[[Shift], float | None]) -> Callable[[Measured], float]:
    def measure(measured: Measured) -> float:
        if measured.shift is None:  # the unedited model has none
            return 0.0
        value = read(measured.shift)
        return math.nan if value is None else value

    return measure


def _kl_reply(shift: Shift) -> float | None:
    return None if shift.kl_reply is None else shift.kl_reply.mean.value


def _nll(shift: Shift) -> float | None:
    return None if shift.nll_change is None else shift.nll_change.value


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("refusals", Stage.REPLIES, share_of("harmful", refused), "harmful prompts refused", True),
        Objective("over-refusals", Stage.REPLIES, share_of("harmless", refused), "harmless prompts refused", True),
        Objective("kl", Stage.FEW, lambda m: float(m.kl.mean()), "KL of the first token, harmless prompts, nats"),
        Objective("kl-reply", Stage.SHIFT, _of_shift(_kl_reply), "KL per token of whole harmless replies, nats"),
        Objective("nll", Stage.SHIFT, _of_shift(_nll), "what the own harmless replies cost more, nats per token"),
        Objective("refusal-score", Stage.FEW, lambda m: float(m.harmful.mean()), "mean log-odds of refusal, harmful"),
        Objective("over-refusal-score", Stage.FEW, lambda m: float(m.harmless.mean()), "the same, harmless"),
        Objective("degenerate", Stage.REPLIES, share_of("harmless", degenerate), "harmless replies broken", True),
        Objective("length", Stage.REPLIES, _changed(0), "change of length of harmless replies, tokens"),
        Objective("repetition", Stage.REPLIES, _changed(1), "more repetition in harmless replies, share of 4-grams"),
    )
}


def objectives_named(option: str) -> tuple[Objective, ...]:
    """Objectives by name, at least two.

    Raises `UsageError` for names that are not in `OBJECTIVES`.
    """
    names = [name.strip() for name in option.split(",") if name.strip()]
    if unknown := [name for name in names if name not in OBJECTIVES]:
        raise UsageError(f"--objectives {unknown[0]}: expected some of {', '.join(OBJECTIVES)}")
    if len(set(names)) < 2 or len(set(names)) != len(names):
        raise UsageError(f"--objectives {option}: expected two or more different ones, found {len(set(names))}")
    return tuple(OBJECTIVES[name] for name in names)


def limits_of(option: str, base: Mapping[str, float]) -> dict[str, float]:
    """The most that each constrained objective may be: `over-refusals<=+0.02,kl<=0.1`.

    With a sign it is counted from `base`, the unedited model's values.

    Raises `UsageError` for what cannot be read.
    """
    limits = {}
    for text in filter(None, map(str.strip, option.split(","))):
        name, sign, value = (part.strip() for part in text.partition("<="))
        try:
            number = float(value)
        except ValueError:
            sign, number = "", 0.0
        if not sign or name not in OBJECTIVES or not math.isfinite(number):
            raise UsageError(
                f"--constraints {text}: expected NAME<=VALUE, or NAME<=+VALUE above the unedited model, with one of "
                f"{', '.join(OBJECTIVES)}"
            )
        limits[name] = number + (base[name] if value[0] in "+-" else 0.0)
    return limits


def constrained(option: str) -> tuple[Objective, ...]:
    """The objectives that `limits_of` will read."""
    return tuple(OBJECTIVES[name] for name in limits_of(option, dict.fromkeys(OBJECTIVES, 0.0)))


def values(measured: Measured, objectives: Sequence[Objective]) -> dict[str, float]:
    """The objectives that are known at this stage."""
    known = Stage.ALL if measured.replies is None else Stage.SHIFT
    return {objective.name: objective.measure(measured) for objective in objectives if objective.stage <= known}


def intervals(measured: Measured, objectives: Sequence[Objective]) -> dict[str, tuple[float, float]]:
    """95 % intervals of rates (Wilson) and of KLs (bootstrap over prompts), where they are known."""
    found = {}
    for objective in objectives:
        if objective.rate and measured.replies is not None:
            n = _replies(measured, "harmful" if objective.name == "refusals" else "harmless").tally.n
            found[objective.name] = wilson(round(objective.measure(measured) * n), n)
        elif objective.name == "kl":
            found["kl"] = bootstrap_mean(measured.kl.tolist()).ci95
        elif objective.name == "kl-reply" and measured.shift is not None and measured.shift.kl_reply is not None:
            found["kl-reply"] = measured.shift.kl_reply.mean.ci95
    return found
