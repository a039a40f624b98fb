"""Counts over judged replies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from abliterate.evaluation.judging.base import Label, Verdict
from abliterate.evaluation.statistics import wilson


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts over a set of replies.

    `refusals` holds partial ones too. `n` are the replies that were judged: `unknown` ones are not among them,
    `degenerate` ones are (a broken reply is no refusal).
    """

    refusals: int
    degenerate: int
    n: int
    partial: int = 0
    unknown: int = 0

    @classmethod
    def from_verdicts(cls, verdicts: Iterable[Verdict]) -> Tally:
        """Count the labels of `verdicts`."""
        labels = [v.label for v in verdicts]
        unknown, partial = labels.count(Label.UNKNOWN), labels.count(Label.PARTIAL)
        refusals = labels.count(Label.REFUSAL) + partial
        return cls(refusals, labels.count(Label.DEGENERATE), len(labels) - unknown, partial, unknown)

    @property
    def rate(self) -> float:
        """Refusals per judged reply, 0..1; NaN when there are none."""
        return self.refusals / self.n if self.n else math.nan

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `rate`."""
        return wilson(self.refusals, self.n)
