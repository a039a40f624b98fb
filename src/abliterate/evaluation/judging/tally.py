"""Counts over judged replies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from abliterate.evaluation.judging.base import Label, Verdict
from abliterate.evaluation.statistics import wilson


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts over a set of replies.

    `refusals` holds partial ones and evasions too. `n` are the replies with a verdict: `unknown` ones and
    those `cut_off` are not among them, `degenerate` ones are (a broken reply is no refusal).
    """

    refusals: int
    degenerate: int
    n: int
    partial: int = 0
    unknown: int = 0
    evasion: int = 0
    cut_off: int = 0

    @classmethod
    def from_verdicts(cls, verdicts: Iterable[Verdict]) -> Tally:
        """Count the labels of `verdicts`."""
        count = Counter(verdict.label for verdict in verdicts)
        partial, evasion = count[Label.PARTIAL], count[Label.EVASION]
        unknown, cut_off = count[Label.UNKNOWN], count[Label.CUT_OFF]
        return cls(
            refusals=count[Label.REFUSAL] + evasion + partial,
            degenerate=count[Label.DEGENERATE],
            n=count.total() - unknown - cut_off,
            partial=partial,
            unknown=unknown,
            evasion=evasion,
            cut_off=cut_off,
        )

    @property
    def rate(self) -> float:
        """Refusals per judged reply, 0..1; NaN when there are none."""
        return self.refusals / self.n if self.n else math.nan

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `rate`."""
        return wilson(self.refusals, self.n)
