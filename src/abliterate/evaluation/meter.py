"""What an edit does to one split of the prompts, measured as closely as is asked for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.config import EvalSettings
from abliterate.edit.plan import Plan
from abliterate.evaluation.examine import SHIFT_PROMPTS, Examiner, Sets, answers_of, as_loaded
from abliterate.evaluation.first_tokens import first_tokens, for_each_first_token
from abliterate.evaluation.judging import Judge
from abliterate.evaluation.results import Shift, Subject, measure_shifts
from abliterate.evaluation.scores import kl_divergence, refusal_score
from abliterate.model.batches import Encoded
from abliterate.monitor import Monitor
from abliterate.session import Session

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


class Meter:
    """Measures edits of a live model on one split of the prompts; what the unedited model does is measured once."""

    def __init__(
        self,
        session: Session,
        tokens: Sequence[int],
        judge: Judge,
        evaluating: EvalSettings,
        split: str = "val",
    ) -> None:
        """`tokens` start refusals. The unedited model's first tokens are run now, its replies when asked."""
        self.session, self.tokens = session, list(tokens)
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
        with contextlib.nullcontext() if edited is None else edited.state():
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


class Stage(IntEnum):
    """How closely an edit was looked at: first tokens on few prompts, on all of them, replies, and what the unedited
    model's own replies have become worth.
    """

    FEW = 1
    ALL = 2
    REPLIES = 3
    SHIFT = 4
