"""One stored tensor passing through an edit, block by block, and what is measured and kept of it on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.edit.weights.capture import Keeper, Watch
from abliterate.edit.weights.numbers import Terms, edited, length_back, taken
from abliterate.edit.weights.tensors import Block, Grid, TensorEdit, damaged
from abliterate.files.checkpoint import TensorReader
from abliterate.files.formats import Diffusion, diffuse_rows
from abliterate.record import ResidualPart


@dataclass(frozen=True, slots=True)
class Known:
    """What the edit of whole vectors depends on, in the precision that is kept: A and a factor for each."""

    removed: Float[Tensor, "k v"]
    scale: Float[Tensor, " v"] | None


@dataclass(slots=True)
class _Sums:
    """Squared norms gathered while a tensor passes through."""

    before: float = 0.0
    after: float = 0.0
    change: float = 0.0
    old: float = 0.0
    rounding: float = 0.0


class Passage:
    """A tensor on its way through an edit: `edit` gives the new bytes, after that `residual` says what is left."""

    def __init__(self, task: TensorEdit, keeper: Keeper | None = None) -> None:
        """Nothing is read yet. Without a keeper nothing is kept for undo."""
        self._task, self._grid, self._keeper = task, task.grid, keeper
        wide = task.grid.dtype
        self._reads, self._basis = task.edit.reads.to(wide), task.edit.basis.to(wide)
        self._offset = None if task.offset is None else task.offset.to(wide)
        self._buffers = task.grid.buffers(4)
        self._watch = None if keeper is None else Watch(task.grid, keeper)
        self._known: list[Known] = []
        self._sums = _Sums()

    def edit(self, reader: TensorReader) -> Iterator[memoryview]:
        """The bytes of the edited tensor.

        Raises `NumericalError` when it holds or would get numbers that are not finite.
        """
        yield from self._edit_rows(reader) if self._grid.in_rows else self._edit_columns(reader)
        if self._keeper and self._watch:
            self._watch.end()
            self._keeper.array("sample", self._watch.sample())
            self._keeper.array("removed", self._joined([known.removed for known in self._known]))
            if scales := [known.scale for known in self._known if known.scale is not None]:
                self._keeper.array("scales", self._joined(scales))

    def removed(self, reader: TensorReader) -> Tensor:
        """A, without an edit: [.., n, k] where rows are vectors of the stream, else [k, n] or [E, k, n]."""
        shape, axis = self._grid.layout.shape, self._task.stored.axis
        if self._grid.in_rows:
            known = [self._know(self._look(self._read(reader, block)[1], block)) for block in self._grid.blocks(0)]
            return torch.cat([part.removed for part in known], -1).T.reshape(*shape[:-1], -1)
        each = [self._know(self._look_through(reader, matrix)).removed for matrix in range(self._grid.matrices)]
        return torch.stack(each).view(*shape[:axis], -1, *shape[axis + 1 :])

    @property
    def residual(self) -> ResidualPart:
        """What was measured on the way."""
        task, sums = self._task, self._sums
        before, after = sums.before**0.5, sums.after**0.5
        return ResidualPart(
            tensor=task.info.name,
            writer=task.edit.writer.module,
            kind=str(task.edit.writer.kind),
            dtype=task.info.dtype,
            format=task.grid.layout.format,
            shape=list(task.grid.layout.shape),
            before=before,
            after=after,
            ratio=after / before if before else 0.0,
            change=(sums.change / sums.old) ** 0.5 if sums.old else 0.0,
            rounding=(sums.rounding / sums.old) ** 0.5 if sums.old else 0.0,
        )

    def _edit_rows(self, reader: TensorReader) -> Iterator[memoryview]:
        """Rows are vectors of the stream: each stands for itself."""
        for block in self._grid.blocks(0):
            data, old = self._read(reader, block)
            self._known.append(self._know(self._look(old, block)))
            yield self._store(block, data, self._known[-1], None)
            self._sums.after += _squared(self._reads @ self._buffers[-1][: block.count].T)

    def _edit_columns(self, reader: TensorReader) -> Iterator[memoryview]:
        """Columns are vectors of the stream: A needs every row of a matrix, so each matrix is read twice."""
        for matrix in range(self._grid.matrices):
            self._known.append(self._know(self._look_through(reader, matrix)))
            diffusion = self._diffusion(matrix)
            left = torch.zeros(len(self._reads), self._grid.columns, dtype=self._grid.dtype)
            for block in self._grid.blocks(matrix):
                data, _ = self._read(reader, block)
                yield self._store(block, data, self._known[-1], diffusion)
                left += self._reads[:, block.rows] @ self._buffers[-1][: block.count]
            self._sums.after += _squared(left)

    def _diffusion(self, matrix: int) -> Diffusion | None:
        """On coarse grids rounding each number for itself would undo most of the edit."""
        grid = self._grid
        if grid.is_plain or grid.in_rows or grid.columns != grid.layout.columns:
            return None
        return Diffusion(grid.layout, self._reads, matrix * grid.rows)

    def _encode(self, exact: Tensor, block: Block, new: Tensor, diffusion: Diffusion | None) -> Tensor:
        """The bytes that hold `exact`, or nearly; `new` gets the numbers that they are."""
        if diffusion is not None:
            return diffusion.encode(exact, block.first, out=new)
        if self._grid.in_rows and not self._grid.is_plain:
            stored = diffuse_rows(self._grid.layout, exact, self._reads, block.first)
        else:
            stored = self._grid.encode(exact, block)
        self._grid.numbers(stored, block, new)
        return stored

    def _read(self, reader: TensorReader, block: Block) -> tuple[bytearray, Tensor]:
        data = self._grid.read(reader, block)
        return data, self._grid.numbers(data, block, self._buffers[0])

    def _look_through(self, reader: TensorReader, matrix: int) -> Tensor:
        return sum(
            (self._look(self._read(reader, block)[1], block) for block in self._grid.blocks(matrix)),
            torch.zeros((), dtype=self._grid.dtype),
        )

    def _look(self, numbers: Tensor, block: Block) -> Float[Tensor, "r v"]:
        """R W of the part of the vectors that is in the block; for lengths also L W and the squared lengths."""
        part = slice(None) if self._grid.in_rows else block.rows
        vectors = numbers.T if self._grid.in_rows else numbers
        removed = self._reads[:, part] @ vectors
        if not self._task.norm_preserving:
            return removed
        along = removed if self._task.edit.reader is None else self._basis[:, part] @ vectors
        return torch.cat((removed, along, vectors.square().sum(0, keepdim=True)))

    def _know(self, seen: Float[Tensor, "r v"]) -> Known:
        """A and the factors of whole vectors, rounded as they are kept."""
        kept, k = self._grid.kept, len(self._basis)
        removed = seen[:k].to(kept)
        self._sums.before += _squared(removed)
        if not self._task.norm_preserving:
            return Known(removed, None)
        u, along, old = self._task.edit.strength * removed.to(seen.dtype), seen[k : 2 * k], seen[-1]
        new = old - 2 * (u * along).sum(0) + (self._basis @ self._basis.T @ u * u).sum(0)
        return Known(removed, length_back(old, new).to(kept))

    def _store(self, block: Block, data: bytearray, known: Known, diffusion: Diffusion | None) -> memoryview:
        """The new bytes of a block whose numbers stand in the first buffer; leaves those stored in the last."""
        old, u, exact, new = (buffer[: block.count] for buffer in self._buffers)
        terms = terms_for(self._grid, block, self._basis, known, self._task.edit.strength, self._offset)
        edited(old, taken(terms, u, new), terms, exact)
        stored = self._encode(exact, block, new, diffusion)
        if self._watch:
            self._watch.see(block, data, stored, terms, (u, new))
        self._gather(old, exact, new)
        found: memoryview = stored.view(torch.uint8).numpy().data
        return found

    def _gather(self, old: Tensor, exact: Tensor, new: Tensor) -> None:
        """Add a block to the sums; overwrites `old` and `exact`."""
        sums = self._sums
        sums.old += _squared(old)
        rounding, change = _squared(exact.sub_(new)), _squared(old.sub_(new))
        # These are finite only if all numbers are, at a thirtieth of the cost of asking each; they may just overflow.
        if not math.isfinite(rounding + change) and not bool(torch.isfinite(old).all() and torch.isfinite(exact).all()):
            raise damaged(self._task.info)
        sums.rounding += rounding
        sums.change += change

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """One array [matrices, .., vectors] of what is known of all vectors."""
        return torch.cat(parts, -1)[None] if self._grid.in_rows else torch.stack(parts)


def terms_for(
    grid: Grid, block: Block, basis: Tensor, known: Known, strength: float, offset: Float[Tensor, "1 d"] | None
) -> Terms:
    """What the edit does to one block, where `known` is of the vectors in it. Undo asks for the same."""
    removed = strength * known.removed.to(grid.dtype)
    scale = None if known.scale is None else known.scale.to(grid.dtype)
    if grid.in_rows:
        return Terms(removed.T, basis, None if scale is None else scale[:, None], offset)
    return Terms(basis[:, block.rows].T, removed, None if scale is None else scale[None], offset)


def _squared(numbers: Tensor) -> float:
    flat = numbers.flatten()
    total = float(flat @ flat)
    return total if math.isfinite(total) else float(flat.double().square().sum())
