"""The arithmetic of one block of a tensor, forwards (an edit) and backwards (undo).

An edit takes u = Σ left[:, i] right[i, :] out of a block of numbers, whichever way the tensor lies:

====================================  ===================  =================  ==============
vectors of the stream are             left [m, k]          right [k, n]       scale
====================================  ===================  =================  ==============
columns (Linear W [d, n], A = R W)    Lᵀ, of these rows    s A                [1, n]
rows (embedding W [n, d], A = W Rᵀ)   s A, of these rows   L                  [m, 1]
====================================  ===================  =================  ==============

    edited = (W − u) · scale + offset            restored = (W' − offset) / scale + u

Every step is one operation per element, in a fixed order: the same u comes out on every machine, whatever the cut into
blocks, so undo subtracts what the edit added to the last bit. (A matrix product may not even repeat itself.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.algebra import SHORTEST


@dataclass(frozen=True, slots=True)
class Terms:
    """What is done to one block of numbers (see the table of this module)."""

    left: Float[Tensor, "m k"]
    right: Float[Tensor, "k n"]
    scale: Float[Tensor, "m 1"] | Float[Tensor, "1 n"] | None = None
    offset: Float[Tensor, "1 n"] | None = None


def taken(terms: Terms, out: Float[Tensor, "m n"], spare: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """u, written into `out`; `spare` is memory to work in."""
    torch.mul(terms.left[:, :1], terms.right[:1], out=out)
    for i in range(1, len(terms.right)):
        out.add_(torch.mul(terms.left[:, i : i + 1], terms.right[i : i + 1], out=spare))
    return out


def edited(
    numbers: Float[Tensor, "m n"], u: Float[Tensor, "m n"], terms: Terms, out: Float[Tensor, "m n"]
) -> Float[Tensor, "m n"]:
    """The new numbers, before they are rounded to what can be stored."""
    torch.sub(numbers, u, out=out)
    if terms.scale is not None:
        out.mul_(terms.scale)
    return out if terms.offset is None else out.add_(terms.offset)


def restored(stored: Float[Tensor, "*at"], u: Float[Tensor, "*at"], terms: Terms) -> Float[Tensor, "*at"]:
    """The old numbers from the new ones, before they are rounded; overwrites `stored`."""
    if terms.offset is not None:
        stored.sub_(terms.offset)
    if terms.scale is not None:
        stored.div_(terms.scale)
    return stored.add_(u)


def length_back(old: Float[Tensor, " n"], new: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The factor that gives vectors of squared length `new` their old one, 1 where hardly anything is left."""
    return torch.where(new > SHORTEST**2 * old, (old / new.clamp_min(torch.finfo(new.dtype).tiny)).sqrt(), 1.0)
