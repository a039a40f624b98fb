"""What the look at a lone checkpoint would have seen in this very checkpoint: edits planted in memory.

"No trace" says little where light edits leave none. So one direction r̂ is taken out of all writers at a strength s,
by G' = (1 − s r̂ r̂ᵀ) G (1 − s r̂ r̂ᵀ) on their pooled Gram matrix G, and the same test is asked again. The directions are
drawn as the writers write (r̂ ∝ L z with G = L Lᵀ and z normal): what a model writes much of is hidden longer than a
random direction. Nothing is read again; windows over parts of the depth are left out, and single layers count as they
are, so that what is said is not too much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.forensics.spectra import dips, levelled, lowest

#: Strengths that are planted, strongest first, and directions at each.
STRENGTHS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
PLANTED = 10
#: How many of them must be seen.
ENOUGH = 9


@dataclass(frozen=True, slots=True)
class Power:
    """From which `strength` on edits of one direction in all writers are seen (None: not even at 1).

    `seen` says by strength how many of `planted` were: down to the first strength at which too few are.
    """

    strength: float | None
    planted: int
    seen: dict[float, int]


def power(square: Float[Tensor, "d d"], is_seen: Callable[[float], bool]) -> Power:
    """Plant edits in the pooled `square` (mean eigenvalue 1); `is_seen` says whether a dip of a depth is a trace."""
    directions = _written(square)
    seen: dict[float, int] = {}
    least = None
    for strength in STRENGTHS if len(directions) else ():
        seen[strength] = sum(is_seen(_depth(_planted(square, r, strength))) for r in directions)
        if seen[strength] < ENOUGH:
            break
        least = strength
    return Power(least, PLANTED, seen)


def _written(square: Float[Tensor, "d d"]) -> Float[Tensor, "k d"]:
    """Unit directions as the writers write them; none where they write nothing."""
    size = len(square)
    noise = torch.randn(PLANTED, size, generator=torch.Generator().manual_seed(0)).to(square)
    factor, failed = torch.linalg.cholesky_ex(square + 1e-6 * torch.eye(size).to(square))
    if int(failed) or not float(square.trace()) > 0:
        return noise[:0]
    return torch.nn.functional.normalize(noise @ factor.T, dim=1)


def _planted(square: Float[Tensor, "d d"], direction: Float[Tensor, " d"], strength: float) -> Float[Tensor, "d d"]:
    half = square - strength * torch.outer(direction, direction @ square)
    return half - strength * torch.outer(half @ direction, direction)


def _depth(square: Float[Tensor, "d d"]) -> float:
    return max(dips(lowest(square)).depth, dips(lowest(levelled(square)[0])).depth)


__all__ = ["ENOUGH", "PLANTED", "STRENGTHS", "Power", "power"]
