"""Which of a question's options a model takes: two ways to ask, for models that can and cannot name letters.

A small model may know an answer and yet not find its letter among those listed; asked by letter it then stands at
chance, and no edit could be seen to harm it. Asked by text it is given the question alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from string import ascii_uppercase
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.errors import ModelError
from abliterate.evaluation.capability.tasks import Choice
from abliterate.evaluation.scores import log_likelihood
from abliterate.model.batches import (
    BatchSize,
    Encoded,
    SharedPrefix,
    can_share,
    in_batches,
    last_logits,
    logit_size,
    logits_at,
    share_prefix,
)
from abliterate.prompts.rendering import ChatRenderer

Way = Literal["letter", "text"]
Progress = Callable[[int], None]
Chooser = Callable[[Any, ChatRenderer, Sequence[Choice], BatchSize, Progress | None], list[int]]

#: How tokenizers spell a letter at the start of a word.
_SPELLINGS = ("{}", " {}", "▁{}", "Ġ{}")


def by_letter(
    model: Any,
    renderer: ChatRenderer,
    items: Sequence[Choice],
    size: BatchSize,
    progress: Progress | None = None,
) -> list[int]:
    """The option whose letter is the likeliest first token of the reply, options listed: one pass a question."""
    encoded = encode(model, renderer.encode([letter_prompt(item) for item in items]))
    tokens = letter_tokens(renderer.tokenizer, max(len(item.options) for item in items))
    shared = SharedPrefix(model, encoded.prefix)
    chosen = torch.zeros(len(items), dtype=torch.int64)

    def work(rows: list[int]) -> None:
        scores = letter_scores(last_logits(model, shared, [encoded.suffixes[row] for row in rows]), tokens)
        for row, own in zip(rows, scores, strict=True):
            chosen[row] = int(own[: len(items[row].options)].argmax())

    in_batches([len(suffix) for suffix in encoded.suffixes], size, work, into=[chosen], done=progress)
    return chosen.tolist()


def by_text(
    model: Any,
    renderer: ChatRenderer,
    items: Sequence[Choice],
    size: BatchSize,
    progress: Progress | None = None,
) -> list[int]:
    """The option that is the likeliest reply (its tokens' log-probabilities summed) to the question alone."""
    prompts = renderer.encode([item.question for item in items])
    tried = [(number, option) for number, item in enumerate(items) for option in range(len(item.options))]
    replies = [renderer.tokenizer.encode(items[n].options[option], add_special_tokens=False) for n, option in tried]
    whole = [prompts[number] + reply for (number, _), reply in zip(tried, replies, strict=True)]
    longest = max(map(len, replies))
    encoded = encode(model, [tokens[:-1] for tokens in whole], keep=longest)  # the last token is only foretold
    shared = SharedPrefix(model, encoded.prefix)
    scores = torch.zeros(len(tried), dtype=torch.float64)
    seen = 0

    def work(rows: list[int]) -> None:
        width = max(len(replies[row]) for row in rows)
        own = torch.tensor([len(replies[row]) for row in rows])

        def positions(lengths: Int[Tensor, " b"]) -> Int[Tensor, "b p"]:
            starts = lengths - own.to(lengths.device)
            wanted = starts[:, None] + torch.arange(width, device=lengths.device)
            return torch.minimum(wanted, lengths[:, None] - 1)  # beyond a shorter reply: computed, not used

        logits = logits_at(model, shared, [encoded.suffixes[row] for row in rows], positions)
        for row, some in zip(rows, logits, strict=True):
            reply = torch.tensor(replies[row], device=some.device)
            scores[row] = float(log_likelihood(some[: len(reply)], reply).cpu().double().sum())

    def done(some: int) -> None:
        nonlocal seen
        questions = seen * len(items) // len(tried)
        seen += some
        if progress is not None:
            progress(seen * len(items) // len(tried) - questions)

    size = logit_size(model, size, longest)
    in_batches([len(suffix) for suffix in encoded.suffixes], size, work, into=[scores], done=done)
    return _likeliest(len(items), tried, scores.tolist())


def _likeliest(items: int, tried: Sequence[tuple[int, int]], scores: Sequence[float]) -> list[int]:
    """For each item the option with the highest score, the first of equal ones."""
    chosen, best = [0] * items, [-inf] * items
    for (number, option), score in zip(tried, scores, strict=True):
        if score > best[number]:
            chosen[number], best[number] = option, score
    return chosen


#: Ways to ask a multiple-choice question.
WAYS: Mapping[Way, Chooser] = {"letter": by_letter, "text": by_text}


def letter_prompt(item: Choice) -> str:
    """The question with its options listed, as an instruction."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, item.options, strict=False))
    return f"{item.question}\n\n{options}\n\nReply with the letter of the right option only."


def encode(model: Any, sequences: Sequence[Sequence[int]], keep: int = 1) -> Encoded:
    """The sequences with what they share in front, if the model can share it."""
    return share_prefix(sequences, keep=keep, share=can_share(model, sequences, keep))


def letter_scores(logits: Float[Tensor, "b vocab"], tokens: Sequence[Sequence[int]]) -> Float[Tensor, "b letters"]:
    """Log-probability of each letter, up to a constant: its spellings together."""
    return torch.stack([logits[:, list(ids)].logsumexp(-1) for ids in tokens], dim=1)


def letter_tokens(tokenizer: Any, count: int) -> list[tuple[int, ...]]:
    """Ids of the tokens that are A, B, C, …, with or without a space in front.

    Raises `ModelError` when the tokenizer has none for a letter.
    """
    found = []
    for letter in ascii_uppercase[:count]:
        spelled = [form.format(letter) for form in _SPELLINGS]
        ids = {tokenizer.convert_tokens_to_ids(text) for text in spelled}
        ids |= {own[0] for text in spelled[:2] if len(own := tokenizer.encode(text, add_special_tokens=False)) == 1}
        kept = tuple(sorted(i for i in ids if i is not None and tokenizer.decode([i]).strip() == letter))
        if not kept:
            raise ModelError(
                f"tokenizer: expected a token '{letter}' to answer multiple choice with, found none; "
                "ask by text, or leave the multiple-choice tasks out"
            )
        found.append(kept)
    return found
