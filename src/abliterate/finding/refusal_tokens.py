"""Refusal tokens: how this model's refusals start, found from its own replies.

Comparing harmful with harmless prompts would not do: it also finds words like "Creating", with which a model obeys.
Here a token counts only if replies that start with it are refusals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.errors import GateNotMet
from abliterate.evaluation.judging import Label, Verdict
from abliterate.model.batches import BatchSize, Encoded, SharedPrefix, in_batches, last_logits
from abliterate.model.generation import Reply, complete
from abliterate.monitor import ranks
from abliterate.record import TokenPart

#: Tokens of a reply that are judged: enough for its first sentence.
REPLY_TOKENS = 16
#: Replies that hand over nothing of what was asked.
_WHOLLY = (Label.REFUSAL, Label.EVASION)
#: A token is looked at when its mean probability where the model refuses is at least this …
MIN_PROBABILITY = 0.01
#: … at least this many times that where the model answers …
MIN_LIFT = 2.0
#: … and it is that likely on at least this share of the prompts (one prompt's own word is not a way to refuse).
MIN_SPREAD = 0.25
#: Of the replies that start with it, at least this share must be refusals.
MIN_REFUSING = 0.75
#: Replies tried per token, and tokens tried.
_TRIALS, _CANDIDATES = 8, 8


@dataclass(frozen=True, slots=True)
class Refusals:
    """How many of the harmful prompts a model refuses, and how its refusals start (empty if it never does).

    `replies` are the greedy ones, of at most `REPLY_TOKENS` tokens, that this was found by, by the prompts' suffixes.
    """

    refused: int
    prompts: int
    tokens: tuple[TokenPart, ...]
    replies: Mapping[tuple[int, ...], Reply] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids."""
        return tuple(token.token for token in self.tokens)


def find_refusals(
    model: Any,
    tokenizer: Any,
    harmful: Encoded,
    harmless: Encoded,
    size: BatchSize,
    judge: Callable[[str], Verdict],
    progress: Callable[[int], None] | None = None,
) -> Refusals:
    """Let the model reply, judge the replies, and try out the tokens its refusals are likely to start with.

    Raises `GateNotMet` when the model answers nothing, or refuses but no first token tells that from answering.
    """
    both = harmful + harmless
    replies = complete(model, tokenizer, both, REPLY_TOKENS, size, progress)
    known = dict(zip(both.suffixes, replies, strict=True))
    labels = [judge(reply.text).label for reply in replies]
    refused = [row for row, label in enumerate(labels[: len(harmful)]) if label in _WHOLLY]
    answered = [row for row, label in enumerate(labels) if label is Label.COMPLIANCE]
    if not refused:
        return Refusals(0, len(harmful), (), known)
    if not answered:
        raise GateNotMet(
            f"refusal tokens: the model answers none of {len(both)} validation prompts, so refusing cannot be told "
            "from answering; give harmless prompts that it answers, or --refusal-tokens"
        )
    refusing, spread = first_tokens(model, both.take(refused), size)
    answering, _ = first_tokens(model, both.take(answered), size)
    likely = candidates(refusing, spread, answering)
    tried = _try_out(model, tokenizer, both.take(refused[:_TRIALS]), likely, size, judge)
    parts = (_token_part(tokenizer, token, tried[token], refusing, answering) for token in tried)
    tokens = tuple(part for part in parts if part.refusals >= MIN_REFUSING * part.trials)
    if not tokens:
        shown = ", ".join(repr(tokenizer.decode([t])) for t in refusing.topk(4).indices.tolist())
        raise GateNotMet(
            f"refusal tokens: the model refuses {len(refused)} of {len(harmful)} harmful prompts, but no first token "
            f"tells that from answering (most likely: {shown}); give --refusal-tokens"
        )
    return Refusals(len(refused), len(harmful), tokens, known)


def _token_part(
    tokenizer: Any,
    token: int,
    tried: tuple[int, int],
    refusing: Float[Tensor, " vocab"],
    answering: Float[Tensor, " vocab"],
) -> TokenPart:
    """A first token with how likely it is where the model refuses and answers, and the refusals among its trials."""
    refusals, trials = tried
    return TokenPart(
        token=token,
        text=tokenizer.decode([token]),
        probability=float(refusing[token]),
        probability_answering=float(answering[token]),
        refusals=refusals,
        trials=trials,
    )


@dataclass(slots=True)
class _Sums:
    """Sums over batches of prompts [2, vocab]: of probabilities, and of prompts on which they are large."""

    parts: list[Float[Tensor, "2 vocab"]] = field(default_factory=list)

    def merge(self) -> None:
        """Take in the sums of other processes."""
        own = torch.stack(self.parts).sum(0) if self.parts else torch.zeros(0, 0)
        self.parts = list(ranks.joined(own).split(2))


def first_tokens(
    model: Any, prompts: Encoded, size: BatchSize
) -> tuple[Float[Tensor, " vocab"], Float[Tensor, " vocab"]]:
    """Mean next-token distribution over prompts, and on which share of them each token is likely."""
    shared = SharedPrefix(model, prompts.prefix)
    sums = _Sums()

    def work(rows: list[int]) -> None:
        p = last_logits(model, shared, prompts.take(rows).suffixes).softmax(-1)
        sums.parts.append(torch.stack([p.sum(0), (p >= MIN_PROBABILITY).sum(0)]).cpu())

    in_batches([len(s) for s in prompts.suffixes], size, work, into=[sums])
    mean, spread = torch.stack(sums.parts).sum(0) / len(prompts)
    return mean, spread


def candidates(
    refusing: Float[Tensor, " vocab"], spread: Float[Tensor, " vocab"], answering: Float[Tensor, " vocab"]
) -> list[int]:
    """Tokens likely wherever the model refuses and much less so where it answers, likeliest first."""
    marked = (refusing >= MIN_PROBABILITY) & (spread >= MIN_SPREAD) & (refusing >= MIN_LIFT * answering)
    order = refusing.masked_fill(~marked, -1).argsort(descending=True)
    return [int(token) for token in order[: min(_CANDIDATES, int(marked.sum()))]]


def _try_out(
    model: Any, tokenizer: Any, prompts: Encoded, tokens: list[int], size: BatchSize, judge: Callable[[str], Verdict]
) -> dict[int, tuple[int, int]]:
    """Refusals among the replies to `prompts` that were made to start with each token."""
    if not tokens:
        return {}
    forced = Encoded(prompts.prefix, tuple((*s, token) for token in tokens for s in prompts.suffixes))
    replies = complete(model, tokenizer, forced, REPLY_TOKENS - 1, size)
    texts = [tokenizer.decode([s[-1], *r.tokens]) for s, r in zip(forced.suffixes, replies, strict=True)]
    refusing = [judge(text).label in _WHOLLY for text in texts]
    count = len(prompts)
    return {token: (sum(refusing[i * count : (i + 1) * count]), count) for i, token in enumerate(tokens)}
