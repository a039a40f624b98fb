"""Counts over judged replies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from abliterate.evaluation.judging.base import Label, Verdict
from abliterate.evaluation.statistics import clustered_share, effective_size, wilson


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts over a set of replies.

    `refusals` holds partial ones and evasions too. `n` are the replies with a verdict: `unknown` ones and
    those `cut_off` are not among them, `degenerate` ones are (a broken reply is no refusal). Where prompts have several
    replies, `by_prompt` holds the refusals, degenerate replies and n of each.
    """

    refusals: int
    degenerate: int
    n: int
    partial: int = 0
    unknown: int = 0
    evasion: int = 0
    cut_off: int = 0
    by_prompt: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def from_verdicts(cls, verdicts: Iterable[Verdict], prompts: Sequence[str] = ()) -> Tally:
        """Count the labels of `verdicts`, those of replies to `prompts`."""
        verdicts = list(verdicts)
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
            by_prompt=_by_prompt(verdicts, prompts) if len(set(prompts)) < len(prompts) else (),
        )

    @property
    def rate(self) -> float:
        """Refusals per judged reply, 0..1; NaN when there are none."""
        return self.refusals / self.n if self.n else math.nan

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95 % interval of `rate`: Wilson's, or over prompts where they have several replies."""
        if self.by_prompt:
            return clustered_share([(refused, n) for refused, _, n in self.by_prompt])
        return wilson(self.refusals, self.n)

    @property
    def degenerate_ci95(self) -> tuple[float, float]:
        """The same of the share of degenerate replies."""
        if self.by_prompt:
            return clustered_share([(broken, n) for _, broken, n in self.by_prompt])
        return wilson(self.degenerate, self.n)

    @property
    def effective_n(self) -> float:
        """Independent replies that would tell as much of `rate`: `n`, or fewer where prompts have several."""
        return effective_size([(refused, n) for refused, _, n in self.by_prompt]) if self.by_prompt else self.n


def _by_prompt(verdicts: Sequence[Verdict], prompts: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
    found: dict[str, list[Verdict]] = {}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        found.setdefault(str(prompt), []).append(verdict)
    tallies = map(Tally.from_verdicts, found.values())
    return tuple((tally.refusals, tally.degenerate, tally.n) for tally in tallies)
