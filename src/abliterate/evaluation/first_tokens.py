"""The distribution of an answer's first token, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from abliterate.evaluation.scores import refusal_score
from abliterate.model.batches import BatchSize, Encoded, SharedPrefix, in_batches, last_logits
from abliterate.monitor import ranks

#: What a process holds that has seen no prompt.
_NONE = torch.empty(0, 0, dtype=torch.int64)


class FirstTokens:
    """Gathers, batch by batch, refusal scores of answers' first tokens, and their logits where they are kept."""

    def __init__(self, prompts: int, tokens: Sequence[int], kept: torch.dtype | None = None) -> None:
        """Nothing seen yet of so many prompts; `kept` is the dtype in which logits are kept, none without."""
        self.scores = torch.zeros(prompts, dtype=torch.float64)
        self._tokens, self._kept = tokens, kept
        self._logits: dict[int, Tensor] = {}

    def look(self, rows: list[int], logits: Float[Tensor, "b vocab"]) -> None:
        """Take in the prompts at `rows`."""
        self.scores[rows] = refusal_score(logits, self._tokens).cpu()
        if self._kept is not None:
            self._logits.update(zip(rows, logits.to(self._kept).cpu(), strict=True))

    def keep(self, rows: list[int], logits: Float[Tensor, "b vocab"]) -> Bool[Tensor, " b"]:
        """The same where activations of all prompts are wanted (see `activations.stream_sites`)."""
        self.look(rows, logits)
        return torch.ones(len(rows), dtype=torch.bool)

    def merge(self) -> None:
        """Take in what its likes in other processes have seen, of other prompts."""
        ranks.summed(self.scores)
        if self._kept is not None:
            rows = ranks.joined(torch.tensor(list(self._logits))[:, None]) if self._logits else ranks.joined(_NONE)
            values = ranks.joined(torch.stack(list(self._logits.values())) if self._logits else _NONE.to(self._kept))
            self._logits = dict(zip(rows[:, 0].tolist(), values, strict=True))

    @property
    def logits(self) -> Float[Tensor, "n vocab"]:
        """Logits by prompt, on the CPU; nothing where none were kept."""
        rows = sorted(self._logits)
        return torch.stack([self._logits[row] for row in rows]) if rows else torch.empty(0, 0)


def first_tokens(
    model: Any, prompts: Encoded, tokens: Sequence[int], size: BatchSize, *, keep: torch.dtype | None = None
) -> FirstTokens:
    """Refusal scores of the answers' first tokens, and their logits in the dtype `keep` (none without)."""
    found = FirstTokens(len(prompts), tokens, keep)
    for_each_first_token(model, prompts, size, lambda rows, logits: found.look(rows, logits[0]), into=[found])
    return found


def for_each_first_token(
    model: Any,
    prompts: Encoded,
    size: BatchSize,
    look: Callable[[list[int], Float[Tensor, "g b vocab"]], None],
    *,
    into: Sequence[Tensor | ranks.Merged] | None = None,
    copies: int = 1,
) -> None:
    """Call `look(rows, logits)` with the distribution of the answer's first token, batch by batch.

    `into` is all that `look` puts numbers into, where several processes may divide the prompts. Each prompt is run
    `copies` times at once, for interventions that do something else in each.
    """
    shared = SharedPrefix(model, prompts.prefix, copies)

    def work(rows: list[int]) -> None:
        logits = last_logits(model, shared, prompts.take(rows).suffixes * copies)
        look(rows, logits.unflatten(0, (copies, len(rows))))

    in_batches([len(s) for s in prompts.suffixes], size, work, into=into, copies=copies)
