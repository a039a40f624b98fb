"""A judge of several processes: the one that leads asks it, and the others are told the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from abliterate.evaluation.judging.base import Exchange, Judge, Label, Verdict
from abliterate.monitor import ranks


@dataclass(frozen=True, slots=True)
class LedJudge:
    """What a judge says in the process that leads; `asked` is the judge there, None in the others."""

    asked: Judge | None
    name: str
    fingerprint: str

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """The verdicts of the judge, the same in all processes."""
        found = [] if self.asked is None else self.asked.judge(exchanges)
        told = ranks.agreed([[verdict.label, verdict.evidence] for verdict in found])
        return [Verdict(Label(label), evidence) for label, evidence in told]


def led(make: Callable[[], Judge]) -> Judge:
    """The judge that `make` opens: where there are several processes, in the one that leads alone."""
    if ranks.count() == 1:
        return make()
    opened = make() if ranks.leads() else None
    name, fingerprint = ranks.agreed(["", ""] if opened is None else [opened.name, opened.fingerprint])
    return LedJudge(opened, name, fingerprint)
