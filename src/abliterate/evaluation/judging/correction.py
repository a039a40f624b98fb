"""Which calibration speaks for the replies at hand.

In this order: the user's own of this model's replies to this set of prompts; the user's own of this model's replies to
a mixture of sets; of all others, the user's and those of the package, the one whose labelled replies are nearest to
those at hand (`drift.distance`). A calibration that lacks refusals, or replies that are none, corrects nothing and is
passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from abliterate.evaluation.judging.base import Judge
from abliterate.evaluation.judging.calibration import Calibration, builtin_calibrations, own_calibrations, same_model
from abliterate.evaluation.judging.drift import distance


@dataclass(frozen=True, slots=True)
class ChosenCalibration:
    """A calibration and why it was chosen: the end of a sentence."""

    calibration: Calibration
    why: str


def choose_calibration(judge: Judge, model: str, prompts: str, bins: Mapping[str, int]) -> ChosenCalibration | None:
    """The calibration for replies of `model` to a set of prompts, counted in `bins`; None where nothing is known.

    Raises AbliterateError when a stored one is damaged.
    """
    own = [one for one in own_calibrations(judge) if _usable(one)]
    of_model: dict[str, Calibration] = {one.prompts: one for one in own if one.model and same_model(one.model, model)}
    for kind in (prompts, ""):
        if (found := of_model.get(kind)) is not None:
            to = f" to {kind} prompts" if kind else ""
            return ChosenCalibration(found, f"your own, of this model's replies{to}")
    others = own + [one for one in builtin_calibrations(judge) if _usable(one)]
    if not others:
        return None
    nearest = min(others, key=lambda one: distance(one.profile, bins))
    return ChosenCalibration(nearest, f"the nearest of {len(others)}" if len(others) > 1 else "the only one there is")


def _usable(calibration: Calibration) -> bool:
    return bool(calibration.recall.n and calibration.specificity.n)


__all__ = ["ChosenCalibration", "choose_calibration"]
