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
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.formats import PLAIN, steps_apart
from abliterate.surgery.numbers import Terms, restored
from abliterate.surgery.tensors import Block, Grid

#: Down to this factor, dividing by it leaves the rounding of a number that did not grow below one step.
_SHRINKS = 0.85

#: Numbers tried out together: each operation on few numbers costs more than the numbers.
_TOGETHER = 1 << 16

_CODES = {torch.float64: np.int64, torch.float32: np.int32, torch.float16: np.int16, torch.bfloat16: np.int16}
_MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


class Keeper(Protocol):
    """Takes in what undo needs of one tensor."""

    def exceptions(self, places: Int[Tensor, " p"], values: Float[Tensor, " p"]) -> None:
        """Numbers that undo cannot compute, by their place in the whole tensor, in order."""

    def array(self, name: str, values: Tensor) -> None:
        """A whole array, once."""


class Watch:
    """Sees every block of a tensor before and after, and tells a keeper the exceptions; `end` tells the last."""

    def __init__(self, grid: Grid, keeper: Keeper) -> None:
        """Nothing is seen yet."""
        self._grid, self._keeper = grid, keeper
        if grid.is_plain:
            self._stored = PLAIN[grid.layout.format]
            self._codes: Any = np.dtype(_CODES[self._stored])
            self._magnitude = (1 << 8 * self._codes.itemsize - 1) - 1
            self._scratch = np.empty((2, grid.step, grid.columns), self._codes)
            self._mask = np.empty((grid.step, grid.columns), np.bool_)
        self._tried: list[tuple[Any, ...]] = []
        self._count = 0

    def see(self, block: Block, before: bytearray, after: Tensor, terms: Terms, numbers: tuple[Tensor, ...]) -> None:
        """One block: its bytes, what was done, and as numbers what it was, what was taken out and what it is now."""
        old, u, new = numbers
        first = block.first * self._grid.columns
        if not self._grid.is_plain:
            again = self._grid.encode(restored(new.clone(), u, terms), block)
            places = (steps_apart(before, again, self._grid.layout) > 1).view(-1).nonzero()[:, 0]
            self._keeper.exceptions(places + first, old.view(-1)[places])
            return
        was = np.frombuffer(before, self._codes)
        at = self._grown(was, after, block.count) if self._is_tame(terms) else np.arange(len(was))
        shape = tuple(old.shape)
        scale, offset = (
            None if term is None else term.expand(shape).numpy()[np.unravel_index(at, shape)]
            for term in (terms.scale, terms.offset)
        )
        found = (new.numpy().reshape(-1)[at], u.numpy().reshape(-1)[at])
        self._tried.append((at + first, was[at], *found, scale, offset))
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
        found = restored(new, u, Terms(u, u, scale, offset)).to(self._stored).view(was.dtype)
        a, b = self._ordered(found), self._ordered(was)
        wrong = (a < b - 1) | (a > b + 1)
        self._keeper.exceptions(places[wrong], was[wrong].view(self._stored))

    def _is_tame(self, terms: Terms) -> bool:
        """Whether only numbers that have grown twofold can fail: storing was the only rounding, with little stretch."""
        if terms.offset is not None:
            return False
        return terms.scale is None or (self._stored != torch.float64 and float(terms.scale.min()) > _SHRINKS)

    def _grown(self, was: Any, after: Tensor, rows: int) -> Any:
        """Where numbers are at least twice as large as they were: codes are ordered like the numbers they stand for."""
        a, b, mask = self._scratch[0, :rows], self._scratch[1, :rows], self._mask[:rows]
        now = after.view(torch.uint8).numpy().view(self._codes).reshape(a.shape)
        np.bitwise_and(was.reshape(a.shape), self._magnitude, out=a)
        np.bitwise_and(now, self._magnitude, out=b)
        np.subtract(b, a, out=b)
        np.greater_equal(b, 1 << _MANTISSA_BITS[self._stored], out=mask)
        return np.flatnonzero(mask)

    def _ordered(self, codes: Tensor) -> Tensor:
        """Whole numbers in the order of the floats, with one for both zeros."""
        return torch.where(codes < 0, -1 - self._magnitude - codes, codes)
