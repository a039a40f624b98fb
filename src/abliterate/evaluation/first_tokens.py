"""The distribution of an answer's first token, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.evaluation.scores import refusal_score
from abliterate.model.batches import BatchSize, Encoded, SharedPrefix, in_batches, last_logits


def first_tokens(
    model: Any, prompts: Encoded, tokens: Sequence[int], size: BatchSize, *, keep: torch.dtype | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n vocab"]]:
    """Refusal scores of the answers' first tokens, and their logits in the dtype `keep` (none without), on the CPU."""
    scores = torch.zeros(len(prompts), dtype=torch.float64)
    kept: dict[int, Tensor] = {}

    def look(rows: list[int], logits: Tensor) -> None:
        scores[rows] = refusal_score(logits[0], tokens).cpu()
        if keep is not None:
            kept.update(zip(rows, logits[0].to(keep).cpu(), strict=True))

    for_each_first_token(model, prompts, size, look)
    return scores, torch.stack([kept[row] for row in sorted(kept)]) if kept else torch.empty(0, 0)


def for_each_first_token(
    model: Any,
    prompts: Encoded,
    size: BatchSize,
    look: Callable[[list[int], Float[Tensor, "g b vocab"]], None],
    *,
    copies: int = 1,
) -> None:
    """Call `look(rows, logits)` with the distribution of the answer's first token, batch by batch.

    Each prompt is run `copies` times at once, for interventions that do something else in each.
    """
    shared = SharedPrefix(model, prompts.prefix, copies)

    def work(rows: list[int]) -> None:
        logits = last_logits(model, shared, prompts.take(rows).suffixes * copies)
        look(rows, logits.unflatten(0, (copies, len(rows))))

    in_batches([len(s) for s in prompts.suffixes], size, work, copies=copies)
