"""The edit as data, and its algebra.

A plan says for every writer which subspace is taken out of what it writes, and by how much. Hooks and weights are two
realisations of the same plan and must agree. With V [k, d] orthonormal rows and strength s:

==========================  ===================================
activations x [..., d]      x − s (x Vᵀ) V
Linear weight W [d, d_in]   W − s Vᵀ (V W)          (axis 0)
Conv1D, embedding W [n, d]  W − s (W Vᵀ) V          (axis 1)
bias b [d]                  b − s (b Vᵀ) V
==========================  ===================================

s = 1 removes, s = 0 is the identity, s < 0 strengthens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.anatomy import Anatomy, Writer
from abliterate.directions import orthonormal
from abliterate.errors import UsageError


@dataclass(frozen=True, slots=True)
class Edit:
    """What is done to one writer: `basis` [k, d] is taken out of its output with `strength`."""

    writer: Writer
    basis: Float[Tensor, "k d"]
    strength: float


@dataclass(frozen=True, slots=True)
class Plan:
    """All edits, the direction they realise, and the writers left alone with the reason why."""

    edits: tuple[Edit, ...]
    direction: Float[Tensor, "k d"]
    strength: float
    left_alone: tuple[tuple[str, str], ...]


def make_plan(anatomy: Anatomy, direction: Float[Tensor, "k d"], *, strength: float = 1.0) -> Plan:
    """Take `direction` (orthonormal rows) out of every writer.

    Behind a post-norm the subspace is moved to the far side of the norm (see `before_norm`). An embedding tied to
    the head is left alone: editing it would edit the head.

    Raises `UsageError` when the direction's width is not the model's, or the strength not finite.
    """
    if direction.shape[1] != anatomy.d_model:
        raise UsageError(
            f"direction: expected vectors of the model's width {anatomy.d_model}, found {direction.shape[1]}"
        )
    if not -1e3 < strength < 1e3:
        raise UsageError(f"strength: expected a finite number around 1, found {strength}")
    basis = orthonormal(direction.float())
    edits, left_alone = [], []
    for writer in anatomy.writers:
        if writer.tied:
            left_alone.append((writer.module, "tied to the head: editing it would edit the head"))
        else:
            edits.append(Edit(writer, _basis_for(writer, basis), strength))
    return Plan(tuple(edits), basis, strength, tuple(left_alone))


def _basis_for(writer: Writer, basis: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    return basis if writer.gain is None else before_norm(basis, writer.gain, centred=writer.centred)


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
    x: Float[Tensor, "*batch d"], basis: Float[Tensor, "g k d"], strength: float
) -> Float[Tensor, "*batch d"]:
    """x − s (x Vᵀ) V, in float32 inside, in the dtype of x outside.

    The rows of x are cut into g equal parts and each has its own V: one plan is g = 1.
    """
    wide = x.float().reshape(len(basis), -1, x.shape[-1])
    left = torch.baddbmm(wide, wide @ basis.mT, basis, alpha=-strength)
    return left.reshape(x.shape).to(x.dtype)


def remove_from_weight(
    weight: Float[Tensor, "rows columns"], basis: Float[Tensor, "k d"], strength: float, axis: int
) -> Float[Tensor, "rows columns"]:
    """The weight table of this module's docstring, in float32 inside."""
    wide = weight.float()
    if axis == 1:
        return torch.addmm(wide, wide @ basis.T, basis, alpha=-strength).to(weight.dtype)
    return torch.addmm(wide, basis.T, basis @ wide, alpha=-strength).to(weight.dtype)
