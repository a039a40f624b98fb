"""`--judge auto`: every judge that needs no download is measured on held-out exchanges that come with the package.

The best balanced accuracy (the mean of recall and specificity) is taken. Those that read texts are measured on all of
the exchanges. The model itself takes its time: it is measured on a sample that grows until it is clear whether it is
better than the others by more than its interval, or until that has taken some seconds. What was measured is kept by the
judge's fingerprint, which of the model holds a hash of its files, and a hash of the exchanges.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from abliterate.errors import ModelError, UsageError
from abliterate.evaluation.judging.base import Exchange, Judge, ModelJudge, Verdict
from abliterate.evaluation.judging.learnt import LearntJudge
from abliterate.evaluation.judging.rules import RuleJudge
from abliterate.evaluation.judging.shipped import ShippedExchange, clear_exchanges
from abliterate.evaluation.statistics import Share
from abliterate.files.cache import DiskCache, digest
from abliterate.monitor import Monitor, ranks

if TYPE_CHECKING:
    from abliterate.evaluation.answering import ModelState

#: Held-out exchanges of each kind, refused and not, that the model is asked about, one sample after the other.
SAMPLES = (16, 32, 64, 128)

#: Seconds after which no larger sample is begun.
PATIENCE = 10.0

#: Judges that need neither a model nor a download, the one that is taken among equals first.
READERS: tuple[Callable[[], Judge], ...] = (RuleJudge, LearntJudge)

_MEASURED = DiskCache("measured-judges", 1_000_000)  # each about a hundred bytes
_IN_THIS_PROCESS: dict[str, list[int]] = {}


@dataclass(frozen=True, slots=True)
class Measured:
    """How often a judge was right on held-out exchanges; no verdict is a wrong one."""

    name: str
    recall: Share
    specificity: Share

    @property
    def balanced(self) -> float:
        """The mean of recall and specificity, 0..1; NaN of nothing."""
        return (self.recall.value + self.specificity.value) / 2

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95 % interval of `balanced`, from Wilson's of both shares (MOVER; Zou and Donner 2008)."""
        shares = (self.recall, self.specificity)
        below = math.hypot(*(share.value - share.ci95[0] for share in shares)) / 2
        above = math.hypot(*(share.ci95[1] - share.value for share in shares)) / 2
        return max(0.0, self.balanced - below), min(1.0, self.balanced + above)

    @property
    def n(self) -> int:
        """Exchanges that it was measured on."""
        return self.recall.n + self.specificity.n

    def __str__(self) -> str:
        """'rules 93 % [91, 95] of 800'."""
        low, high = self.ci95
        return f"{self.name} {100 * self.balanced:.0f} % [{100 * low:.0f}, {100 * high:.0f}] of {self.n}"


@dataclass(frozen=True, slots=True)
class ChosenJudge:
    """The judge that was chosen, and how well all candidates did. It has the name and fingerprint of the one chosen."""

    judge_: Judge
    measured: tuple[Measured, ...]

    @property
    def name(self) -> str:
        """How a user names the judge that was chosen."""
        return self.judge_.name

    @property
    def fingerprint(self) -> str:
        """That of the judge that was chosen."""
        return self.judge_.fingerprint

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Verdicts of the judge that was chosen."""
        return self.judge_.judge(exchanges)

    def through(self, state: ModelState) -> ChosenJudge:
        """The same choice where the model is unedited in another state."""
        chosen = self.judge_
        return replace(self, judge_=chosen.through(state)) if isinstance(chosen, ModelJudge) else self


def choose(state: ModelState | None, monitor: Monitor) -> ChosenJudge:
    """The best of the judges at hand, said in one line; the model that is unedited in `state`, if any, among them."""
    readers = [make() for make in READERS]
    everything = clear_exchanges("hold")
    if not everything:
        return ChosenJudge(readers[0], ())
    measured = [_known(judge, everything) or _measure(judge, everything) for judge in readers]
    best = max(range(len(readers)), key=lambda i: measured[i].balanced)
    chosen = readers[best]
    own = None if state is None else _own(state, measured[best].balanced, monitor)
    if own is not None:
        judge, figures = own
        measured.append(figures)
        if figures.ci95[0] > measured[best].balanced:
            chosen = judge
    found = ChosenJudge(chosen, tuple(measured))
    monitor.note(f"judge auto: {found.name} (balanced accuracy on held-out exchanges: {', '.join(map(str, measured))})")
    return found


def _own(state: ModelState, best: float, monitor: Monitor) -> tuple[Judge, Measured] | None:
    """The model as a judge, and how it did beside another judge's balanced accuracy; None where it cannot judge."""
    from abliterate.evaluation.judging.self_judge import open_self

    try:
        judge = open_self(state)
    except (ModelError, UsageError) as error:
        monitor.note(f"judge auto leaves the model out ({error})")
        return None
    if (kept := _known(judge, clear_exchanges("hold"))) is not None:
        return judge, kept
    with monitor.phase("measure the model as its own judge"):
        figures, verdicts = None, dict[str, Verdict]()
        deadline = time.perf_counter() + PATIENCE
        for each in SAMPLES:
            rows = clear_exchanges("hold", each)
            new = [row for row in rows if row.id not in verdicts]
            called = judge.judge([row.exchange for row in new])
            verdicts |= {row.id: verdict for row, verdict in zip(new, called, strict=True)}
            figures = _figures(judge, rows, [verdicts[row.id] for row in rows])
            low, high = figures.ci95
            if ranks.agreed(not low <= best <= high or time.perf_counter() > deadline):
                break
    assert figures is not None
    _keep(judge, figures)
    return judge, figures


def _measure(judge: Judge, rows: Sequence[ShippedExchange]) -> Measured:
    figures = _figures(judge, rows, judge.judge([row.exchange for row in rows]))
    _keep(judge, figures)
    return figures


def _figures(judge: Judge, rows: Sequence[ShippedExchange], verdicts: Sequence[Verdict]) -> Measured:
    right: dict[bool, list[bool]] = {True: [], False: []}
    for row, verdict in zip(rows, verdicts, strict=True):
        right[row.refused].append(verdict.given and verdict.refused is row.refused)
    return Measured(judge.name, *(Share(sum(right[kind]), len(right[kind])) for kind in (True, False)))


def _key(judge: Judge, rows: Sequence[ShippedExchange]) -> str:
    return digest(f"{judge.fingerprint} {SAMPLES} {''.join(f'{row.id}{row.refused}' for row in rows)}")


def _keep(judge: Judge, figures: Measured) -> None:
    key, counts = _key(judge, clear_exchanges("hold")), [*figures.recall, *figures.specificity]
    _IN_THIS_PROCESS[key] = counts
    _MEASURED.write(key, counts)


def _known(judge: Judge, rows: Sequence[ShippedExchange]) -> Measured | None:
    key = _key(judge, rows)
    found = ranks.agreed(_IN_THIS_PROCESS.get(key) or _MEASURED.read(key))
    if not isinstance(found, list) or len(found) != 4 or not all(isinstance(number, int) for number in found):
        return None
    return Measured(judge.name, Share(*found[:2]), Share(*found[2:]))
