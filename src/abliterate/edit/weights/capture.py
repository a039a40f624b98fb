"""Which numbers undo cannot compute, found while a tensor is edited.

Undo adds to the stored number what was taken out and rounds. It misses the old number by the rounding of the new one,
at most half its last place. That is at most the last place of the old number, one step, unless the new number is at
least twice as large: where little was left of a large change, or a small number got one. Only those few are tried out,
and of those that fail the old number is kept. On coarse grids, and where vectors were stretched much, all are tried.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from abliterate.edit.weights.numbers import Terms, restored
from abliterate.edit.weights.tensors import Block, Grid, code_dtype
from abliterate.files.formats import PLAIN

#: Down to this factor, dividing by it leaves the rounding of a number that did not grow below one step.
_SHRINKS = 0.85

#: Numbers tried out together: each operation on few numbers costs more than the numbers.
_TOGETHER = 1 << 16

#: Numbers of every tensor that are kept as they were, so that what undo gives can be compared with them.
_SAMPLE = 1 << 10

_MANTISSA_BITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}


def sample_places(total: int) -> Any:
    """Places of the numbers that are kept of a tensor of `total`: spread at random, the same every time, in order."""
    return np.unique(np.random.default_rng(total).integers(total, size=_SAMPLE)) if total else np.arange(0)


def ordered(codes: Int[Tensor, "*at"]) -> Int[Tensor, "*at"]:
    """Whole numbers in the order of the stored ones, with one for both zeros."""
    magnitude = int(torch.iinfo(codes.dtype).max)
    return torch.where(codes < 0, -1 - magnitude - codes, codes)


class Keeper(Protocol):
    """Takes in what undo needs of one tensor."""

    def exceptions(self, places: Int[Tensor, " p"], codes: Int[Tensor, " p"]) -> None:
        """Numbers that undo cannot compute, as they were stored, by their place in the whole tensor, in order."""

    def array(self, name: str, values: Tensor) -> None:
        """A whole array, once."""


class Watch:
    """Sees every block of a tensor before and after, and tells a keeper the exceptions; `end` tells the last."""

    def __init__(self, grid: Grid, keeper: Keeper) -> None:
        """Nothing is seen yet."""
        self._grid, self._keeper = grid, keeper
        self._magnitude = int(torch.iinfo(code_dtype(grid.layout.format)).max)
        self._scratch: Any = None
        self._tried: list[tuple[Any, ...]] = []
        self._count = 0
        self._places = sample_places(int(np.prod(grid.layout.shape, dtype=np.int64)))
        self._sample: list[Any] = []

    def sample(self) -> Tensor:
        """The numbers at `sample_places` as they were stored, one after the other, in bytes."""
        kept = np.concatenate(self._sample) if self._sample else np.zeros(0, np.uint8)
        return torch.from_numpy(kept.view(np.uint8))

    def see(self, block: Block, before: bytearray, after: Tensor, terms: Terms, numbers: tuple[Tensor, Tensor]) -> None:
        """One block: its bytes, what was done, and as numbers what was taken out and what it is now."""
        u, new = numbers
        first, was = block.first * self._grid.columns, self._grid.codes(before).numpy()
        low, high = np.searchsorted(self._places, (first, first + was.size))
        self._sample.append(was.reshape(-1)[self._places[low:high] - first])
        if not self._grid.is_plain:
            found = self._grid.codes(self._grid.encode(restored(new.clone(), u, terms), block)).numpy()
            at = np.flatnonzero(found != was)
            self._tell(*(torch.from_numpy(part) for part in (at + first, was.reshape(-1)[at], found.reshape(-1)[at])))
            return
        at = self._grown(was, self._grid.codes(after).numpy()) if self._is_tame(terms) else np.arange(was.size)
        scale, offset = (
            None if term is None else term.expand(was.shape).numpy()[np.unravel_index(at, was.shape)]
            for term in (terms.scale, terms.offset)
        )
        found_u, found_new = (part.numpy().reshape(-1)[at] for part in (u, new))
        self._tried.append((at + first, was.reshape(-1)[at], found_new, found_u, scale, offset))
        self._count += len(at)
        if self._count >= _TOGETHER:
            self.end()

    def end(self) -> None:
        """Try out what has been put aside."""
        if not self._tried:
            return
        columns = zip(*self._tried, strict=True)
        self._tried, self._count = [], 0
        parts: list[Any] = [None if c[0] is None else torch.from_numpy(np.concatenate(c)) for c in columns]
        places, was, new, u, scale, offset = parts
        found = restored(new, u, Terms(u, u, scale, offset)).to(PLAIN[self._grid.layout.format])
        self._tell(places, was, found.view(was.dtype))

    def _tell(self, places: Tensor, was: Tensor, found: Tensor) -> None:
        """Tell those of which what undo finds is more than one step from what was."""
        a, b = ordered(found), ordered(was)
        wrong = (a < b - 1) | (a > b + 1)
        self._keeper.exceptions(places[wrong], was[wrong])

    def _is_tame(self, terms: Terms) -> bool:
        """Whether only numbers that have grown twofold can fail: storing was the only rounding, with little stretch."""
        if terms.offset is not None:
            return False
        return terms.scale is None or (self._grid.layout.format != "F64" and float(terms.scale.min()) > _SHRINKS)

    def _grown(self, was: Any, now: Any) -> Any:
        """Where numbers are at least twice as large as they were: codes are ordered like the numbers they stand for."""
        if self._scratch is None:
            shape = (self._grid.step, self._grid.columns)
            self._scratch = np.empty(shape, was.dtype), np.empty(shape, was.dtype), np.empty(shape, np.bool_)
        a, b, mask = (part[: len(was)] for part in self._scratch)
        np.bitwise_and(was, self._magnitude, out=a)
        np.bitwise_and(now, self._magnitude, out=b)
        np.subtract(b, a, out=b)
        np.greater_equal(b, 1 << _MANTISSA_BITS[self._grid.layout.format], out=mask)
        return np.flatnonzero(mask)
