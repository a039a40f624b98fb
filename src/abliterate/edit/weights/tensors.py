"""Stored tensors of any rank as blocks of rows, and what a plan does to each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.edit.plan import Edit, Plan
from abliterate.errors import CheckpointError, NumericalError, UsageError
from abliterate.files.checkpoint import Checkpoint, TensorInfo, TensorReader
from abliterate.files.formats import PLAIN, Bytes, Layout, layout
from abliterate.model.anatomy import Kind, Stored

#: Bytes of the numbers of one block, in the precision of the arithmetic. The few copies that are worked on stay in the
#: caches of one core: larger blocks are slower, smaller ones spend their time between operations.
BLOCK_BYTES = 1 << 20


_CODES = {"F64": torch.int64, "F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}


def code_dtype(format: str) -> torch.dtype:
    """What holds one stored number of a format (see `Grid.codes`)."""
    return _CODES.get(format, torch.int8)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `first` to `first + count` of a tensor; `rows` is where they are among the rows of their matrix."""

    first: int
    count: int
    rows: slice


@dataclass(frozen=True, slots=True)
class Grid:
    """A stored tensor as `matrices` of `rows` × `columns`, with the vectors of the stream as rows or as columns.

    With the stream on the last axis (embeddings, Conv1D, biases, experts [E, n, d]) all rows are one matrix. Else
    (Linear [d, n], experts [E, d, n]) every entry of the axes before the stream's is one.
    """

    layout: Layout
    matrices: int
    rows: int
    columns: int
    in_rows: bool

    @staticmethod
    def of(layout: Layout, axis: int) -> Grid:
        """The tensor with the stream on `axis`."""
        shape = layout.shape
        if axis == len(shape) - 1:
            return Grid(layout, 1, math.prod(shape[:-1]), shape[-1], True)
        return Grid(layout, math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]), False)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the arithmetic: wider than what is stored, so that only the storing rounds."""
        return torch.float64 if self.layout.format in ("F64", "F32") else torch.float32

    @property
    def kept(self) -> torch.dtype:
        """Precision of what is kept of a tensor, and computed with: enough to give back what is stored."""
        return torch.float64 if self.layout.format == "F64" else torch.float32

    def blocks(self, matrix: int) -> Iterator[Block]:
        """The rows of one matrix, cut into blocks."""
        step = self.step
        for start in range(0, self.rows, step):
            count = min(step, self.rows - start)
            yield Block(matrix * self.rows + start, count, slice(start, start + count))

    @property
    def step(self) -> int:
        """Rows of a whole block."""
        return max(1, min(self.rows, BLOCK_BYTES // (self.columns * self.dtype.itemsize)))

    def buffers(self, count: int) -> tuple[Float[Tensor, "rows columns"], ...]:
        """Memory for blocks, used for all: asking the system for it anew costs more than the arithmetic."""
        return torch.empty(count, self.step, self.columns, dtype=self.dtype).unbind()

    def read(self, reader: TensorReader, block: Block) -> bytearray:
        """The stored bytes of a block."""
        width = self.layout.row_bytes * self._folded
        return reader.read(block.first * width, block.count * width)

    def numbers(self, data: Bytes, block: Block, out: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The numbers of a block, written into memory for one."""
        out = out[: block.count]
        if self.is_plain:
            return out.copy_(self.codes(data).view(PLAIN[self.layout.format]))
        self.layout.decode(data, block.first * self._folded, out=out.view(-1, self.layout.columns))
        return out

    def encode(self, numbers: Float[Tensor, "rows columns"], block: Block) -> Tensor:
        """The bytes of a block that holds `numbers`."""
        return self.layout.encode(numbers.view(-1, self.layout.columns), block.first * self._folded)

    @property
    def is_plain(self) -> bool:
        """Whether the stored bytes are themselves floats, without a scale."""
        return self.layout.format in PLAIN

    def codes(self, data: Bytes) -> Int[Tensor, "rows columns"]:
        """What is stored as whole numbers: a sign bit, and below it codes in the order of the sizes they stand for.

        For all formats but MXFP4 they share the memory of `data`.
        """
        raw = (data if isinstance(data, Tensor) else torch.frombuffer(data, dtype=torch.uint8)).view(torch.uint8)
        if self.layout.format == "MXFP4":
            pairs = torch.stack((raw.view(-1) & 15, raw.view(-1) >> 4), -1)
            raw = (pairs & 8) << 4 | pairs & 7
        return raw.view(code_dtype(self.layout.format)).view(-1, self.columns)

    def packed(self, codes: Int[Tensor, "rows columns"]) -> Tensor:
        """The bytes of `codes`."""
        raw = codes.view(torch.uint8)
        if self.layout.format != "MXFP4":
            return raw
        pairs = ((raw >> 4) & 8 | raw & 7).view(-1, 2)
        return pairs[:, 0] | pairs[:, 1] << 4

    @property
    def _folded(self) -> int:
        """Rows of the tensor in one row of the grid."""
        return self.columns // self.layout.columns


@dataclass(frozen=True, slots=True)
class TensorEdit:
    """What one edit of a plan (entry `number`) does to one stored tensor."""

    number: int
    edit: Edit
    stored: Stored
    info: TensorInfo
    grid: Grid

    @property
    def is_bias(self) -> bool:
        """Whether the tensor is added to what is written, not multiplied."""
        return self.stored.parameter == self.edit.writer.bias

    @property
    def norm_preserving(self) -> bool:
        """Whether vectors get their old length back: a bias is not rescaled, and nothing is removed at strength 0."""
        return self.edit.norm_preserving and not self.is_bias and self.edit.strength != 0

    @property
    def offset(self) -> Float[Tensor, "1 d"] | None:
        """What is added to every vector of this tensor: the constant lies in the bias where there is one."""
        writer = self.edit.writer
        offset = self.edit.stored_offset
        if offset is None or self.stored.parameter != (writer.bias or writer.weight):
            return None
        return offset.to(self.grid.kept)[None]


def planned_parameters(plan: Plan) -> dict[str, int]:
    """All parameters that `plan` changes, with the axis of the stream in memory (−1: the last)."""
    axes: dict[str, int] = {}
    for edit in plan.edits:
        if not edit.changes:
            continue
        if edit.writer.weight is not None and (edit.strength != 0 or edit.writer.bias is None):
            axes[edit.writer.weight] = edit.writer.axis
        if edit.writer.bias is not None:
            axes[edit.writer.bias] = -1
    return axes


def refusal(edit: Edit) -> str | None:
    """Why weights cannot hold an edit exactly, naming the writer; None where they can."""
    writer = edit.writer
    shape, reads = tuple(edit.basis.shape), tuple(edit.reads.shape)
    wrong = None
    if not math.isfinite(edit.strength):
        wrong = f"expected a finite strength, found {edit.strength}"
    elif len(shape) != 2 or shape != reads:
        wrong = f"expected a basis and a reader of one shape [k, d], found {list(shape)} and {list(reads)}"
    elif not writer.parameters:
        wrong = "has no weights to hold an edit"
    elif edit.offset is not None and tuple(edit.offset.shape) != shape[1:]:
        wrong = f"expected an offset of shape [{shape[1]}], found {list(edit.offset.shape)}"
    elif edit.offset is not None and writer.kind is Kind.EXPERTS:
        wrong = "experts are weighted by a router, so their biases cannot hold a constant; give one to another writer"
    elif edit.offset is not None and writer.bias is None and not (writer.kind is Kind.EMBEDDING and writer.axis == 1):
        wrong = "expected a bias to hold a constant, found none; give it to an embedding or to a writer with a bias"
    return None if wrong is None else f"writer '{writer.module}': {wrong}"


def tensor_edits(source: Checkpoint, plan: Plan, names: Mapping[str, tuple[Stored, ...]]) -> list[TensorEdit]:
    """What `plan` does to every stored tensor, in the order of the plan, checked before anything is written.

    Raises `UsageError` for an edit that weights cannot hold, `CheckpointError` for tensors of another shape or
    format than planned, or planned twice.
    """
    tasks: dict[str, TensorEdit] = {}
    for number, edit in enumerate(plan.edits):
        if not edit.changes:
            continue
        if (reason := refusal(edit)) is not None:
            raise UsageError(reason)
        if edit.writer.tied and not plan.untie:
            raise UsageError(
                f"writer '{edit.writer.module}': tied to the head, editing it would edit the head; untie it"
            )
        for stored in [place for name in _changed(edit) for place in names[name]]:
            if stored.tensor in tasks:
                raise CheckpointError(f"tensor '{stored.tensor}': expected one edit of it, found several")
            tasks[stored.tensor] = _tensor_edit(source, number, edit, stored)
    return list(tasks.values())


def _changed(edit: Edit) -> list[str]:
    return list(planned_parameters(Plan((edit,), edit.basis, edit.strength, ())))


def _tensor_edit(source: Checkpoint, number: int, edit: Edit, stored: Stored) -> TensorEdit:
    if stored.tensor not in source.tensors:
        raise CheckpointError(f"{source.folder}: expected tensor '{stored.tensor}', found none of that name")
    info = source.tensors[stored.tensor]
    how, width = layout(source, info), edit.basis.shape[1]
    if not 0 <= stored.axis < len(how.shape) or how.shape[stored.axis] != width:
        raise CheckpointError(
            f"tensor '{info.name}' in {info.file}: expected axis {stored.axis} to have the model's width {width}, "
            f"found shape {list(how.shape)} (for parameter '{stored.parameter}')"
        )
    return TensorEdit(number, edit, stored, info, Grid.of(how, stored.axis))


def damaged(info: TensorInfo) -> NumericalError:
    """The error for numbers that are not finite."""
    return NumericalError(f"tensor '{info.name}' in {info.file}: expected finite numbers, found NaN or infinity")
