"""From evidence to a probability, calibrated on models of which it is known whether they were edited.

The coefficients come from `benchmarks/forensics.py`, which writes them into `calibration.json` beside this module with
what they were fitted on.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Word = Literal["altered", "no trace", "inconclusive"]

#: Depth of notches (see `forensics.notches`) from which directions were taken out: the directions of categories, which
#: nobody took out, and the own ones of two originals went down to 3.4 (3.8 with other prompts).
NOTCHED = 4.5
#: Probabilities from which a verdict is given; between them the evidence does not decide.
ALTERED, NO_TRACE = 0.9, 0.3


@dataclass(frozen=True, slots=True)
class Evidence:
    """How deep the deepest dips are: `pooled` over writers, and `layers`, the mean of the best three single units.

    A depth is the log of the eigenvalue behind the gap over the one before it, without a unit.
    """

    pooled: float
    layers: float


@dataclass(frozen=True, slots=True)
class Conclusion:
    """`probability` that directions were taken out as in the calibration, at even odds beforehand.

    "no trace" says nothing of edits that leave none: light ones, and those of a search (see docs/forensics.md).
    """

    word: Word
    probability: float


def judge(evidence: Evidence, fit: Mapping[str, float] | None = None) -> Conclusion:
    """The calibrated verdict; with other coefficients where given."""
    fit = calibration().coefficients if fit is None else fit
    logit = fit["constant"] + fit["pooled"] * evidence.pooled + fit["layers"] * evidence.layers
    probability = 1 / (1 + math.exp(-max(-30.0, min(30.0, logit))))
    word: Word = "altered" if probability >= ALTERED else "no trace" if probability <= NO_TRACE else "inconclusive"
    return Conclusion(word, probability)


def judge_difference(ablation: bool) -> float:
    """Probability that directions were taken out, when a comparison with the base says so or not.

    From how often it said so of edited and of other models in the calibration (Laplace's rule of succession).
    """
    return _by_counts(calibration().difference, ablation)


def judge_notches() -> float:
    """Probability that directions were taken out where notches are deeper than `NOTCHED`, by the same rule."""
    return _by_counts(calibration().notched, True)


def _by_counts(counts: Mapping[str, int], said: bool) -> float:
    found = (counts["found"] + 1) / (counts["edited"] + 2)
    mistaken = (counts["mistaken"] + 1) / (counts["others"] + 2)
    return found / (found + mistaken) if said else (1 - found) / (2 - found - mistaken)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The coefficients in force, counts of comparisons with a base and of notches, and in words what they come from."""

    coefficients: Mapping[str, float]
    difference: Mapping[str, int]
    notched: Mapping[str, int]
    lone: str
    beside: str
    notches: str


@functools.cache
def calibration() -> Calibration:
    """What `benchmarks/forensics.py` left beside this module."""
    text = importlib.resources.files("abliterate.forensics").joinpath("calibration.json").read_text("utf-8")
    content: dict[str, Any] = json.loads(text)
    fitted, counts, seen = content["fitted_on"], content["difference"], content["notches"]
    models = " and ".join(fitted["models"])
    what = f"edits at strengths {min(fitted['strengths']):g} to 1, none of them by a search"
    return Calibration(
        content["coefficients"],
        counts,
        seen,
        f"{fitted['nulls']} unedited and {fitted['edits']} edited files made of {models}: {what}",
        f"{counts['edited']} edits and {counts['others']} other changes of {models}",
        f"{seen['edited']} edits and {seen['others']} directions that nobody took out of {models}",
    )


__all__ = [
    "ALTERED",
    "NOTCHED",
    "NO_TRACE",
    "Calibration",
    "Conclusion",
    "Evidence",
    "Word",
    "calibration",
    "judge",
    "judge_difference",
    "judge_notches",
]
