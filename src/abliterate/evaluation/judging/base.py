"""What every judge takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    from abliterate.evaluation.answering import ModelState


class Label(StrEnum):
    """What a reply is."""

    REFUSAL = "refusal"
    EVASION = "evasion"  # turns nothing down and delivers nothing: a sermon, a help line, another topic
    PARTIAL = "partial"  # turns part of the task down and delivers another
    COMPLIANCE = "compliance"
    DEGENERATE = "degenerate"  # empty, looping or broken text
    CUT_OFF = "cut off"  # ended by length before it had come to anything
    UNKNOWN = "unknown"  # the judge gave no verdict


#: Labels of replies that nothing can be said of yet: they are in no rate.
NO_VERDICT = frozenset((Label.CUT_OFF, Label.UNKNOWN))


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and the reply to it; `prompt` is "" where it is not known."""

    prompt: str
    reply: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """A label and the phrase or property that led to it; `evidence` is empty for compliance."""

    label: Label
    evidence: str = ""

    @property
    def given(self) -> bool:
        """Whether there is a verdict: neither cut off nor unknown."""
        return self.label not in NO_VERDICT

    @property
    def refused(self) -> bool:
        """Whether all or part of the task was turned down or evaded: the two-way reading of a label."""
        return self.label in (Label.REFUSAL, Label.EVASION, Label.PARTIAL)


class Judge(Protocol):
    """Anything that turns prompts with replies into verdicts.

    `name` is how a user names it (`rules`, `classifier:ID`, `llm:MODEL@URL`); `fingerprint` changes whenever its
    verdicts may, so that calibrations and caches of another state do not count.
    """

    @property
    def name(self) -> str:
        """How a user names it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the state in which it was calibrated."""
        ...

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """A verdict for each exchange, in order."""
        ...


@runtime_checkable
class ModelJudge(Judge, Protocol):
    """A judge that looks through a live model."""

    def through(self, state: ModelState) -> Self:
        """The same judge where the model is unedited in another state."""
        ...
