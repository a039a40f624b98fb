"""Intervals and tests for counts and paired measurements. Standard library and numpy only; never imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: Two-sided 95 % of the normal distribution.
Z95 = 1.959963984540054

#: Resamples of a bootstrap: the ends of a 95 % interval then rest on 50 of them each.
BOOTSTRAP_DRAWS = 2000
_TAIL = BOOTSTRAP_DRAWS // 40
#: Numbers that are drawn together: few calls for short samples, little memory for long ones.
_TOGETHER = 1 << 16


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % confidence interval, in the same unit."""

    value: float
    ci95: tuple[float, float]


class Share(NamedTuple):
    """`k` cases of `n`."""

    k: int
    n: int

    @property
    def value(self) -> float:
        """k / n, 0..1; NaN when there are no cases."""
        return self.k / self.n if self.n else math.nan

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `value`."""
        return wilson(self.k, self.n)


def wilson(k: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a proportion of `k` in `n`; the default `z` gives 95 %.

    With `n` = 0 nothing is known and the interval is (0, 1). Raises ValueError unless 0 <= k <= n.
    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209-212.
    """
    _check("wilson", k, n)
    if n == 0:
        return 0.0, 1.0
    p, zz = k / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    # At the ends the formula is exact only up to rounding.
    low = 0.0 if k == 0 else max(0.0, centre - half)
    high = 1.0 if k == n else min(1.0, centre + half)
    return low, high


def _check(name: str, k: float, n: float) -> None:
    if not 0 <= k <= n:
        raise ValueError(f"{name} needs 0 <= k <= n, got k={k}, n={n}")


def rogan_gladen(k: float, n: float, sensitivity: tuple[int, int], specificity: tuple[int, int]) -> Estimate | None:
    """The true rate behind `k` positives in `n` (effective) cases that a judge with known errors has called.

    `sensitivity` and `specificity` are the judge's (hits, n) on labelled cases; that these are samples too widens the
    interval. The value is (p + sp - 1) / (se + sp - 1), clipped to 0..1.

    None when there is nothing to say: no cases, a sensitivity or specificity never measured, or a judge that is no
    better than chance (se + sp <= 1, as measured or as the interval's corrected counts put it). The interval is
    widened to hold the value where clipping has moved that out. It was tried out by its authors for se and sp from
    0.7 up; for worse judges with few labels it is a rough guide.

    Raises ValueError unless 0 <= k <= n for all three counts. Sources: W. J. Rogan and B. Gladen, Am. J. Epidemiol.
    107 (1978) 71-76; Z. Lang and J. Reiczigel, Prev. Vet. Med. 113 (2014) 13-22, with (1 - P) where equation 4 of the
    latter prints (1 + P).
    """
    for count in ((k, n), sensitivity, specificity):
        _check("rogan_gladen", *count)
    if not (n and sensitivity[1] and specificity[1]):
        return None
    youden = sensitivity[0] / sensitivity[1] + specificity[0] / specificity[1] - 1
    se, n_se = _shrunk(*sensitivity, 1.0)
    sp, n_sp = _shrunk(*specificity, 1.0)
    if youden <= 1e-12 or se + sp - 1 <= 1e-12:
        return None
    value = min(1.0, max(0.0, (k / n + specificity[0] / specificity[1] - 1) / youden))
    p, n_p = _shrunk(k, n, Z95 * Z95 / 2)
    rate = (p + sp - 1) / (se + sp - 1)
    of_se, of_sp = se * (1 - se) / n_se, sp * (1 - sp) / n_sp
    half = Z95 * math.sqrt(p * (1 - p) / n_p + rate * rate * of_se + (1 - rate) ** 2 * of_sp) / (se + sp - 1)
    centre = rate + 2 * Z95 * Z95 * (rate * of_se - (1 - rate) * of_sp)
    return Estimate(value, (min(value, max(0.0, centre - half)), max(value, min(1.0, centre + half))))


def _shrunk(k: float, n: float, added: float) -> tuple[float, float]:
    """Proportion and count after `added` successes and as many failures (Agresti and Coull 1998)."""
    return (k + added) / (n + 2 * added), n + 2 * added


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of the pairs that changed: `b` in one direction, `c` in the other.

    Under no change of the rate either direction is as likely: p = 2 P(X <= min(b, c)) with X binomial(b + c, 1/2), at
    most 1. Pairs that did not change play no part. Raises ValueError for negative counts.
    Source: Q. McNemar, Psychometrika 12 (1947) 153-157, with the binomial distribution in place of its limit.
    """
    if min(b, c) < 0:
        raise ValueError(f"mcnemar needs counts >= 0, got b={b}, c={c}")
    n, term, tail = b + c, 1, 0
    for i in range(min(b, c) + 1):  # whole numbers: nothing is lost however small p gets
        tail += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * tail / (1 << n))


def paired_difference(both: int, before_only: int, after_only: int, neither: int) -> Estimate:
    """Change of a rate, after - before, over cases measured twice; the arguments count what was true of a case.

    The interval joins Wilson's intervals of both rates, with their correlation taken into account. Without cases the
    value is NaN and the interval (-1, 1). Raises ValueError for negative counts.
    Source: R. G. Newcombe, Stat. Med. 17 (1998) 2635-2650, method 10.
    """
    if min(both, before_only, after_only, neither) < 0:
        counts = f"{both}, {before_only}, {after_only}, {neither}"
        raise ValueError(f"paired_difference needs counts >= 0, got {counts}")
    n = both + before_only + after_only + neither
    if n == 0:
        return Estimate(math.nan, (-1.0, 1.0))
    before, after = Share(both + before_only, n), Share(both + after_only, n)
    phi = _phi(both, before_only, after_only, neither)
    value = (after_only - before_only) / n
    (low_b, high_b), (low_a, high_a) = before.ci95, after.ci95
    down = _third_side(after.value - low_a, high_b - before.value, phi)
    up = _third_side(high_a - after.value, before.value - low_b, phi)
    return Estimate(value, (max(-1.0, value - down), min(1.0, value + up)))


def _phi(both: int, before_only: int, after_only: int, neither: int) -> float:
    """Correlation of the two measurements, towards 0 by Newcombe's continuity correction where it is positive."""
    n = both + before_only + after_only + neither
    before, after = both + before_only, both + after_only
    product = before * (n - before) * after * (n - after)
    if product == 0:
        return 0.0
    excess: float = both * neither - before_only * after_only
    if excess > 0:
        excess = max(0.0, excess - n / 2)
    return excess / math.sqrt(product)


def _third_side(a: float, b: float, cosine: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * cosine * a * b + b * b))


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean of `values` with its 95 % percentile interval over 2000 resamples; the order of the values does not matter.

    No values: NaN, with NaN ends. One value, or all alike: the interval is that point, which says only that nothing
    is known of the spread. Below some twenty values such intervals are known to be too narrow. With infinite values
    (a divergence can be infinite) the mean is infinite; the far end of the interval is finite if hardly any are.
    Raises ValueError for values without a mean: NaN, or infinities of both signs. Source: B. Efron, Ann. Stat. 7
    (1979) 1-26.
    """
    numbers = np.sort(np.asarray(values, dtype=np.float64))
    if numbers.size == 0:
        return Estimate(math.nan, (math.nan, math.nan))
    if np.isnan(numbers).any() or -numbers[0] == numbers[-1] == math.inf:
        raise ValueError("bootstrap_mean needs values that have a mean, got NaN or infinities of both signs")
    mean = float(numbers.mean())
    if numbers[0] == numbers[-1]:
        return Estimate(float(numbers[0]), (float(numbers[0]), float(numbers[0])))
    rng, together = np.random.default_rng(seed), max(1, _TOGETHER // numbers.size)
    counts = [min(together, BOOTSTRAP_DRAWS - start) for start in range(0, BOOTSTRAP_DRAWS, together)]
    means = [numbers[rng.integers(numbers.size, size=(count, numbers.size))].mean(axis=1) for count in counts]
    low, high = np.sort(np.concatenate(means))[[_TAIL, -_TAIL - 1]]
    return Estimate(mean, (float(low), float(high)))


def bootstrap_ratio(clusters: Sequence[tuple[float, int]], *, seed: int = 0) -> Estimate:
    """Σk / Σn over clusters (k, n), with its 95 % percentile interval over 2000 resamples of whole clusters.

    For several replies to each prompt: k of the n replies to one prompt. Clusters without cases have no part. Without
    any the value and the ends are NaN; where all clusters have the same share the interval is that point, and says
    nothing. Source: A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
    """
    known = np.array([(k, n) for k, n in clusters if n], dtype=np.float64).reshape(-1, 2)
    if not len(known):
        return Estimate(math.nan, (math.nan, math.nan))
    value = float(known[:, 0].sum() / known[:, 1].sum())
    rng, size = np.random.default_rng(seed), len(known)
    together = max(1, _TOGETHER // size)
    counts = [min(together, BOOTSTRAP_DRAWS - start) for start in range(0, BOOTSTRAP_DRAWS, together)]
    sums = np.concatenate([known[rng.integers(size, size=(count, size))].sum(axis=1) for count in counts])
    low, high = np.sort(sums[:, 0] / sums[:, 1])[[_TAIL, -_TAIL - 1]]
    return Estimate(value, (float(low), float(high)))


def effective_size(clusters: Sequence[tuple[int, int]]) -> float:
    """How many independent cases would give Σk / Σn the variance that it has over clusters (k, n).

    Between the number of clusters with cases and that of cases: replies to one prompt are alike. Source: L. Kish,
    Survey Sampling (1965), section 5.4 (the design effect).
    """
    known = [(k, n) for k, n in clusters if n]
    cases, groups = sum(n for _, n in known), len(known)
    if groups < 2:
        return float(groups)
    p = sum(k for k, _ in known) / cases
    variance = groups / (groups - 1) * sum((k - p * n) ** 2 for k, n in known) / cases**2
    return float(groups) if variance == 0 else min(float(cases), max(float(groups), p * (1 - p) / variance))


def clustered_share(clusters: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The 95 % interval of Σk / Σn over clusters (k, n); Wilson's over clusters where all have the same share."""
    known = [(k, n) for k, n in clusters if n]
    shares = {k / n for k, n in known}
    if len(shares) > 1:
        return bootstrap_ratio(known).ci95
    alike = shares.pop() if shares else 0.0
    return wilson(round(alike * len(known)), len(known))


def sign_flips(changes: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p of a sum of changes, one for each cluster, if either sign of each were as likely (9999 draws).

    Source: R. A. Fisher, The Design of Experiments (1935), section 21. Changes of 0 play no part.
    """
    moved = np.array([change for change in changes if change], dtype=np.float64)
    if not len(moved):
        return 1.0
    rng, draws = np.random.default_rng(seed), 9999
    sums = np.abs((rng.integers(0, 2, size=(draws, len(moved))) * 2 - 1) @ moved)
    return (1 + int((sums >= abs(moved.sum()) - 1e-9).sum())) / (draws + 1)
