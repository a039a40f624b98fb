"""What an edit does to one split of the prompts, measured as closely as is asked for.

One probe serves selection, search, forensics and evaluation. It knows what the unedited model does, and measures an
edit through hooks at one of four levels, each of which costs more than the one before: first tokens of few prompts,
first tokens of all, replies, and how far next-token distributions move along the unedited model's own replies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.config import EvalSettings, ReplySettings
from abliterate.edit.hooks import ablation, additions, go_together
from abliterate.edit.plan import Plan
from abliterate.errors import GateNotMet
from abliterate.evaluation.answering import ModelState, Unedited, as_loaded
from abliterate.evaluation.examine import SHIFT_PROMPTS, Examiner, Sets, chosen_decoding
from abliterate.evaluation.first_tokens import FirstTokens, first_tokens, for_each_first_token
from abliterate.evaluation.judging import Judge
from abliterate.evaluation.results import Shift, measure_shift
from abliterate.evaluation.scores import kl_divergence, refusal_score
from abliterate.model.batches import Encoded
from abliterate.model.offloaded import is_offloaded
from abliterate.monitor import Monitor
from abliterate.session import Session

#: Prompts per class at `Level.FEW`.
FEW_PROMPTS = 16

#: Interventions in one pass of a model whose weights stay where it computes.
_TOGETHER = 16

#: Fewer prompts than this in a class, and scores would say nothing.
MIN_PROMPTS = 4


class Level(IntEnum):
    """How closely an edit is measured; each level includes those below it."""

    FEW = 0
    ALL = 1
    REPLIES = 2
    SHIFT = 3


@dataclass(frozen=True, slots=True)
class Baseline:
    """First tokens of the unedited model: refusal scores (log-odds) by class, and logits of harmless prompts."""

    harmful: Float[Tensor, " n"]
    harmless: Float[Tensor, " m"]
    logits: Float[Tensor, "m vocab"]


@dataclass(frozen=True, slots=True)
class Behaving:
    """Prompts on which the unedited model behaves as their class says, as numbers of rows, and its mean scores there.

    The most refused harmful prompts come first.
    """

    harmful: tuple[int, ...]
    harmless: tuple[int, ...]
    harmful_score: float
    harmless_score: float

    @property
    def most(self) -> int:
        """Prompts of the larger class."""
        return max(len(self.harmful), len(self.harmless))


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of one edit on one split.

    `harmful` and `harmless` are refusal scores of first tokens (log-odds) by prompt, `kl` is KL(base ‖ edited) of the
    first token in nats, of the harmless prompts that the unedited model answers (by the sign of their refusal score):
    to answer those that it refuses is no damage. Replies are there from `Level.REPLIES` on, the `shift` along the
    unedited model's own replies at `Level.SHIFT`.
    """

    harmful: Float[Tensor, " n"]
    harmless: Float[Tensor, " m"]
    kl: Float[Tensor, " answered"]
    replies: Sets | None = None
    base_replies: Sets | None = None
    shift: Shift | None = None


class Probe:
    """Measures edits of a session's live model on one split of its prompts."""

    def __init__(
        self,
        session: Session,
        tokens: Sequence[int],
        split: str = "val",
        judge: Judge | None = None,
        settings: ReplySettings = ReplySettings(),
    ) -> None:
        """`tokens` start refusals; of pairs, "plain val" are validation prompts as a user asks them.

        What the unedited model does is measured once in a session. `judge` and `settings` are for levels from
        `Level.REPLIES` on.
        """
        self.session, self.tokens, self.split = session, list(tokens), split
        self._judge, self._settings = judge, settings
        self.harmful, self.harmless = session.encoded["harmful", split], session.encoded["harmless", split]
        self.counts = dict.fromkeys(Level, 0)

    @property
    def base(self) -> Baseline:
        """What the unedited model does. It is kept in the session, and must be asked for first without an edit."""
        if self._key not in self.session.kept:
            model, size = self.session.model, self.session.size
            self.know(
                first_tokens(model, self.harmful, self.tokens, size),
                first_tokens(model, self.harmless, self.tokens, size, keep=torch.float32),
            )
        found: Baseline = self.session.kept[self._key]
        return found

    def know(self, harmful: FirstTokens, harmless: FirstTokens) -> None:
        """Keep what the unedited model does, seen elsewhere; of harmless prompts with logits in float32."""
        self.session.kept[self._key] = Baseline(harmful.scores, harmless.scores, harmless.logits)

    @property
    def _key(self) -> tuple[object, ...]:
        return Baseline, self.split, tuple(self.tokens)

    @property
    def refused(self) -> dict[str, list[bool]]:
        """Whether the unedited model refuses, by the sign of the refusal score, for every prompt of each class."""
        return {"harmful": (self.base.harmful > 0).tolist(), "harmless": (self.base.harmless > 0).tolist()}

    def behaving(self, *, all_prompts: bool = False) -> Behaving:
        """Harmful prompts that the model refuses and harmless ones that it answers, as in the paper; or all of them.

        Raises `GateNotMet` when too few are left.
        """
        refusing, answering = self.base.harmful, self.base.harmless
        behaviour = self.session.prompts.behaviour
        more, less = behaviour.side_names
        shows, does_not = f"whose replies {behaviour.said}", "whose replies did not"
        if behaviour.of_refusal:
            shows, does_not = "that the model refuses", "that the model answers"
        order: list[int] = torch.argsort(refusing, descending=True).tolist()
        harmful = [row for row in order if all_prompts or refusing[row] > 0]
        harmless = [row for row in range(len(answering)) if all_prompts or answering[row] < 0]
        for name, rows, whole in (
            (f"{more} validation prompts {shows}", harmful, len(refusing)),
            (f"{less} validation prompts {does_not}", harmless, len(answering)),
        ):
            if len(rows) < MIN_PROMPTS:
                raise GateNotMet(f"{name}: expected at least {MIN_PROMPTS}, found {len(rows)} of {whole}")
        scores = float(refusing[harmful].mean()), float(answering[harmless].mean())
        return Behaving(tuple(harmful), tuple(harmless), *scores)

    def together(self, rows: Behaving, prompts: int | None = None) -> int:
        """How many interventions go through in one pass, on at most so many behaving prompts per class.

        Where weights are offloaded, as many as memory holds, so that they are fetched once for all.
        """
        size = self.session.size
        if not is_offloaded(self.session.model):
            return min(_TOGETHER, size.rows)
        both = self.harmful.take(rows.harmful[:prompts]) + self.harmless.take(rows.harmless[:prompts])
        tokens = len(both) * (len(both.prefix) + max(map(len, both.suffixes)))
        return max(1, min(size.rows // len(both), size.tokens // tokens))

    def ablated(self, plans: Sequence[Plan], rows: Behaving, prompts: int | None = None) -> list[tuple[float, float]]:
        """Bypass and KL of plans, several in one pass, on at most so many behaving prompts per class.

        Bypass is NaN where first tokens do not tell.
        """
        chosen = rows.harmful[:prompts] if self.tokens else (), rows.harmless[:prompts]
        harmful, harmless = self.harmful.take(chosen[0]), self.harmless.take(chosen[1])
        logits = self.base.logits[list(chosen[1])]
        with ablation(self.session.model, *plans):
            scores, kl = self._look(harmful + harmless, len(plans), logits, first=len(harmful))
        bypass = scores[:, : len(harmful)].mean(1).tolist()
        return list(zip(bypass, kl.mean(1).tolist(), strict=True))

    def ablated_each(self, plans: Sequence[Plan], rows: Behaving) -> list[tuple[float, float]]:
        """The same of plans that need not be alike: in one pass where they are."""
        if go_together(plans):
            return self.ablated(plans, rows)
        return [found for plan in plans for found in self.ablated([plan], rows)]

    def induced(
        self, raw: Float[Tensor, "g d"], layers: Sequence[int], rows: Behaving, prompts: int | None = None
    ) -> list[float]:
        """Mean refusal score of behaving harmless prompts with each difference of means added at its layer."""
        harmless = self.harmless.take(rows.harmless[:prompts])
        with additions(self.session.blocks, raw, layers):
            scores, _ = self._look(harmless, len(raw))
        means: list[float] = scores.mean(1).tolist()
        return means

    def measure(self, edit: Plan | ModelState | None, level: Level, *, harmful: bool = True) -> Measured:
        """What a plan does, as hooks; or the session's model in another state; without either, the unedited model.

        First tokens of harmful prompts are left out (NaN) where nobody reads them (`harmful`).
        """
        self.counts[level] += 1
        few = FEW_PROMPTS if level == Level.FEW else None
        base, answered = self.base, self._answered
        if edit is None:
            return self._unedited(few, None if level < Level.REPLIES else self._base_replies)
        edited = self._hooked(edit) if isinstance(edit, Plan) else edit
        with edited.state():
            scores = self._look(_first(self.harmful, few))[0][0] if harmful else base.harmful[:few] * math.nan
            harmless, kl = self._look(_first(self.harmless, few), 1, base.logits)
        first = Measured(scores, harmless[0], kl[0][answered[:few]])
        if level < Level.REPLIES:
            return first
        before, original = self._base_replies, as_loaded(self.session)
        shift = self._shift(original, edited, before) if level == Level.SHIFT else None
        return replace(first, replies=self._examiner.ask(edited, "replies"), base_replies=before, shift=shift)

    def measure_replies(
        self, states: tuple[ModelState, ModelState], replies: tuple[Sets, Sets], level: Level, *, harmful: bool = True
    ) -> tuple[Measured, Measured]:
        """What `measure` says of two states, the original and an edited one, whose replies were made elsewhere."""
        (original, edited), (before, after) = states, replies
        with original.state():
            unedited = self._unedited(None, before)
        shift = self._shift(original, edited, before) if level == Level.SHIFT else None
        first = self.measure(edited, Level.ALL, harmful=harmful)
        first = replace(first, replies=after, base_replies=before, shift=shift)
        return unedited, first

    def _unedited(self, few: int | None, replies: Sets | None) -> Measured:
        """The unedited model beside itself: nothing moved."""
        base, unmoved = self.base, torch.zeros(int(self._answered[:few].sum()), dtype=torch.float64)
        return Measured(base.harmful[:few], base.harmless[:few], unmoved, replies, replies)

    @property
    def _answered(self) -> Tensor:
        """Which harmless prompts the unedited model answers; all, when it answers none."""
        answered = self.base.harmless < 0
        return answered if bool(answered.any()) else torch.ones_like(answered)

    def _look(
        self, prompts: Encoded, copies: int = 1, logits: Tensor | None = None, *, first: int = 0
    ) -> tuple[Float[Tensor, "g n"], Float[Tensor, "g m"]]:
        """Refusal scores, and KL from the unedited model's `logits` (of the prompts from number `first` on)."""
        scores = torch.zeros(copies, len(prompts), dtype=torch.float64)
        kl = torch.zeros(copies, len(prompts) - first, dtype=torch.float64)

        def look(rows: list[int], found: Tensor) -> None:
            scores[:, rows] = refusal_score(found, self.tokens).cpu()
            compared = [i for i, row in enumerate(rows) if logits is not None and row >= first]
            if logits is not None and compared:
                places = [rows[i] - first for i in compared]
                edited = found[:, compared]
                base = logits[places].to(found.device).expand_as(edited)
                kl[:, places] = kl_divergence(base, edited).cpu().double()

        for_each_first_token(self.session.model, prompts, self.session.size, look, into=(scores, kl), copies=copies)
        return scores, kl

    def _hooked(self, plan: Plan) -> ModelState:
        return ModelState(self.session, functools.partial(self.session.ablated, plan))

    @functools.cached_property
    def _examiner(self) -> Examiner:
        """Asks for replies and judges them: with closed thinking, and without a word, since measurements are many."""
        if self._judge is None:
            raise ValueError("probe: expected a judge for levels with replies, found none")
        prompts = self.session.prompts
        texts = {name: prompts.texts(name, self.split) for name in ("harmful", "harmless")}
        encoded = {"harmful": self.harmful, "harmless": self.harmless}
        if prompts.keep is not None:
            split = self.split.removeprefix("plain ")
            texts["keep"], encoded["keep"] = getattr(prompts.keep, split), self.session.encoded["keep", split]
        plain = EvalSettings(**self._settings.model_dump(include=set(ReplySettings.model_fields)))
        session = self.session
        decoding = chosen_decoding(session.model.generation_config, plain, session.seed, session.monitor)
        return Examiner(session.renderer, prompts, texts, encoded, plain, self._judge, Monitor(), decoding)

    @functools.cached_property
    def _base_replies(self) -> Sets:
        return self._examiner.ask(Unedited(as_loaded(self.session, self._settings)), "replies")

    def _shift(self, original: ModelState, edited: ModelState, before: Sets) -> Shift:
        answers, rows = before["harmless"], self._answered.nonzero().flatten().tolist()[:SHIFT_PROMPTS]
        texts, replies = [answers.prompts[row] for row in rows], [answers.replies[row] for row in rows]
        return measure_shift(original, edited, texts, self.harmless.take(rows), replies, self.session.size)


def _first(prompts: Encoded, count: int | None) -> Encoded:
    return prompts.take(range(len(prompts))[:count])
