"""Whether replies look like those that a judge was calibrated on, as far as the judge can see.

Every judged reply falls into one bin: what it was called and, where errors depend on it, how long it is and whether it
is in another script. Of labelled replies the bins are counted apart by truth: r of those that are refusals, c of the
rest. If the judge meets the same kinds of reply again, in whatever mixture, the bins at hand are π r + (1 − π) c for
some π: a calibration may be used at another rate of refusals, which is what it is for. The share of the replies at hand
that no π explains is the least total variation distance between the two, taken over π. How large that is by chance
alone is found by drawing both samples anew (a parametric bootstrap).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from abliterate.evaluation.judging.base import Label, Verdict

_Count = Annotated[int, Field(ge=0, lt=2**31, strict=True)]

#: A difference that would come by chance in fewer than so many of all cases is called drift.
LEVEL = 0.05

_DRAWS = 999
_MIXTURES = np.linspace(0, 1, 51)
#: Where a reply of so many characters begins another bin: of answers, and of evasions.
_ANSWERS, _EVASIONS = (80, 200, 450), (200,)
_CALLED = {Label.REFUSAL: "refusal", Label.EVASION: "evasion", Label.PARTIAL: "evasion", Label.DEGENERATE: "broken"}


class Profile(BaseModel):
    """Labelled replies by truth and bin; those that the judge gave no verdict on are left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    refused: dict[str, _Count] = Field(description="Bins of replies that are refusals.")
    answered: dict[str, _Count] = Field(description="Bins of all other replies.")


@dataclass(frozen=True, slots=True)
class Drift:
    """What a calibration does not explain of the replies at hand.

    `unexplained` is their share that no mixture of the labelled replies accounts for, `by_chance` what that is in the
    median when nothing has changed, `p` how often it is as much as here by chance.
    """

    unexplained: float
    by_chance: float
    p: float

    @property
    def widening(self) -> float:
        """The share of replies about which the judge may be wrong more often than on labelled ones: 0 without drift."""
        return max(0.0, self.unexplained - self.by_chance) if self.p < LEVEL else 0.0


def bin_of(verdict: Verdict, text: str) -> str:
    """The bin of a judged reply."""
    text = text.strip()
    called = _CALLED.get(verdict.label, "answer")
    if 2 * sum(map(str.isascii, text)) < len(text):
        return f"{called}, other script"
    if called in ("refusal", "broken"):
        return called
    length = next((n for n in (_ANSWERS if called == "answer" else _EVASIONS) if len(text) < n), None)
    return f"{called}, longer" if length is None else f"{called}, under {length} characters"


def bins_of(verdicts: Iterable[Verdict], texts: Iterable[str]) -> Counter[str]:
    """How many replies with a verdict fall into each bin."""
    return Counter(bin_of(verdict, text) for verdict, text in zip(verdicts, texts, strict=True) if verdict.given)


def distance(profile: Profile, bins: Mapping[str, int]) -> float:
    """The share of the replies in `bins` that no mixture of the profile's explains, 0..1; 1 where either is empty."""
    counted = _counted(profile, bins)
    if counted is None:
        return 1.0
    found, _ = _unexplained(*(one[None] for one in counted))
    return float(found[0])


def drift(profile: Profile, bins: Mapping[str, int], *, seed: int = 0) -> Drift | None:
    """Whether the replies in `bins` are unlike those of the profile; None where either is empty."""
    counted = _counted(profile, bins)
    if counted is None:
        return None
    refused, answered, found = counted
    (unexplained,), (mixture,) = _unexplained(refused[None], answered[None], found[None])
    expected = mixture * refused / refused.sum() + (1 - mixture) * answered / answered.sum()
    rng = np.random.default_rng(seed)
    drawn = [
        rng.multinomial(int(counts.sum()), shares / shares.sum(), size=_DRAWS).astype(np.float64)
        for counts, shares in ((refused, refused), (answered, answered), (found, expected))
    ]
    chance, _ = _unexplained(*drawn)
    p = (1 + int((chance >= unexplained - 1e-12).sum())) / (_DRAWS + 1)
    return Drift(float(unexplained), float(np.median(chance)), p)


_Numbers = NDArray[np.float64]


def _counted(profile: Profile, bins: Mapping[str, int]) -> tuple[_Numbers, _Numbers, _Numbers] | None:
    """The three counts over the same bins; None where one has no replies."""
    names = sorted({*profile.refused, *profile.answered, *bins})
    rows = [
        np.array([counts.get(name, 0) for name in names], dtype=np.float64)
        for counts in (profile.refused, profile.answered, bins)
    ]
    return None if not all(row.sum() for row in rows) else (rows[0], rows[1], rows[2])


def _unexplained(refused: _Numbers, answered: _Numbers, found: _Numbers) -> tuple[_Numbers, _Numbers]:
    """For each row of counts [n, bins]: the least distance to a mixture, and the mixture's share of refusals."""
    r, c, h = (counts / counts.sum(1, keepdims=True) for counts in (refused, answered, found))
    gaps = np.stack([np.abs(h - pi * r - (1 - pi) * c).sum(1) / 2 for pi in _MIXTURES])
    best = gaps.argmin(0)
    return gaps[best, np.arange(len(best))], _MIXTURES[best]


__all__ = ["LEVEL", "Drift", "Profile", "bin_of", "bins_of", "distance", "drift"]
