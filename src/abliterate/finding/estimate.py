"""Directions from activations: differences of means at every site, and how well each separates the classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.algebra import project_out
from abliterate.edit.direction import Candidates
from abliterate.edit.values import TensorValue
from abliterate.errors import NumericalError
from abliterate.model.activations import Moments


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Separation(TensorValue):
    """How far apart the classes lie along each site's own direction, on prompts it was not made from.

    `dprime` = (mean difference) / sqrt(mean of the variances); `auroc` = P(harmful > harmless), 0.5 is chance.
    """

    dprime: Float[Tensor, "k sites"]
    auroc: Float[Tensor, "k sites"]


def difference_of_means(harmful: Moments, harmless: Moments, *, projected: bool = False) -> Candidates:
    """r = mean(harmful) - mean(harmless) at every site (Arditi et al. 2024, eq. 2).

    `projected` removes from each r its component along the harmless mean of the same site, which is what harmless
    prompts need most.

    Raises `NumericalError` when a mean is not finite.
    """
    raw = harmful.mean - harmless.mean
    if not bool(torch.isfinite(raw).all()):
        raise NumericalError("difference of means: expected finite numbers, found NaN or infinity")
    if projected:
        raw = project_out(raw, harmless.mean)
    return Candidates(raw.float(), harmless.mean.float())


def separation(harmful: Float[Tensor, "n k sites"], harmless: Float[Tensor, "m k sites"]) -> Separation:
    """d′ and AUROC of the projections of two classes, per site."""
    spread = ((harmful.var(0) + harmless.var(0)) / 2).sqrt()
    dprime = (harmful.mean(0) - harmless.mean(0)) / spread.clamp_min(1e-12)
    return Separation(dprime, auroc(harmful, harmless))


def auroc(positive: Float[Tensor, n * rest], negative: Float[Tensor, m * rest]) -> Float[Tensor, "*rest"]:
    """P(positive > negative) + ½ P(equal): the Mann-Whitney statistic over all pairs."""
    pairs = positive[:, None] - negative[None]
    wins: Tensor = ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean((0, 1))
    return wins
