"""The front among points that were scored, and which of its points to take. Pure numbers, all objectives minimised.

A point is whatever the caller has: what comes in are the points' `values`, one number per objective, and what comes out
are indices into them. One point dominates another if it is no worse in every objective and better in one; the points
that none dominates are the front.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, Context

from abliterate.errors import GateNotMet, UsageError

Values = Sequence[float]

#: Decimals of lengths on axes that run from 0 to 1: what differs by less is a tie.
_DIGITS = 9

#: A limit that a point would need is named with three digits, rounded up so that the point does keep it.
_ROUND_UP = Context(prec=3, rounding=ROUND_CEILING)


def nondominated(values: Sequence[Values]) -> list[int]:
    """Indices of the front, in the order given.

    Of points with the same values the first is kept; a point with a NaN is never on the front and dominates nothing.

    Raises:
        ValueError: Points differ in their number of objectives.
    """
    kept: list[int] = []
    for index, new in enumerate(values):
        if any(map(math.isnan, new)) or any(_covers(values[old], new) for old in kept):
            continue
        kept = [old for old in kept if not _covers(new, values[old])]
        kept.append(index)
    return kept


def _covers(one: Values, other: Values) -> bool:
    """No worse in any objective: dominates, or is the same."""
    return all(a <= b for a, b in zip(one, other, strict=True))


def hypervolume(values: Iterable[Values], reference: Values) -> float:
    """The area that points dominate within the box that ends at `reference`, exactly, for two objectives.

    Points that are not better than the reference in both objectives, and NaNs, add nothing.

    Raises:
        ValueError: There are not two objectives.
    """
    if len(reference) != 2:
        raise ValueError(f"hypervolume takes 2 objectives, found {len(reference)}")
    right, top = reference
    area, lowest = 0.0, top
    for x, y in sorted((x, y) for x, y in values if x < right and y < top):
        if y < lowest:
            area += (right - x) * (lowest - y)
            lowest = y
    return area


def knee(values: Sequence[Values]) -> int:
    """Index of the point from which on less of one objective costs much of another.

    Every objective is scaled to run from 0 to 1 over the front. With two objectives the knee is the point farthest from
    the chord between the front's two ends, on the side where both objectives are small (Das, On characterizing the
    "knee" of the Pareto curve based on normal-boundary intersection, Structural Optimization 18, 1999; Kneedle, Satopää
    et al. 2011, looks for the same on a smoothed curve). Where nothing lies on that side, it is one of the ends. With
    more objectives it is the point nearest to the ideal one, which has the least of each.

    Ties, such as both ends of a front of two, go to the least first objective, then the next. Dominated points and
    points that are not finite change nothing.

    Raises:
        ValueError: No point is finite.
    """
    front = _finite_front(values)
    if not front:
        raise ValueError("a knee needs a point whose values are all finite, found none")
    scaled = _scaled([values[index] for index in front])
    # With ends at (0, 1) and (1, 0) a point lies (1 − x − y) / √2 below the chord: the farthest has the least sum.
    lengths = [sum(point) if len(point) == 2 else math.hypot(*point) for point in scaled]
    # `front` is sorted by the objectives and min takes the first of equals.
    return min(zip(front, lengths, strict=True), key=lambda pair: round(pair[1], _DIGITS))[0]


def _finite_front(values: Sequence[Values]) -> list[int]:
    """The front of the finite points, by their first objective."""
    finite = [index for index, point in enumerate(values) if all(map(math.isfinite, point))]
    front = [finite[place] for place in nondominated([values[index] for index in finite])]
    return sorted(front, key=lambda index: tuple(values[index]))


def _scaled(front: Sequence[Values]) -> list[tuple[float, ...]]:
    """Every objective from 0 to 1 over these points; 0 where they do not differ."""
    lows = [min(axis) for axis in zip(*front, strict=True)]
    spans = [(max(axis) - min(axis)) or 1.0 for axis in zip(*front, strict=True)]
    return [tuple((v - low) / span for v, low, span in zip(point, lows, spans, strict=True)) for point in front]


def choose_index(values: Sequence[Values], names: Sequence[str], limits: Mapping[str, float]) -> int:
    """Index of the point to take: `limits` say how much of an objective is allowed at most.

    Of the points that keep every limit: the one with the least of the first objective that has no limit (then the next
    ones, for ties); the knee if no objective has a limit or all have. Points that are not finite are never taken.

    Args:
        values: One number per name and point.
        names: The objectives.
        limits: Objective to the most it may be.

    Raises:
        UsageError: A limit is on something that is no objective.
        GateNotMet: No point keeps them; names the nearest, numbered from 1 in the order given, and what it would need.
    """
    for name in limits:
        if name not in names:
            raise UsageError(f"limit on {name}: expected one of the objectives {', '.join(names)}; add it to them")
    finite = [index for index, point in enumerate(values) if all(map(math.isfinite, point))]
    most = [limits.get(name, math.inf) for name in names]
    kept = [index for index in finite if _covers(values[index], most)]
    if not kept:
        raise GateNotMet(_what_is_missing(values, finite, names, most))
    free = [axis for axis, name in enumerate(names) if name not in limits]
    if 0 < len(free) < len(names):
        return min(kept, key=lambda index: ([values[index][axis] for axis in free], list(values[index])))
    return kept[knee([values[index] for index in kept])]


def _what_is_missing(values: Sequence[Values], finite: list[int], names: Sequence[str], most: Values) -> str:
    """One line: what was asked for, the point that comes nearest to it, and the limits that it would keep."""
    if not finite:
        return f"no point to choose from: of {len(values)} none has a finite value of every objective; search longer"
    spans = [(max(axis) - min(axis)) or 1.0 for axis in zip(*(values[index] for index in finite), strict=True)]

    def excess(index: int) -> float:
        return max((value - limit) / span for value, limit, span in zip(values[index], most, spans, strict=True))

    nearest = min(finite, key=lambda index: (excess(index), *values[index]))
    has = zip(names, values[nearest], most, strict=True)
    asked = " and ".join(f"{name} ≤ {limit:g}" for name, limit in zip(names, most, strict=True) if limit < math.inf)
    found = ", ".join(f"{name} {value:.3g}" for name, value in zip(names, values[nearest], strict=True))
    needed = " and ".join(f"{name} ≤ {_rounded_up(value)}" for name, value, limit in has if value > limit)
    return (
        f"no point keeps {asked}: of {len(values)} the nearest is point {nearest + 1} ({found}), which needs {needed}; "
        "allow that or search longer"
    )


def _rounded_up(value: float) -> str:
    return f"{float(_ROUND_UP.create_decimal(repr(value))):g}"


def thin(values: Sequence[Values], count: int) -> list[int]:
    """Indices of at most `count` points spread evenly along the front, by their first objective.

    The ends (the least of each objective) and the knee come first, for one point the knee alone; then always the point
    that is farthest from those taken, so that no point is more than twice as far from a taken one as it has to be
    (Gonzalez 1985). Distances are sums over the scaled objectives: along a front of two objectives, which only falls,
    these are lengths of its arc.

    Raises:
        ValueError: `count` is below one.
    """
    if count < 1:
        raise ValueError(f"expected at least one point to keep, found {count}")
    front = _finite_front(values)
    if len(front) <= count:
        return front
    scaled = dict(zip(front, _scaled([values[index] for index in front]), strict=True))
    middle = front[knee([values[index] for index in front])]
    ends = [
        min(front, key=lambda index: (values[index][axis], *values[index])) for axis in range(len(values[front[0]]))
    ]
    taken = list(dict.fromkeys([*ends, middle]))[:count] if count > 1 else [middle]

    def apart(index: int) -> float:
        return min(math.fsum(abs(a - b) for a, b in zip(scaled[index], scaled[one], strict=True)) for one in taken)

    while len(taken) < count:
        taken.append(max(front, key=apart))
    return [index for index in front if index in taken]


def matched(values: Sequence[Values], levels: Iterable[float]) -> list[float | None]:
    """The least second objective among points whose first is at most a level, for each level; None where none is."""
    sound = [point for point in values if not any(map(math.isnan, point))]
    return [min((point[1] for point in sound if point[0] <= level), default=None) for level in levels]
