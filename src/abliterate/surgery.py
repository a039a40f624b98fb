"""A plan as weights: streaming surgery on the original safetensors files, which never loads the model.

Every shard is read once and written once, tensor by tensor; a planned tensor passes through in blocks of rows. Memory
stays at a few blocks whatever the size of the checkpoint, and bytes outside the plan are copied, not decoded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.checkpoint import (
    Checkpoint,
    EditedFiles,
    Rewriter,
    TensorInfo,
    TensorReader,
    open_checkpoint,
    write_edited,
)
from abliterate.errors import CheckpointError, NumericalError
from abliterate.plan import Edit, Plan

#: Formats an edit can be stored in exactly enough to be measured.
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: Bytes of a tensor in memory at once. With its float32 copies a block stays in the cache of one core: larger ones
#: are slower.
BLOCK_BYTES = 512 << 10


@dataclass(frozen=True, slots=True)
class Residual:
    """What an edit left of the direction in one tensor.

    `before` and `after` are ‖VW‖ of the stored numbers (Frobenius norm), `change` is ‖W' − W‖ / ‖W‖.
    """

    tensor: str
    writer: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    before: float
    after: float
    change: float

    @property
    def ratio(self) -> float:
        """‖VW'‖ / ‖VW‖: 0 is a complete removal; rounding to the stored dtype leaves a little."""
        return self.after / self.before if self.before else 0.0


@dataclass(frozen=True, slots=True)
class Surgery:
    """What was written, and what is left of the direction in every edited tensor."""

    files: EditedFiles
    residuals: tuple[Residual, ...]


@dataclass(slots=True)
class _Sums:
    """Squared norms gathered while a tensor passes through."""

    before: float = 0.0
    after: float = 0.0
    change: float = 0.0
    whole: float = 0.0


def planned_parameters(plan: Plan) -> list[str]:
    """Names in the model of all parameters that `plan` changes."""
    return [name for edit in plan.edits if edit.strength != 0 for name in edit.writer.parameters]


def edit_checkpoint(
    source: Checkpoint,
    target: Path,
    plan: Plan,
    names: Mapping[str, str],
    *,
    progress: Callable[[int], None] | None = None,
) -> Surgery:
    """Write `source` with `plan` applied into the empty folder `target`.

    `names` maps the plan's parameters to tensors in the checkpoint (see `anatomy.names_on_disk`).

    Raises `CheckpointError` when a tensor has an unexpected shape or format, `NumericalError` when one holds or
    would get numbers that are not finite.
    """
    rewriters: dict[str, Rewriter] = {}
    sums: list[tuple[TensorInfo, Edit, _Sums]] = []
    for edit in plan.edits:
        if edit.strength == 0:
            continue
        for parameter in edit.writer.parameters:
            info = source.tensors[names[parameter]]
            _check(info, parameter, edit)
            gathered = _Sums()
            rewriters[info.name] = _rewriter(edit, gathered)
            sums.append((info, edit, gathered))
    with _one_thread():
        files = write_edited(source, target, rewriters, progress=progress)
    return Surgery(files, tuple(_residual(*entry) for entry in sums))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: blocks this small gain nothing from more, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _residual(info: TensorInfo, edit: Edit, sums: _Sums) -> Residual:
    return Residual(
        tensor=info.name,
        writer=edit.writer.module,
        kind=str(edit.writer.kind),
        dtype=info.dtype,
        shape=info.shape,
        before=sums.before**0.5,
        after=sums.after**0.5,
        change=(sums.change / sums.whole) ** 0.5 if sums.whole else 0.0,
    )


def _check(info: TensorInfo, parameter: str, edit: Edit) -> None:
    width = edit.basis.shape[1]
    axis = 0 if len(info.shape) == 1 else edit.writer.axis
    if len(info.shape) not in (1, 2) or info.shape[axis] != width:
        raise CheckpointError(
            f"tensor '{info.name}' in {info.file}: expected axis {axis} to have the model's width {width}, found "
            f"shape {list(info.shape)} (for parameter '{parameter}')"
        )
    if info.dtype not in STORED:
        raise CheckpointError(
            f"tensor '{info.name}' in {info.file}: expected one of {', '.join(STORED)}, found {info.dtype}; "
            "give the full-precision checkpoint"
        )


def _rewriter(edit: Edit, sums: _Sums) -> Rewriter:
    def rewrite(reader: TensorReader) -> Iterator[memoryview]:
        along_rows = edit.writer.axis == 1 or len(reader.info.shape) == 1
        passes = _rows_in_stream if along_rows else _columns_in_stream
        for old, new, stored, before, after in passes(reader, edit):
            sums.before, sums.after = before, after
            _gather(sums, reader.info, old, new, stored)
            yield new.contiguous().view(torch.uint8).numpy().data

    return rewrite


#: One block: the old numbers in float32, the new ones as stored and those again in float32, and squared ‖VW‖ before
#: and after (the totals so far). The float32 tensors are overwritten by the next block.
_Block = tuple[Tensor, Tensor, Tensor, float, float]


def _rows_in_stream(reader: TensorReader, edit: Edit) -> Iterator[_Block]:
    """Rows are vectors of the stream (embeddings, Conv1D, biases): each block stands for itself."""
    before = after = 0.0
    buffers = _buffers(reader.info)
    for _, old in _blocks(reader):
        wide, edited, stored = (buffer[: len(old)] for buffer in buffers)
        wide.copy_(old)
        inside = wide @ edit.basis.T
        new = torch.addmm(wide, inside, edit.basis, alpha=-edit.strength, out=edited).to(old.dtype, copy=True)
        stored.copy_(new)
        before += float(inside.double().square().sum())
        after += float((stored @ edit.basis.T).double().square().sum())
        yield wide, new, stored, before, after


def _columns_in_stream(reader: TensorReader, edit: Edit) -> Iterator[_Block]:
    """Columns are vectors of the stream (Linear): V W needs every row, so the tensor is read twice."""
    buffers = _buffers(reader.info)
    inside = torch.zeros(len(edit.basis), reader.info.shape[1])
    for rows, old in _blocks(reader):
        inside += edit.basis[:, rows] @ buffers[0][: len(old)].copy_(old)
    before = float(inside.double().square().sum())
    left = torch.zeros_like(inside)
    for rows, old in _blocks(reader):
        wide, edited, stored = (buffer[: len(old)] for buffer in buffers)
        wide.copy_(old)
        part = edit.basis[:, rows]
        new = torch.addmm(wide, part.T, inside, alpha=-edit.strength, out=edited).to(old.dtype, copy=True)
        stored.copy_(new)
        left += part @ stored
        yield wide, new, stored, before, float(left.double().square().sum())


def _buffers(info: TensorInfo) -> Float[Tensor, "three rows columns"]:
    """Float32 memory for one block, used for all: asking the system for it anew costs more than the arithmetic."""
    _, columns, step = _layout(info)
    return torch.empty(3, step, columns)


def _layout(info: TensorInfo) -> tuple[int, int, int]:
    """Rows and columns of a tensor (a bias is one row), and how many rows make a block."""
    rows, columns = (1, info.shape[0]) if len(info.shape) == 1 else info.shape
    return rows, columns, min(rows, max(1, BLOCK_BYTES // (info.nbytes // rows)))


def _blocks(reader: TensorReader) -> Iterator[tuple[slice, Float[Tensor, "rows columns"]]]:
    """The tensor as blocks of whole rows."""
    info = reader.info
    rows, columns, step = _layout(info)
    row_bytes = info.nbytes // rows
    for start in range(0, rows, step):
        count = min(step, rows - start)
        data = reader.read(start * row_bytes, count * row_bytes)
        block = torch.frombuffer(data, dtype=STORED[info.dtype]).reshape(count, columns)
        yield slice(start, start + count), block


def _gather(sums: _Sums, info: TensorInfo, old: Tensor, new: Tensor, stored: Tensor) -> None:
    change = _squared(stored.sub_(old))
    # This sum is finite only if all numbers are, at a thirtieth of the cost of asking each; it may also just overflow.
    if not math.isfinite(change) and not bool(torch.isfinite(new).all()):
        raise NumericalError(f"tensor '{info.name}' in {info.file}: expected finite numbers, found NaN or infinity")
    sums.change += change
    sums.whole += _squared(old)


def _squared(numbers: Tensor) -> float:
    flat = numbers.flatten()
    return float(flat @ flat)


class SwappedWeights:
    """Parameters of a live model that hold stored tensors for a while; `original()` puts them back inside."""

    def __init__(self, model: Any, stored: Mapping[str, Tensor]) -> None:
        """Hold the stored tensors (by parameter name) in each parameter's own dtype and place; swap nothing yet."""
        self._parameters = [model.get_parameter(name) for name in stored]
        self._other = [
            tensor.to(parameter.device, parameter.dtype)
            for parameter, tensor in zip(self._parameters, stored.values(), strict=True)
        ]

    def swap(self) -> None:
        """Exchange what the parameters hold with what is kept here."""
        for i, parameter in enumerate(self._parameters):
            parameter.data, self._other[i] = self._other[i], parameter.data

    @contextlib.contextmanager
    def original(self) -> Iterator[None]:
        """The model as it was, inside."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


@contextlib.contextmanager
def weights_from(model: Any, folder: Path, names: Mapping[str, str]) -> Iterator[SwappedWeights]:
    """Let a live model use the tensors stored in `folder` for the parameters in `names`, for a while.

    What is measured inside is what was saved, without a second copy of the rest of the model.
    """
    tensors = _read_tensors(open_checkpoint(folder), list(names.values()))
    swapped = SwappedWeights(model, {parameter: tensors[tensor] for parameter, tensor in names.items()})
    del tensors
    with swapped.original():  # the same exchange, read the other way round
        yield swapped


def _read_tensors(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Tensor]:
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for shard in checkpoint.shards:
        with safe_open(shard.path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in names if name in shard.tensors}
    return tensors
