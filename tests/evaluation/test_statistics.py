"""Intervals and tests: published examples, coverage by simulation beside intervals that do not cover, edges."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.evaluation.statistics import (
    Z95,
    Estimate,
    Share,
    bootstrap_mean,
    bootstrap_ratio,
    clustered_share,
    effective_size,
    mcnemar,
    paired_difference,
    rogan_gladen,
    sign_flips,
    wilson,
)

Interval = tuple[float, float]


def coverage(truth: float, draw: Callable[[np.random.Generator], Interval], times: int = 2000) -> float:
    """The share of seeded experiments whose interval holds the truth."""
    rng = np.random.default_rng(7)
    return sum(low <= truth <= high for low, high in (draw(rng) for _ in range(times))) / times


def test_share_is_a_pair_with_wilsons_interval() -> None:
    share = Share(3, 4)
    assert (share.value, share.ci95) == (0.75, wilson(3, 4))
    assert share == (3, 4)
    assert math.isnan(Share(0, 0).value)
    assert Share(0, 0).ci95 == (0.0, 1.0)


@pytest.mark.parametrize(
    ("sample", "sensitivity", "specificity", "low", "high", "unit"),
    [  # the examples of Lang and Reiczigel (2014), with the digits they print
        ((4060, 11284), (178, 179), (358, 359), 0.349, 0.372, 1e-3),
        ((51, 2971), (32, 33), (20, 20), 0, 0.053, 1e-3),
        ((712, 11862), (8, 10), (12, 12), 0, 0.147, 1e-3),
        ((259, 509), (84, 127), (96, 109), 0.58, 0.87, 1e-2),
        ((51, 509), (23, 41), (187, 195), 0.037, 0.195, 1e-3),
    ],
)
def test_rogan_gladen_gives_the_published_intervals(
    sample: tuple[int, int],
    sensitivity: tuple[int, int],
    specificity: tuple[int, int],
    low: float,
    high: float,
    unit: float,
) -> None:
    estimate = rogan_gladen(*sample, sensitivity, specificity)
    assert estimate is not None
    assert estimate.ci95 == pytest.approx((low, high), abs=unit / 2)
    se, sp = Share(*sensitivity).value, Share(*specificity).value
    assert estimate.value == pytest.approx((sample[0] / sample[1] + sp - 1) / (se + sp - 1))


@pytest.mark.parametrize("truth", [0.05, 0.4, 0.9])
def test_rogan_gladen_covers_where_less_careful_intervals_do_not(truth: float) -> None:
    se, sp, n, labelled = 0.75, 0.92, 400, 60
    called = truth * se + (1 - truth) * (1 - sp)

    def draw(rng: np.random.Generator) -> tuple[int, tuple[int, int], tuple[int, int]]:
        hits = (int(rng.binomial(labelled, p)) for p in (se, sp))
        return int(rng.binomial(n, called)), (next(hits), labelled), (next(hits), labelled)

    def corrected(rng: np.random.Generator) -> Interval:
        k, sensitivity, specificity = draw(rng)
        estimate = rogan_gladen(k, n, sensitivity, specificity)
        assert estimate is not None
        return estimate.ci95

    def uncorrected(rng: np.random.Generator) -> Interval:
        return wilson(draw(rng)[0], n)

    def errors_taken_as_known(rng: np.random.Generator) -> Interval:
        k, (s, _), (t, _) = draw(rng)
        low, high = ((p + t / labelled - 1) / ((s + t) / labelled - 1) for p in wilson(k, n))
        return max(0.0, low), min(1.0, high)

    assert coverage(truth, corrected) >= 0.93
    assert coverage(truth, uncorrected) < 0.9
    assert coverage(truth, errors_taken_as_known) < 0.9


def test_rogan_gladen_with_a_judge_that_never_errs_is_nearly_wilson() -> None:
    estimate = rogan_gladen(30, 100, (100_000, 100_000), (100_000, 100_000))
    assert estimate is not None
    assert estimate.value == pytest.approx(0.3)
    assert estimate.ci95 == pytest.approx(wilson(30, 100), abs=0.005)


def test_rogan_gladen_says_nothing_where_nothing_is_known() -> None:
    assert rogan_gladen(0, 0, (9, 10), (9, 10)) is None
    assert rogan_gladen(5, 10, (0, 0), (9, 10)) is None
    assert rogan_gladen(5, 10, (9, 10), (0, 0)) is None
    assert rogan_gladen(5, 10, (5, 10), (5, 10)) is None
    assert rogan_gladen(5, 10, (1, 10), (9, 10)) is None  # 0.1 + 0.9 is exactly chance
    assert rogan_gladen(5, 10, (100, 1000), (1, 1)) is None  # one label is too little to be better than chance
    assert rogan_gladen(5, 10, (9, 10), (9, 10)) is not None


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)).flatmap(
        lambda n: st.tuples(*(st.tuples(st.integers(0, top), st.just(top)) for top in n))
    )
)
def test_rogan_gladen_stays_within_bounds_and_mirrors(counts: tuple[tuple[int, int], ...]) -> None:
    (k, n), se, sp = counts
    estimate, mirrored = rogan_gladen(k, n, se, sp), rogan_gladen(n - k, n, sp, se)
    assert (estimate is None) == (mirrored is None)
    if estimate is None or mirrored is None:
        return
    assert 0 <= estimate.ci95[0] <= estimate.value <= estimate.ci95[1] <= 1
    assert mirrored.value == pytest.approx(1 - estimate.value, abs=1e-9)
    assert mirrored.ci95 == pytest.approx((1 - estimate.ci95[1], 1 - estimate.ci95[0]), abs=1e-9)


def test_mcnemar_gives_published_and_counted_values() -> None:
    assert mcnemar(12, 2) == pytest.approx(0.0129, abs=5e-5)  # Armitage and Berry (1994), two media for sputum
    assert mcnemar(1, 7) == 18 / 256
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(0, 40) == 2.0**-39  # all flips
    for b, c in ((3, 4), (0, 6), (9, 2), (17, 11)):
        tail = sum(Fraction(math.comb(b + c, i), 2 ** (b + c)) for i in range(min(b, c) + 1))
        assert mcnemar(b, c) == mcnemar(c, b) == float(min(Fraction(1), 2 * tail))


def test_mcnemar_is_fine_to_thousands() -> None:
    n, b = 6000, 2900
    terms = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(b + 1)]
    assert mcnemar(b, n - b) == pytest.approx(2 * sum(map(math.exp, terms)), rel=1e-8)
    assert mcnemar(0, 5000) == 0.0  # below the smallest float


def test_mcnemar_keeps_its_level_where_the_usual_approximation_does_not() -> None:
    def level(test: Callable[[int, int], float], n: int) -> float:
        return sum(math.comb(n, b) / (1 << n) for b in range(n + 1) if test(b, n - b) <= 0.05)

    def approximate(b: int, c: int) -> float:
        return math.erfc(abs(b - c) / math.sqrt(2 * (b + c)))

    sizes = range(1, 80)
    assert max(level(mcnemar, n) for n in sizes) <= 0.05
    assert max(level(approximate, n) for n in sizes) > 0.06


def test_paired_difference_gives_the_published_interval() -> None:
    # Complete response after and before consolidation therapy (Cavo et al. 2012), as in Fagerland, Lydersen and Laake.
    change = paired_difference(59, before_only=16, after_only=6, neither=80)
    assert change.value == pytest.approx(-0.0621, abs=5e-5)
    assert change.ci95 == pytest.approx((-0.1186, -0.0046), abs=5e-5)


def test_paired_difference_covers_where_the_usual_approximation_does_not() -> None:
    cells, n = (0.9, 0.07, 0.01, 0.02), 30
    truth = cells[2] - cells[1]

    def newcombe(rng: np.random.Generator) -> Interval:
        both, before, after, neither = rng.multinomial(n, cells)
        return paired_difference(int(both), int(before), int(after), int(neither)).ci95

    def wald(rng: np.random.Generator) -> Interval:
        _, b, c, _ = rng.multinomial(n, cells)
        half = Z95 * math.sqrt(b + c - (b - c) ** 2 / n) / n
        return (c - b) / n - half, (c - b) / n + half

    assert coverage(truth, newcombe) >= 0.93
    assert coverage(truth, wald) < 0.93


def test_pairs_tell_more_than_two_samples() -> None:
    """The same rates, with pairs that agree and with pairs that do not."""
    alike, unlike = paired_difference(70, 10, 0, 20), paired_difference(56, 24, 14, 6)
    assert alike.value == unlike.value == pytest.approx(-0.1)
    assert alike.ci95[1] - alike.ci95[0] < 0.7 * (unlike.ci95[1] - unlike.ci95[0])


@given(*[st.integers(0, 200)] * 4)
def test_paired_difference_stays_within_bounds_and_mirrors(both: int, before: int, after: int, neither: int) -> None:
    change = paired_difference(both, before, after, neither)
    if math.isnan(change.value):
        assert both + before + after + neither == 0
        assert change.ci95 == (-1.0, 1.0)
        return
    assert -1 <= change.ci95[0] <= change.value <= change.ci95[1] <= 1
    for mirrored in (paired_difference(both, after, before, neither), paired_difference(neither, before, after, both)):
        assert abs(mirrored.value) == pytest.approx(abs(change.value))
    back = paired_difference(both, after, before, neither)
    assert back.ci95 == pytest.approx((-change.ci95[1], -change.ci95[0]), abs=1e-9)


def test_all_flips_and_no_flips() -> None:
    assert paired_difference(0, 20, 0, 0).value == -1
    assert paired_difference(0, 20, 0, 0).ci95[0] == -1
    still = paired_difference(20, 0, 0, 0)
    assert still.value == 0
    assert still.ci95[0] < 0 < still.ci95[1]  # nothing changed in 20 cases: not proof that nothing changes


def test_bootstrap_mean_covers_where_the_spread_of_values_does_not() -> None:
    """A skewed quantity such as a divergence; the control takes the spread of values for that of their mean."""

    def draw(rng: np.random.Generator) -> Interval:
        return bootstrap_mean(rng.exponential(2.0, size=60).tolist(), seed=int(rng.integers(2**31))).ci95

    def too_narrow(rng: np.random.Generator) -> Interval:
        values = rng.exponential(2.0, size=60)
        half = Z95 * values.std() / 60
        return float(values.mean() - half), float(values.mean() + half)

    assert 0.9 <= coverage(2.0, draw, times=200) <= 0.99
    assert coverage(2.0, too_narrow, times=200) < 0.5


def test_bootstrap_mean_is_seeded_and_blind_to_order() -> None:
    values = np.random.default_rng(3).normal(size=50)
    first = bootstrap_mean(values.tolist())
    assert first == bootstrap_mean(values[::-1].tolist())
    assert first != bootstrap_mean(values.tolist(), seed=1)
    shifted = bootstrap_mean((10 + 3 * values).tolist())
    assert shifted.value == pytest.approx(10 + 3 * first.value)
    assert shifted.ci95 == pytest.approx(tuple(10 + 3 * end for end in first.ci95))
    expected = Z95 * values.std() / math.sqrt(50)
    assert first.ci95[1] - first.ci95[0] == pytest.approx(2 * expected, rel=0.1)


def test_bootstrap_mean_of_hardly_anything() -> None:
    nothing = bootstrap_mean([])
    assert all(map(math.isnan, (nothing.value, *nothing.ci95)))
    assert bootstrap_mean([0.1]) == bootstrap_mean([0.1, 0.1, 0.1]) == Estimate(0.1, (0.1, 0.1))


def test_bootstrap_mean_of_infinite_values_is_infinite() -> None:
    one = bootstrap_mean([math.inf, *range(9)])  # in a third of the resamples it is not
    assert one.value == one.ci95[1] == math.inf
    assert 0 < one.ci95[0] < 8
    assert bootstrap_mean([math.inf, *range(-9, 0)][::-1]).value == math.inf
    assert bootstrap_mean([-math.inf, 1.0, 2.0, 3.0]).ci95[0] == -math.inf
    assert bootstrap_mean([math.inf] * 3) == Estimate(math.inf, (math.inf, math.inf))
    many = bootstrap_mean([math.inf] * 20 + [1.0])
    assert many.ci95 == (math.inf, math.inf)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_bootstrap_mean_lies_among_the_values(values: list[float]) -> None:
    estimate = bootstrap_mean(values)
    slack = 1e-9 * (1 + max(map(abs, values)))
    for number in (estimate.value, *estimate.ci95):
        assert min(values) - slack <= number <= max(values) + slack


def test_impossible_counts_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="0 <= k <= n, got k=-1, n=5"):
        rogan_gladen(1, 5, (-1, 5), (1, 1))
    with pytest.raises(ValueError, match="counts >= 0"):
        mcnemar(-1, 2)
    with pytest.raises(ValueError, match="counts >= 0, got 1, 2, -3, 4"):
        paired_difference(1, 2, -3, 4)
    for values in ([1.0, math.nan, math.inf], [-math.inf, 2.0, math.inf], [math.nan]):
        with pytest.raises(ValueError, match="needs values that have a mean"):
            bootstrap_mean(values)


def test_statistics_does_not_import_torch() -> None:
    code = "import sys, abliterate.evaluation.statistics; print('torch' in sys.modules, 'scipy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\n"


# --- several replies to each prompt


def clusters(rng: np.random.Generator, prompts: int, replies: int) -> list[tuple[int, int]]:
    """Prompts whose chance of a refusal differs, mean 0.4."""
    return [(int(rng.binomial(replies, p)), replies) for p in rng.beta(0.4, 0.6, size=prompts)]


def test_interval_over_prompts_covers_where_one_over_replies_does_not() -> None:
    def over_prompts(rng: np.random.Generator) -> Interval:
        return clustered_share(clusters(rng, 60, 8))

    def over_replies(rng: np.random.Generator) -> Interval:
        counted = clusters(rng, 60, 8)
        return wilson(sum(k for k, _ in counted), sum(n for _, n in counted))

    assert coverage(0.4, over_prompts, 300) >= 0.91
    assert coverage(0.4, over_replies, 300) < 0.75


def test_prompts_that_are_all_alike_have_the_interval_of_so_many_prompts() -> None:
    assert clustered_share([(0, 4)] * 30 + [(0, 0)]) == wilson(0, 30)
    assert clustered_share([(4, 4)] * 30) == wilson(30, 30)
    assert clustered_share([]) == (0.0, 1.0)


def test_effective_size_is_between_prompts_and_replies() -> None:
    rng = np.random.default_rng(1)
    assert effective_size([(5, 5)] * 20 + [(0, 5)] * 20) == pytest.approx(40, rel=0.05)
    independent = [(int(rng.binomial(5, 0.5)), 5) for _ in range(400)]
    assert effective_size(independent) == pytest.approx(2000, rel=0.15)
    assert effective_size([(2, 4)] * 7) == 7.0
    assert effective_size([]) == 0.0


def test_ratio_is_that_of_all_cases_and_its_interval_holds_it() -> None:
    found = bootstrap_ratio([(1, 4), (3, 4), (2, 2), (0, 0)])
    assert found.value == pytest.approx(0.6)
    assert found.ci95[0] < 0.6 < found.ci95[1]
    assert math.isnan(bootstrap_ratio([]).value)


def test_sign_flips_see_a_change_and_none() -> None:
    assert sign_flips([0.5] * 12 + [0.0] * 40) < 0.01
    assert sign_flips([0.5, -0.5] * 12) > 0.8
    assert sign_flips([0.0] * 5) == sign_flips([]) == 1.0
