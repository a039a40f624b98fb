"""Behaviour before and after an edit: refusals with intervals, and how far harmless answers moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from abliterate.generation import Reply, complete
from abliterate.inference import BatchSize, Encoded, SharedPrefix, in_batches, logits_at
from abliterate.judging import Exchange, Judge, Tally, Verdict
from abliterate.scoring import kl_divergence, log_likelihood

#: Bytes of float32 logits that may be alive at once while two distributions are compared.
_LOGIT_BYTES = 96 << 20


@dataclass(frozen=True, slots=True)
class Answers:
    """Replies to one set of prompts, judged."""

    prompts: tuple[str, ...]
    replies: tuple[Reply, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def tally(self) -> Tally:
        """Refusals, degenerate replies and prompts, with a 95 % Wilson interval."""
        return Tally.from_verdicts(self.verdicts)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model in a certain state: `state()` is a context manager in which it is measured."""

    model: Any
    state: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)


@dataclass(frozen=True, slots=True)
class Shift:
    """How far answers to harmless prompts moved.

    `kl_first_token` and `kl_reply` are KL(base ‖ edited) in nats per token, the second over the base model's own
    reply; `nll_before` and `nll_after` are nats per token of that reply. Each with the standard error of the mean
    over prompts.
    """

    kl_first_token: float
    kl_first_token_se: float
    kl_reply: float
    kl_reply_se: float
    nll_before: float
    nll_after: float
    nll_change_se: float
    prompts: int
    tokens: int


def answer(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    encoded: Mapping[str, Encoded],
    max_new_tokens: int,
    size: BatchSize,
    judge: Judge,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Answers]:
    """Greedy answers to several sets of prompts at once (so that batches are full), judged."""
    names = list(texts)
    joined = encoded[names[0]]
    for name in names[1:]:
        joined = joined + encoded[name]
    replies = complete(model, tokenizer, joined, max_new_tokens, size, progress)
    answers, start = {}, 0
    for name in names:
        part = tuple(replies[start : start + len(texts[name])])
        pairs = [Exchange(prompt, reply.text) for prompt, reply in zip(texts[name], part, strict=True)]
        answers[name] = Answers(tuple(texts[name]), part, tuple(judge.judge(pairs)))
        start += len(part)
    return answers


def measure_shift(
    base: Subject,
    edited: Subject,
    prompts: Encoded,
    replies: Sequence[Reply],
    size: BatchSize,
    progress: Callable[[int], None] | None = None,
) -> Shift:
    """Compare next-token distributions along the base model's own `replies` to harmless `prompts`.

    Prompts with an empty reply are left out.
    """
    rows = [row for row, reply in enumerate(replies) if reply.tokens]
    answers = [replies[row].tokens for row in rows]
    starts = [len(prompts.suffixes[row]) - 1 for row in rows]
    sequences = [prompts.suffixes[row] + reply[:-1] for row, reply in zip(rows, answers, strict=True)]
    longest = max((len(reply) for reply in answers), default=1)
    result = torch.zeros(len(rows), 4, dtype=torch.float64)  # KL first, KL mean, NLL before, NLL after
    with base.state():
        shared_base = SharedPrefix(base.model, prompts.prefix)
    with edited.state():
        shared_edited = SharedPrefix(edited.model, prompts.prefix)

    def work(chosen: list[int]) -> None:
        suffixes = [sequences[i] for i in chosen]
        begin = torch.tensor([starts[i] for i in chosen])

        def positions(lengths: Tensor) -> Tensor:
            wanted = begin.to(lengths.device)[:, None] + torch.arange(longest, device=lengths.device)
            return torch.minimum(wanted, lengths[:, None] - 1)  # beyond a shorter reply: computed, not used

        with base.state():
            before = logits_at(base.model, shared_base, suffixes, positions)
        with edited.state():
            after = logits_at(edited.model, shared_edited, suffixes, positions).to(before.device)
        for row, i in enumerate(chosen):
            reply = torch.tensor(answers[i], device=before.device)
            p, q = before[row, : len(reply)], after[row, : len(reply)]
            kl = kl_divergence(p, q)
            nll = -log_likelihood(p, reply).mean(), -log_likelihood(q, reply).mean()
            result[i] = torch.stack([kl[0], kl.mean(), *nll]).double().cpu()

    vocabulary = base.model.config.get_text_config().vocab_size
    fitting = max(1, _LOGIT_BYTES // (4 * vocabulary * longest))
    limited = BatchSize(min(size.rows, fitting), size.tokens)
    in_batches([len(s) for s in sequences], limited, work, done=progress)
    return _summary(result, sum(map(len, answers)))


def _summary(result: Tensor, tokens: int) -> Shift:
    means = result.mean(0).tolist() if len(result) else [0.0] * 4
    changes = torch.stack([result[:, 0], result[:, 1], result[:, 3] - result[:, 2]])
    errors = (changes.std(1) / max(len(result), 1) ** 0.5).tolist() if len(result) > 1 else [0.0] * 3
    return Shift(
        kl_first_token=means[0],
        kl_first_token_se=errors[0],
        kl_reply=means[1],
        kl_reply_se=errors[1],
        nll_before=means[2],
        nll_after=means[3],
        nll_change_se=errors[2],
        prompts=len(result),
        tokens=tokens,
    )
