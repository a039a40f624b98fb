"""The algebra of an edit, on tensors and nothing else.

A writer writes y. An edit takes a subspace out of it: with R [k, d] that reads how much of it is there, L [k, d] that
says what is taken out for it, and strength s,

==========================  ===================================
activations y [..., d]      y − s (y Rᵀ) L
Linear weight W [d, n]      W − s Lᵀ (R W)          (stream on axis 0)
Conv1D, embedding W [n, d]  W − s (W Rᵀ) L          (stream on axis 1)
experts [E, d, n], [E, n, d]  the same for every expert
bias b [d]                  b − s (b Rᵀ) L
==========================  ===================================

L = R = V with orthonormal rows removes a subspace; R ≠ L is oblique (LEACE). s = 1 removes, s = 0 is the identity,
s < 0 strengthens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.errors import NumericalError

#: A number; while an edit is optimised, a tensor with one.
Strength = float | Float[Tensor, ""]

#: Norms below this are the same activation in both classes (site 0 at a template token), not a direction.
ZERO_NORM = 1e-6

#: Vectors whose independent part is smaller than this share of them are dependent: float32 knows no better.
INDEPENDENT = 1e-6

#: Below this share of its old length a vector is not given it back: it was nearly all direction.
SHORTEST = 1e-2


def orthonormal(rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """An orthonormal basis of the span of `rows`, in float64 inside; the first row keeps its sign.

    Raises `NumericalError` when the rows are not finite or not independent.
    """
    wide = rows.cpu().double()  # not every accelerator has it
    if not bool(torch.isfinite(wide).all()) or bool((wide.norm(dim=1) < ZERO_NORM).any()):
        raise NumericalError("direction: expected finite non-zero vectors, found NaN, infinity or zero")
    q, r = torch.linalg.qr(wide.T)
    diagonal = r.diagonal()
    if len(wide) > wide.shape[1] or bool((diagonal.abs() < 1e-9 * wide.norm(dim=1)).any()):
        raise NumericalError("direction: expected independent vectors, found one in the span of the others")
    basis: Tensor = (q * diagonal.sign()).T.to(rows).contiguous()
    return basis


def project_out(r: Float[Tensor, "*site d"], mean: Float[Tensor, "*site d"]) -> Float[Tensor, "*site d"]:
    """r - (r·m̂) m̂, twice: one pass of Gram-Schmidt leaves rounding behind when r is nearly parallel to m."""
    unit = mean / mean.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)
    for _ in range(2):
        r = r - (r * unit).sum(-1, keepdim=True) * unit
    return r


def before_norm(basis: Float[Tensor, "k d"], gain: Float[Tensor, " d"], *, centred: bool) -> Float[Tensor, "k d"]:
    """The subspace to take out before y = gain ⊙ x / rms(x) so that no y has a component in `basis`.

    r̂ᵀy = (gain ⊙ r̂)ᵀ x / rms(x): it is q = gain ⊙ r̂ that x must not contain, with its mean taken off when the norm
    takes off the mean of x.
    """
    moved = basis * gain
    if centred:
        moved = moved - moved.mean(-1, keepdim=True)
    return orthonormal(moved)


def remove_from_outputs(
    y: Float[Tensor, "*batch d"],
    basis: Float[Tensor, "g k d"],
    strength: Strength,
    reader: Float[Tensor, "g k d"] | None = None,
) -> Float[Tensor, "*batch d"]:
    """y − s (y Rᵀ) L, in float32 inside, in the dtype of y outside.

    The rows of y are cut into g equal parts and each has its own subspace: one plan is g = 1.
    """
    wide = y.float().reshape(len(basis), -1, y.shape[-1])
    inside = wide @ (basis if reader is None else reader).mT
    if isinstance(strength, Tensor):  # one that is differentiated by
        inside, strength = strength * inside, 1.0
    return torch.baddbmm(wide, inside, basis, alpha=-strength).reshape(y.shape).to(y.dtype)


def remove_from_weight(
    weight: Float[Tensor, "*any"],
    basis: Float[Tensor, "k d"],
    strength: Strength,
    axis: int,
    reader: Float[Tensor, "k d"] | None = None,
) -> Float[Tensor, "*any"]:
    """The weight table of this module's docstring, for any shape with the stream on `axis`; in float32 inside."""
    wide = weight.float()
    reader = basis if reader is None else reader
    last = axis in (-1, weight.dim() - 1)
    turned = wide if last else wide.movedim(axis, -2)
    matrices = turned.reshape(-1, *((1,) if turned.dim() == 1 else ()), *turned.shape[-2:])
    left, right = (matrices @ reader.T, basis) if last else (basis.T, reader @ matrices)
    if isinstance(strength, Tensor):  # one that is differentiated by
        left, strength = strength * left, 1.0
    left, right = (part.expand(len(matrices), *part.shape[-2:]) for part in (left, right))
    new = torch.baddbmm(matrices, left, right, alpha=-strength).reshape(turned.shape)
    return (new if last else new.movedim(-2, axis)).to(weight.dtype).contiguous()


def check_finite(name: str, *values: Tensor) -> None:
    """Raise `NumericalError`, naming what is wrong, when a number is NaN or infinite."""
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise NumericalError(f"{name}: expected finite numbers, found NaN or infinity; try --dtype float32")
