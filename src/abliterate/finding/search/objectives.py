"""What a search makes small, and what it costs to know it.

An `Objective` is a number read off a `Measured` edit; a `Probe` measures edits, as hooks, on one split of the prompts.
Other objectives than those in `OBJECTIVES` are made by putting them there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from abliterate.errors import UsageError
from abliterate.evaluation.judging import Label, Verdict
from abliterate.evaluation.probe import Level, Measured
from abliterate.evaluation.results import Answers, Shift, degenerate, manner_change, refused
from abliterate.evaluation.statistics import bootstrap_mean, wilson


@dataclass(frozen=True, slots=True)
class Objective:
    """A number to make small, and the first level at which it is known.

    `rate` is a share of replies; `scores` are refusal scores of harmful prompts, which only some objectives read.
    """

    name: str
    level: Level
    measure: Callable[[Measured], float]
    text: str
    rate: bool = False
    scores: bool = True


def _replies(measured: Measured, name: str) -> Answers:
    if measured.replies is None:
        raise ValueError("objective: it reads replies, and there are none at this level")
    return measured.replies[name]


def share_of(name: str, what: Callable[[Verdict], bool]) -> Callable[[Measured], float]:
    """The share of judged replies of which the verdict says so; it does not of replies cut off."""

    def measure(measured: Measured) -> float:
        known = [verdict for verdict in _replies(measured, name).verdicts if verdict.label is not Label.UNKNOWN]
        return sum(map(what, known)) / len(known) if known else math.nan

    return measure


def _lost(measured: Measured) -> float:
    """The share of judged replies to prompts on which the behaviour is to stay that do not show it; 0 without such."""
    if measured.replies is not None and "keep" not in measured.replies:
        return 0.0
    return 1 - share_of("keep", refused)(measured)


def _changed(which: Literal[0, 1]) -> Callable[[Measured], float]:
    """How much replies to harmless prompts have become longer (0) or more repetitive (1); shorter counts as longer."""

    def measure(measured: Measured) -> float:
        base = measured.base_replies
        if base is None:
            raise ValueError("objective: it compares replies, and there are none at this level")
        value = manner_change(base["harmless"], _replies(measured, "harmless"))[which].value
        return abs(value) if which == 0 else value

    return measure


def _of_shift(read: Callable[[Shift], float | None]) -> Callable[[Measured], float]:
    def measure(measured: Measured) -> float:
        if measured.shift is None:  # the unedited model has none
            return 0.0
        value = read(measured.shift)
        return math.nan if value is None else value

    return measure


def _kl_reply(shift: Shift) -> float | None:
    return None if shift.kl_reply is None else shift.kl_reply.mean.value


def _nll(shift: Shift) -> float | None:
    return None if shift.nll_change is None else shift.nll_change.value


#: An objective that reads no refusal scores of harmful prompts.
_reading = functools.partial(Objective, scores=False)

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        _reading("refusals", Level.REPLIES, share_of("harmful", refused), "harmful prompts refused", True),
        _reading("over-refusals", Level.REPLIES, share_of("harmless", refused), "harmless prompts refused", True),
        _reading("lost", Level.REPLIES, _lost, "prompts on which the behaviour is to stay and does not", True),
        _reading("kl", Level.FEW, lambda m: float(m.kl.mean()), "KL of the first token, harmless prompts, nats"),
        _reading("kl-reply", Level.SHIFT, _of_shift(_kl_reply), "KL per token of whole harmless replies, nats"),
        _reading("nll", Level.SHIFT, _of_shift(_nll), "what the own harmless replies cost more, nats per token"),
        Objective("refusal-score", Level.FEW, lambda m: float(m.harmful.mean()), "mean log-odds of refusal, harmful"),
        _reading("over-refusal-score", Level.FEW, lambda m: float(m.harmless.mean()), "the same, harmless"),
        _reading("degenerate", Level.REPLIES, share_of("harmless", degenerate), "harmless replies broken", True),
        _reading("length", Level.REPLIES, _changed(0), "change of length of harmless replies, tokens"),
        _reading("repetition", Level.REPLIES, _changed(1), "more repetition in harmless replies, share of 4-grams"),
    )
}


def objectives_named(option: str) -> tuple[Objective, ...]:
    """Objectives by name, at least two.

    Raises `UsageError` for names that are not in `OBJECTIVES`.
    """
    names = [name.strip() for name in option.split(",") if name.strip()]
    if unknown := [name for name in names if name not in OBJECTIVES]:
        raise UsageError(f"--objectives {unknown[0]}: expected some of {', '.join(OBJECTIVES)}")
    if len(set(names)) < 2 or len(set(names)) != len(names):
        raise UsageError(f"--objectives {option}: expected two or more different ones, found {len(set(names))}")
    return tuple(OBJECTIVES[name] for name in names)


def limits_of(option: str, base: Mapping[str, float]) -> dict[str, float]:
    """The most that each constrained objective may be: `over-refusals<=+0.02,kl<=0.1`.

    With a sign it is counted from `base`, the unedited model's values.

    Raises `UsageError` for what cannot be read.
    """
    limits = {}
    for text in filter(None, map(str.strip, option.split(","))):
        name, sign, value = (part.strip() for part in text.partition("<="))
        try:
            number = float(value)
        except ValueError:
            sign, number = "", 0.0
        if not sign or name not in OBJECTIVES or not math.isfinite(number):
            raise UsageError(
                f"--constraints {text}: expected NAME<=VALUE, or NAME<=+VALUE above the unedited model, with one of "
                f"{', '.join(OBJECTIVES)}"
            )
        limits[name] = number + (base[name] if value[0] in "+-" else 0.0)
    return limits


def with_keep(option: str, keep: bool) -> str:
    """Constraints with the one that a behaviour is lost nowhere that it is to stay, where there are such prompts."""
    if not keep or any(part.strip().startswith("lost") for part in option.split(",")):
        return option
    return ",".join(filter(None, (option, "lost<=+0.02")))


def constrained(option: str) -> tuple[Objective, ...]:
    """The objectives that `limits_of` will read."""
    return tuple(OBJECTIVES[name] for name in limits_of(option, dict.fromkeys(OBJECTIVES, 0.0)))


def values(measured: Measured, objectives: Sequence[Objective]) -> dict[str, float]:
    """The objectives that are known at this level."""
    known = Level.ALL if measured.replies is None else Level.SHIFT
    return {objective.name: objective.measure(measured) for objective in objectives if objective.level <= known}


def intervals(measured: Measured, objectives: Sequence[Objective]) -> dict[str, tuple[float, float]]:
    """95 % intervals of rates (Wilson) and of KLs (bootstrap over prompts), where they are known."""
    found = {}
    for objective in objectives:
        if objective.rate and measured.replies is not None:
            name = {"refusals": "harmful", "lost": "keep"}.get(objective.name, "harmless")
            value = objective.measure(measured)
            if name in measured.replies and not math.isnan(value):
                n = measured.replies[name].tally.n
                found[objective.name] = wilson(round(value * n), n)
        elif objective.name == "kl":
            found["kl"] = bootstrap_mean(measured.kl.tolist()).ci95
        elif objective.name == "kl-reply" and measured.shift is not None and measured.shift.kl_reply is not None:
            found["kl-reply"] = measured.shift.kl_reply.mean.ci95
    return found
