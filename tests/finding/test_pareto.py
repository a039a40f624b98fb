"""Fronts: brute force, what must not change them, areas counted on a grid, and choices that can be checked by eye."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from abliterate.errors import GateNotMet, UsageError
from abliterate.finding.search.pareto import choose_index, hypervolume, knee, matched, nondominated, thin

Point = tuple[float, ...]
NAMES = ("refusals", "kl")

#: Few different numbers, so that ties, duplicates and domination are common.
small = st.integers(0, 8).map(float)
pairs = st.lists(st.tuples(small, small), min_size=1, max_size=12)
triples = st.lists(st.tuples(small, small, small), min_size=1, max_size=12)
real_pairs = st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 9)), min_size=1, max_size=12)

#: A front with a plain bend at its third point.
BENT = [(0.9, 0.0), (0.5, 0.02), (0.1, 0.03), (0.08, 0.3), (0.0, 1.0)]


def dominates(one: Point, other: Point) -> bool:
    no_worse = all(a <= b for a, b in zip(one, other, strict=True))
    return no_worse and any(a < b for a, b in zip(one, other, strict=True))


@given(st.one_of(pairs, triples))
def test_front_is_what_no_other_point_dominates(values: list[Point]) -> None:
    expected = [
        index
        for index, point in enumerate(values)
        if point not in values[:index] and not any(dominates(other, point) for other in values)
    ]
    assert nondominated(values) == expected


@given(pairs, st.integers(0, 12), st.sampled_from([(math.nan, -1.0), (-1.0, math.nan), (math.nan, math.nan)]))
def test_nan_is_not_on_the_front_and_beats_nothing(values: list[Point], place: int, broken: Point) -> None:
    place = min(place, len(values))
    front = nondominated([*values[:place], broken, *values[place:]])
    assert place not in front
    assert [index - (index > place) for index in front] == nondominated(values)


def test_infinite_damage_can_be_on_a_front_of_its_own() -> None:
    assert nondominated([(0.0, math.inf), (1.0, 0.0), (1.0, math.inf)]) == [0, 1]
    assert nondominated([]) == []


def test_points_must_have_the_same_objectives() -> None:
    with pytest.raises(ValueError, match="zip"):
        nondominated([(1.0, 2.0), (0.0, 1.0, 2.0)])


@given(pairs)
def test_area_is_the_number_of_cells_of_a_grid(values: list[tuple[float, float]]) -> None:
    """Numbers are whole, so a cell is covered as a whole or not at all."""
    cells = itertools.product(range(7), range(6))
    covered = sum(any(x <= a and y <= b for x, y in values) for a, b in cells)
    assert hypervolume(values, (7, 6)) == covered


@given(real_pairs, st.tuples(st.floats(-50, 50), st.floats(0, 9)))
def test_area_grows_with_points_and_stays_with_dominated_ones(
    values: list[tuple[float, float]], new: tuple[float, float]
) -> None:
    before, after = (hypervolume(points, (50.0, 9.0)) for points in (values, [*values, new]))
    assert after >= before * (1 - 1e-12)
    if any(dominates(old, new) for old in values):
        assert after == before
    elif new not in values and new[0] < 49 and new[1] < 8 and all(new[0] < x - 1 or new[1] < y - 1 for x, y in values):
        assert after > before


def test_area_of_few_points() -> None:
    assert hypervolume([], (1, 1)) == 0
    assert hypervolume([(0.5, 0.5)], (1, 1)) == 0.25
    assert hypervolume([(0.25, 0.5), (0.5, 0.25)], (1, 1)) == 0.75 * 0.5 + 0.5 * 0.25
    assert hypervolume([(2.0, 0.0), (0.0, 2.0), (1.0, 1.0), (math.nan, 0.0)], (1, 1)) == 0
    with pytest.raises(ValueError, match="2 objectives, found 3"):
        hypervolume([(0.0, 0.0, 0.0)], (1, 1, 1))


def test_knee_is_the_bend() -> None:
    assert knee(BENT) == 2
    assert knee(BENT[::-1]) == 2
    # The control: where the bend is pushed out to the chord, the knee is elsewhere.
    assert knee([*BENT[:2], (0.45, 0.29), *BENT[3:]]) == 3


def test_knee_where_there_is_no_bend() -> None:
    assert knee([(0.3, 0.7)]) == 0
    assert knee([(1.0, 0.0), (0.0, 5.0)]) == 1
    assert knee([(4.0, 0.0), (3.0, 1.0), (1.0, 3.0), (0.0, 4.0)]) == 3
    outward = [(1.0, 0.0), (0.9, 0.9), (0.0, 1.0)]
    assert knee(outward) == 2


def test_knee_of_three_objectives_is_nearest_to_the_ideal() -> None:
    ends = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    assert knee([*ends, (0.2, 0.2, 0.2)]) == 3
    assert knee([*ends, (0.9, 0.9, 0.9)]) == 2


def test_knee_looks_at_finite_points_only() -> None:
    assert knee([(math.nan, 0.0), (-1.0, math.inf), *BENT]) == 4
    with pytest.raises(ValueError, match="finite"):
        knee([(math.nan, 0.0), (0.0, math.inf)])


@given(pairs, st.tuples(small, small))
def test_dominated_points_change_no_knee(values: list[Point], new: Point) -> None:
    assume(any(dominates(old, new) for old in values))
    assert knee([*values, new]) == knee(values)


@given(real_pairs, st.floats(0.01, 100), st.floats(0.01, 100), st.floats(-10, 10))
def test_scaled_and_shifted_axes_have_the_same_knee(
    values: list[Point], first: float, second: float, shift: float
) -> None:
    values = [(round(x, 2), round(y, 2)) for x, y in values]
    moved = [(first * x + shift, second * y) for x, y in values]
    assume(nondominated(moved) == nondominated(values))
    assert values[knee(moved)] == values[knee(values)]


@given(pairs.flatmap(lambda values: st.tuples(st.just(values), st.permutations(values))))
def test_order_of_points_does_not_matter(both: tuple[list[Point], list[Point]]) -> None:
    values, shuffled = both
    assert shuffled[knee(shuffled)] == values[knee(values)]
    assert [shuffled[index] for index in thin(shuffled, 4)] == [values[index] for index in thin(values, 4)]


def test_choice_with_limits() -> None:
    assert choose_index(BENT, NAMES, {}) == 2
    assert choose_index(BENT, NAMES, {"kl": 0.02}) == 1
    assert choose_index(BENT, NAMES, {"kl": 0.5}) == 3
    assert choose_index(BENT, NAMES, {"refusals": 0.5}) == 1
    assert choose_index(BENT, NAMES, {"refusals": 0.1, "kl": 1.0}) == 2 + knee(BENT[2:])
    assert choose_index([(0.1, math.nan), (0.1, 0.3), (math.inf, 0.0)], NAMES, {"refusals": 0.2}) == 1


def test_of_equals_the_one_that_is_less_in_what_is_limited() -> None:
    assert choose_index([(0.1, 0.02), (0.1, 0.01), (0.2, 0.0)], NAMES, {"kl": 0.05}) == 1


def test_choice_among_three_objectives() -> None:
    values = [(0.1, 0.5, 0.3), (0.1, 0.4, 0.3), (0.3, 0.1, 0.0)]
    assert choose_index(values, ("refusals", "kl", "length"), {"length": 0.3}) == 1
    assert choose_index(values, ("refusals", "kl", "length"), {"refusals": 0.3, "length": 0.3}) == 2


@given(pairs, small, small)
def test_what_is_chosen_keeps_the_limits_and_is_not_dominated_by_another_that_does(
    values: list[Point], refusals: float, kl: float
) -> None:
    for limits in ({"refusals": refusals}, {"kl": kl}, {"refusals": refusals, "kl": kl}):
        kept = [p for p in values if p[0] <= limits.get("refusals", 9) and p[1] <= limits.get("kl", 9)]
        if not kept:
            with pytest.raises(GateNotMet, match="no point keeps"):
                choose_index(values, NAMES, limits)
            continue
        taken = values[choose_index(values, NAMES, limits)]
        assert taken in kept
        assert not any(dominates(other, taken) for other in kept)
        if limits == {"kl": kl}:
            assert taken[0] == min(p[0] for p in kept)


def test_what_is_missing_is_said_in_one_line() -> None:
    with pytest.raises(GateNotMet) as caught:
        choose_index(BENT[2:], NAMES, {"refusals": 0.05, "kl": 0.1})
    assert str(caught.value) == (
        "no point keeps refusals ≤ 0.05 and kl ≤ 0.1: of 3 the nearest is point 2 (refusals 0.08, kl 0.3), which "
        "needs refusals ≤ 0.08 and kl ≤ 0.3; allow that or search longer"
    )


@given(real_pairs, st.floats(-60, 60), st.floats(-1, 9))
def test_the_nearest_point_keeps_the_limits_that_it_is_said_to_need(
    values: list[Point], refusals: float, kl: float
) -> None:
    limits = {"refusals": refusals, "kl": kl}
    assume(not any(p[0] <= refusals and p[1] <= kl for p in values))
    with pytest.raises(GateNotMet) as caught:
        choose_index(values, NAMES, limits)
    assert "\n" not in str(caught.value)
    needed = re.findall(r"([a-z]+) ≤ (\S+)", str(caught.value).partition("which needs")[2].replace(";", " "))
    choose_index(values, NAMES, limits | {name: float(value) for name, value in needed})


def test_nothing_to_choose_from() -> None:
    for values in ([], [(math.nan, 0.0), (0.0, math.inf)]):
        with pytest.raises(GateNotMet, match=f"of {len(values)} none has a finite value"):
            choose_index(values, NAMES, {"kl": 1.0})


def test_limit_on_something_that_was_not_measured() -> None:
    with pytest.raises(UsageError, match="limit on kl: expected one of the objectives refusals, kl-reply"):
        choose_index([(0.0, 0.0)], ("refusals", "kl-reply"), {"kl": 0.1})


def spread(values: Sequence[Point], taken: list[int]) -> float:
    """How far the worst point of the front is from one that was taken, along the front's scaled arc."""
    front = [values[index] for index in nondominated(values)]
    spans = [(max(axis) - min(axis)) or 1 for axis in zip(*front, strict=True)]

    def apart(one: Point, other: Point) -> float:
        return sum(abs(a - b) / span for a, b, span in zip(one, other, spans, strict=True))

    return max(min(apart(point, values[index]) for index in taken) for point in front)


@given(st.one_of(pairs, triples), st.integers(1, 8))
def test_thinned_front_keeps_ends_and_knee_and_is_spread_almost_as_well_as_can_be(
    values: list[Point], count: int
) -> None:
    taken, front = thin(values, count), nondominated(values)
    assert len(taken) == min(count, len(front)) == len(set(taken))
    assert set(taken) <= set(front)
    assert [values[index] for index in taken] == sorted(values[index] for index in taken)
    axes = len(values[0])
    kept = {min(front, key=lambda index: (values[index][axis], *values[index])) for axis in range(axes)}
    kept.add(front[knee([values[index] for index in front])])
    if count == 1:
        assert taken == [front[knee([values[index] for index in front])]]
    elif count > axes:
        assert kept <= set(taken)
        rest, more = set(front) - kept, len(taken) - len(kept)
        best = min(spread(values, [*kept, *others]) for others in itertools.combinations(rest, more))
        assert spread(values, taken) <= 2 * best + 1e-9


def test_thinning_is_even_where_the_front_is_crowded() -> None:
    """Forty points at one end and few elsewhere: taking every n-th would leave the other end bare."""
    steps = [*(0.01 * n for n in range(40)), *map(float, range(1, 11))]
    crowded = [(step, 10 - step) for step in steps]
    taken = thin(crowded, 5)
    assert [crowded[index][0] for index in taken] == [0.0, 2.0, 5.0, 7.0, 10.0]
    every_twelfth = list(range(0, 50, 12))
    assert spread(crowded, taken) < spread(crowded, every_twelfth) / 2


def test_thinning_edges() -> None:
    assert thin([], 3) == []
    assert thin(BENT, 2) == [4, 0]
    assert thin(BENT, 3) == [4, 2, 0]
    assert thin(BENT, 9) == [4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="at least one"):
        thin(BENT, 0)


@given(pairs, small, small)
def test_matched_damage_falls_as_more_refusals_are_allowed(
    values: list[tuple[float, float]], low: float, high: float
) -> None:
    found = matched(values, [min(low, high), max(low, high)])
    assert found == [
        min((y for x, y in values if x <= level), default=None) for level in (min(low, high), max(low, high))
    ]
    assert found[0] is None or (found[1] is not None and found[1] <= found[0])


def test_matched_levels() -> None:
    assert matched(BENT, [-0.1, 0.0, 0.1, 2.0]) == [None, 1.0, 0.03, 0.0]
    assert matched([(0.0, math.nan), (math.nan, 0.0)], [1.0]) == [None]
