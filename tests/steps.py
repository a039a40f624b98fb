"""How far two stored numbers lie apart, counted in numbers that the format can hold."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from abliterate.files.formats import Bytes, Layout, _raw

_SIGNED = {"F64": torch.int64, "F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}


def steps_apart(a: Bytes, b: Bytes, layout: Layout) -> Int[Tensor, "rows columns"]:
    """How many representable numbers two stored numbers lie apart (int64): 0 is equal, 1 next to each other.

    ``a`` and ``b`` hold the same whole rows. +0 and −0 are equal; infinity and NaN count as what follows the largest
    number. Distances above 2^63 − 1 (in F64) are given as that.
    """
    first, second = _ordinals(a, layout), _ordinals(b, layout)
    apart = torch.where((first < 0) == (second < 0), (first - second).abs(), first.abs() + second.abs())
    return apart.masked_fill_(apart < 0, torch.iinfo(torch.int64).max).view(-1, layout.columns)


def _ordinals(data: Bytes, layout: Layout) -> Int[Tensor, " numbers"]:
    """Whole numbers in the order of the numbers that the codes stand for."""
    raw = _raw(data)
    if layout.format == "MXFP4":
        codes = torch.stack((raw & 15, raw >> 4), -1).flatten().long()
        return torch.where(codes > 7, 8 - codes, codes)
    signed = raw.view(_SIGNED.get(layout.format, torch.int8))
    size = (signed & torch.iinfo(signed.dtype).max).long()
    return torch.where(signed < 0, -size, size)
