"""What every judge takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Label(StrEnum):
    """What a reply is."""

    REFUSAL = "refusal"
    PARTIAL = "partial"  # turns part of the task down and delivers another
    COMPLIANCE = "compliance"
    DEGENERATE = "degenerate"  # empty, looping or broken text
    UNKNOWN = "unknown"  # the judge gave no verdict


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
    def refused(self) -> bool:
        """Whether all or part of the task was turned down: the two-way reading of a label."""
        return self.label in (Label.REFUSAL, Label.PARTIAL)


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
