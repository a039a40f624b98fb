"""Behaviour before and after an edit: refusals with intervals, and how far harmless answers moved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.evaluation.answering import ModelState
from abliterate.evaluation.judging import Exchange, Judge, Label, Tally, Verdict, is_cut_off
from abliterate.evaluation.judging.scorers import ScorerJudge
from abliterate.evaluation.scores import kl_divergence, log_likelihood
from abliterate.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    bootstrap_ratio,
    mcnemar,
    paired_difference,
    sign_flips,
)
from abliterate.model.batches import BatchSize, Encoded, SharedPrefix, in_batches, logit_size, logits_at
from abliterate.model.generation import Reply

#: Tokens whose distributions are compared at once.
_TOGETHER = 16
#: Prompts that moved most, by name.
_WORST = 3


@dataclass(frozen=True, slots=True)
class Answers:
    """Replies to one set of prompts, judged. A prompt may know its `category`.

    `texts` is what the judge read of each reply: without its thinking, "" where that never ended.
    """

    prompts: tuple[str, ...]
    replies: tuple[Reply, ...]
    verdicts: tuple[Verdict, ...]
    texts: tuple[str, ...]

    @property
    def tally(self) -> Tally:
        """Refusals, degenerate replies and prompts, with a 95 % interval."""
        return Tally.from_verdicts(self.verdicts, self.prompts)

    def per_prompt(self, values: Sequence[float]) -> list[float]:
        """The mean of `values`, one for each reply, over the replies to each prompt."""
        found: dict[str, list[float]] = {}
        for prompt, value in zip(self.prompts, values, strict=True):
            found.setdefault(str(prompt), []).append(value)
        return [sum(group) / len(group) for group in found.values()]

    def by_category(self) -> dict[str, Answers]:
        """The answers of each category that prompts name, in the order of first appearance."""
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            if (category := getattr(prompt, "category", None)) is not None:
                rows.setdefault(category, []).append(row)
        return {category: self._take(chosen) for category, chosen in rows.items()}

    def to(self, prompts: Sequence[str]) -> Answers:
        """The answers to some of the prompts."""
        wanted = set(map(str, prompts))
        return self._take([row for row, prompt in enumerate(self.prompts) if str(prompt) in wanted])

    def _take(self, rows: Sequence[int]) -> Answers:
        groups = (self.prompts, self.replies, self.verdicts, self.texts)
        return Answers(*(tuple(group[row] for row in rows) for group in groups))  # type: ignore[arg-type]


def judged(prompts: Sequence[str], replies: Sequence[Reply], texts: Sequence[str | None], judge: Judge) -> Answers:
    """Replies with verdicts. `texts` is what the judge reads; None, where there is nothing to judge, is unknown.

    A reply that ran into its limit before it came to anything is cut off, whatever the judge thinks of its beginning.
    """
    rows = [row for row, text in enumerate(texts) if text is not None]
    verdicts = [Verdict(Label.UNKNOWN, "thinking was not finished")] * len(replies)
    exchanges = [Exchange(prompts[row], texts[row] or "") for row in rows]
    may_be_cut = not isinstance(judge, ScorerJudge)  # what is not shown so far is not shown, of other behaviours
    for row, verdict in zip(rows, judge.judge(exchanges), strict=True):
        cut = (
            may_be_cut and verdict.label is Label.COMPLIANCE and _was_cut(replies[row]) and is_cut_off(texts[row] or "")
        )
        verdicts[row] = Verdict(Label.CUT_OFF, "ended by length before it came to anything") if cut else verdict
    return Answers(tuple(prompts), tuple(replies), tuple(verdicts), tuple(text or "" for text in texts))


def _was_cut(reply: Reply) -> bool:
    return not reply.ended and not reply.stopped


@dataclass(frozen=True, slots=True)
class Paired:
    """The same prompts before and after: refused (or degenerate) both times, only before, only after, never.

    `unknown` pairs have a side without a verdict and are in none of the counts. `p` is McNemar's exact two-sided
    probability of changes as one-sided as these if it were as likely after as before; `change` is the difference of
    the rates, after − before. Where prompts have several replies each is a pair, the interval is over prompts
    (bootstrap), and `p` is that of flipping the signs of prompts' changes.
    """

    both: int
    before_only: int
    after_only: int
    neither: int
    unknown: int
    p: float
    change: Estimate


def refused(verdict: Verdict) -> bool:
    """Whether all or a part was turned down."""
    return verdict.refused


def degenerate(verdict: Verdict) -> bool:
    """Whether the reply is empty, looping or broken."""
    return verdict.label is Label.DEGENERATE


def paired(before: Answers, after: Answers, what: Callable[[Verdict], bool] = refused) -> Paired:
    """Compare two sets of answers to the same prompts, prompt by prompt, in what verdicts say.

    Raises ValueError when they are not answers to the same prompts.
    """
    if before.prompts != after.prompts:
        raise ValueError("paired answers: expected the same prompts in the same order")
    pairs = list(zip(before.verdicts, after.verdicts, strict=True))
    known = [pair for pair in pairs if pair[0].given and pair[1].given]
    counts = Counter((what(first), what(second)) for first, second in known)
    table = counts[True, True], counts[True, False], counts[False, True], counts[False, False]
    p, change = mcnemar(table[1], table[2]), paired_difference(*table)
    if len(set(before.prompts)) < len(before.prompts):
        clusters: dict[str, list[int]] = {}
        for prompt, pair in zip(before.prompts, pairs, strict=True):
            if pair[0].given and pair[1].given:
                clusters.setdefault(str(prompt), []).append(what(pair[1]) - what(pair[0]))
        changes = [(sum(group), len(group)) for group in clusters.values()]
        p = sign_flips([moved / count for moved, count in changes])
        change = bootstrap_ratio(changes) if any(moved for moved, _ in changes) else change
    return Paired(*table, len(pairs) - len(known), p, change)


@dataclass(frozen=True, slots=True)
class Manner:
    """What replies look like: mean length in tokens, mean repetition, share that the model ended itself.

    Repetition is the share of a reply's 4-grams of tokens that stood in it before (seq-rep-4 of Welleck et al. 2020).
    """

    tokens: Estimate
    repetition: Estimate
    ended: float


def manner(answers: Answers) -> Manner:
    """Length and repetition of answers."""
    ended = [reply.ended for reply in answers.replies]
    return Manner(
        bootstrap_mean(answers.per_prompt([float(len(reply.tokens)) for reply in answers.replies])),
        bootstrap_mean(answers.per_prompt([repetition(reply.tokens) for reply in answers.replies])),
        sum(ended) / len(ended) if ended else math.nan,
    )


def manner_change(before: Answers, after: Answers) -> tuple[Estimate, Estimate]:
    """Change of length in tokens, and of repetition, after − before, paired by prompt."""
    pairs = list(zip(before.replies, after.replies, strict=True))
    return (
        bootstrap_mean(before.per_prompt([float(len(b.tokens) - len(a.tokens)) for a, b in pairs])),
        bootstrap_mean(before.per_prompt([repetition(b.tokens) - repetition(a.tokens) for a, b in pairs])),
    )


def repetition(tokens: Sequence[int]) -> float:
    """Share of 4-grams that stood there before, 0..1; 0 for fewer than four tokens."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity over prompts: mean (95 % bootstrap interval, standard error), median, 95th percentile, largest."""

    mean: Estimate
    se: float
    median: float
    p95: float
    largest: float


@dataclass(frozen=True, slots=True)
class Shift:
    """How far answers to harmless prompts moved, in nats per token.

    `kl_first` and `kl_reply` are KL(base ‖ edited), the second over the base model's own reply, token by token;
    `nll_before` and `nll_after` are what that reply costs, `nll_change` their paired difference. `worst` are the
    prompts with the largest `kl_reply`. All are None of no prompts.
    """

    kl_first: Spread | None
    kl_reply: Spread | None
    nll_before: float | None
    nll_after: float | None
    nll_change: Estimate | None
    worst: tuple[tuple[str, float], ...]
    prompts: int
    tokens: int


def measure_shift(
    base: ModelState,
    edited: ModelState,
    texts: Sequence[str],
    prompts: Encoded,
    replies: Sequence[Reply],
    size: BatchSize,
    progress: Callable[[int], None] | None = None,
) -> Shift:
    """Compare next-token distributions along the base model's own `replies` to harmless `prompts` (`texts`).

    Prompts with an empty reply are left out.
    """
    rows = [row for row, reply in enumerate(replies) if reply.tokens]
    answers = [replies[row].tokens for row in rows]
    starts = [len(prompts.suffixes[row]) - 1 for row in rows]
    sequences = [prompts.suffixes[row] + reply[:-1] for row, reply in zip(rows, answers, strict=True)]
    longest = max((len(reply) for reply in answers), default=1)
    result = torch.zeros(len(rows), 4, dtype=torch.float64)  # KL first, KL mean, NLL before, NLL after
    shared = []
    for state in (base, edited):
        with state.state():
            shared.append(SharedPrefix(state.model, prompts.prefix))

    def work(chosen: list[int]) -> None:
        suffixes = [sequences[i] for i in chosen]
        begin = torch.tensor([starts[i] for i in chosen])
        steps = torch.arange(max(len(answers[i]) for i in chosen))

        def positions(lengths: Tensor) -> Tensor:
            wanted = (begin[:, None] + steps).to(lengths.device)
            return torch.minimum(wanted, lengths[:, None] - 1)  # beyond a shorter reply: computed, not used

        with base.state():
            before = logits_at(base.model, shared[0], suffixes, positions)
        with edited.state():
            after = logits_at(edited.model, shared[1], suffixes, positions).to(before.device)
        for row, i in enumerate(chosen):
            reply = torch.tensor(answers[i], device=before.device)
            result[i] = _compared(before[row, : len(reply)], after[row, : len(reply)], reply)

    size = logit_size(base.model, size, longest)
    in_batches([len(s) for s in sequences], size, work, into=[result], done=progress)
    return _summary(result, [texts[row] for row in rows], sum(map(len, answers)))


def _compared(p: Tensor, q: Tensor, reply: Tensor) -> Tensor:
    """KL of the first token and of all, and what the reply costs under p and under q, from logits [tokens, vocab]."""
    # A few tokens at a time: between two rows of a large vocabulary stand five more of their size.
    parts = list(zip(*(each.split(_TOGETHER) for each in (p, q, reply)), strict=True))
    kl = torch.cat([kl_divergence(a, b) for a, b, _ in parts])
    nll = [-torch.cat([log_likelihood(pair[side], pair[2]) for pair in parts]).mean() for side in (0, 1)]
    return torch.stack([kl[0], kl.mean(), *nll]).cpu().double()


def _summary(result: Tensor, texts: Sequence[str], tokens: int) -> Shift:
    if not len(result):
        return Shift(None, None, None, None, None, (), 0, 0)
    order = result[:, 1].argsort(descending=True)[:_WORST].tolist()
    return Shift(
        kl_first=_spread(result[:, 0]),
        kl_reply=_spread(result[:, 1]),
        nll_before=float(result[:, 2].mean()),
        nll_after=float(result[:, 3].mean()),
        nll_change=bootstrap_mean((result[:, 3] - result[:, 2]).tolist()),
        worst=tuple((str(texts[row]), float(result[row, 1])) for row in order),
        prompts=len(result),
        tokens=tokens,
    )


def _spread(values: Tensor) -> Spread:
    median, p95 = values.quantile(torch.tensor([0.5, 0.95], dtype=values.dtype)).tolist()
    se = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Spread(bootstrap_mean(values.tolist()), se, median, p95, float(values.max()))
