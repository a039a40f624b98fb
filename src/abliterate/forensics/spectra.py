"""How little a set of writers puts along some direction: the small end of the spectrum of W Wᵀ.

An exact ablation leaves r̂ᵀ W = 0 in every edited writer, so that G = W Wᵀ (scaled to a mean eigenvalue of 1) has an
eigenvalue near zero that stands apart from the next. `lows` finds that end; `dips` says how far apart it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.errors import NumericalError

#: Eigenpairs looked at: a gap behind the k-th is the trace of k directions.
LOWEST = 6
#: A vector that lives on fewer coordinates than this is a dead coordinate of the stream, as trained models have them.
FEWEST_COORDINATES = 8.0
_GUARD = 10
_STEPS = 12
_SHIFT = 1e-6
#: Numbers below this are as good as none: bfloat16 leaves about this much.
_FLOOR = 1e-6


@dataclass(frozen=True, slots=True)
class Low:
    """The `LOWEST` eigenvalues (mean 1, ascending) and eigenvectors [k, d] of one Gram matrix."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k d"]


@dataclass(frozen=True, slots=True)
class Dip:
    """Directions along which little is written: `depth` = log of what follows over the last of them."""

    depth: float
    basis: Float[Tensor, "rank d"]


def gram(matrix: Float[Tensor, "d n"]) -> Float[Tensor, "d d"]:
    """W Wᵀ scaled to a mean eigenvalue of 1; zero for a matrix of zeros. Squares of large numbers stay finite."""
    scaled = matrix / matrix.abs().amax().clamp_min(torch.finfo(matrix.dtype).tiny)
    square = scaled @ scaled.T
    return square * (len(square) / square.trace().clamp_min(1e-30))


def levelled(square: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """D^-½ G D^-½ with D its diagonal, and D^½: what is left when every coordinate is written equally strongly.

    Coordinates that are hardly written (dead ones of a trained model) would hide a dip; those never written stay so.
    """
    lengths = square.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(lengths > 1e-4 * lengths.mean(), 1 / lengths.clamp_min(1e-30), torch.ones_like(lengths))
    return inverse[:, None] * square * inverse, lengths


def lowest(square: Float[Tensor, "d d"]) -> Low:
    """The small end of the spectrum by inverse iteration on a block of vectors (one Cholesky factorisation).

    Cheaper by far than all eigenpairs, and exact where it matters: the further an eigenvalue stands apart, the faster
    its vector is found. Eigenvalues below 1e-6 are not told from zero.
    """
    wide = square.double() if square.dtype != torch.float64 else square.clone()
    size = len(wide)
    if size <= 4 * (LOWEST + _GUARD):
        values, vectors = torch.linalg.eigh(wide)
        return Low(values[:LOWEST].clamp_min(0), vectors[:, :LOWEST].T.contiguous())
    factor = _factor(wide)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(size, LOWEST + _GUARD, generator=generator, dtype=wide.dtype).to(wide.device)
    for _ in range(_STEPS):
        block = torch.linalg.qr(torch.cholesky_solve(block, factor)).Q
    values, mix = torch.linalg.eigh(block.T @ wide @ block)
    return Low(values[:LOWEST].clamp_min(0), (block @ mix[:, :LOWEST]).T.contiguous())


def _factor(square: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The Cholesky factor of a square with the least shift that makes it positive.

    The sum of products of float32 numbers can have eigenvalues below zero, as far as rounding goes.
    """
    if not bool(torch.isfinite(square).all()):
        raise NumericalError("writers: their numbers are too large to compute with; is the model damaged?")
    shift = _SHIFT * float(square.diagonal().mean().clamp_min(1e-30))
    while True:
        shifted = square.clone()
        shifted.diagonal().add_(shift)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return factor
        shift *= 10


def dips(low: Low, most: int = LOWEST - 1) -> Dip:
    """The deepest gap at the small end, dead coordinates left aside."""
    spread = 1 / low.vectors.pow(4).sum(1)
    kept = [index for index in range(len(low.values)) if spread[index] >= FEWEST_COORDINATES]
    values = low.values[kept].clamp_min(_FLOOR)
    vectors = low.vectors[kept]
    if len(values) < 2:
        return Dip(0.0, low.vectors[:1])
    depths = (values[1:] / values[:-1]).log()[:most]
    rank = int(depths.argmax()) + 1
    return Dip(float(depths[rank - 1]), vectors[:rank])


__all__ = ["FEWEST_COORDINATES", "LOWEST", "Dip", "Low", "dips", "gram", "levelled", "lowest"]
