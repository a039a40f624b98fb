"""How the bytes of a stored tensor are numbers: decode, edit, encode, and the same bytes where nothing changed.

Scales on disk are never touched. A number that is not edited therefore gets its old code back, and one that is edited
is rounded to the nearest number which the scale in force can hold (ties to even); beyond the largest it is clamped.

===================  ==============================  =========================================================
format               stored as                       numbers
===================  ==============================  =========================================================
F64 F32 F16 BF16     themselves                      themselves
FP8-tensor           F8_E4M3 and one scale           code · scale
FP8-channel          F8_E4M3, a scale per row        code · scale[row]
FP8-block            F8_E4M3, a scale per block      code · scale[row // height, column // width]
MXFP4                U8 `…_blocks`, U8 `…_scales`    E2M1 code · 2^(scale − 127), scales for groups of 32 columns
===================  ==============================  =========================================================

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3: no infinities, largest 448); OCP Microscaling Formats 1.0
(E2M1: 0, ½, 1, 1½, 2, 3, 4, 6; E8M0). In an MXFP4 byte the lower four bits are the earlier column.

On grids this coarse an edit along one direction moves most numbers by less than half a step, so rounding each for
itself would undo much of the edit or, in MXFP4, nearly all of it. `Diffusion` rounds so that the edit is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.errors import CheckpointError, NumericalError
from abliterate.files.checkpoint import Checkpoint, TensorInfo, open_tensor
from abliterate.files.configuration import read_config

PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Formats whose bytes are the numbers themselves."""

Bytes: TypeAlias = bytearray | Tensor
"""Stored bytes: a buffer as read, or a contiguous tensor as `Layout.encode` gives it."""

HEIGHT = 64
"""Rows that `Diffusion` corrects together: fewer add more error, many more gain little and take more memory."""

_SCALE_DTYPES = {**PLAIN, "F8_E8M0": torch.uint8, "U8": torch.uint8}
_COMPANIONS = ("{name}_scale_inv", "{name}_scale", "{module}.scale", "{module}.qscale_weight")
_LARGEST = {"FP8": 448.0, "MXFP4": 6.0}

_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_E8M0 = torch.tensor([2.0**power for power in range(-127, 128)] + [math.nan])
_E2M1 = torch.tensor([sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])
#: Both numbers of every byte, as one item of eight bytes: looked up together they cost half.
_E2M1_PAIRS = torch.stack((_E2M1.repeat(16), _E2M1.repeat_interleave(16)), -1).contiguous().view(torch.float64)[:, 0]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the bytes of one stored tensor are numbers.

    `shape` is that of the numbers, `row_bytes` the bytes of one row (the last axis of `shape`). Rows are counted over
    all leading axes together; any run of at least `step` rows can be decoded and encoded by itself. `scales` is the
    tensor with the scales, each of them good for `block` (rows, columns).
    """

    shape: tuple[int, ...]
    row_bytes: int
    format: str
    step: int = 1
    scales: TensorInfo | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def rows(self) -> int:
        """Rows of the tensor, over all leading axes."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Numbers in one row."""
        return self.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The type that numbers are computed in: float64 for F64, else float32."""
        return torch.float64 if self.format == "F64" else torch.float32

    def decode(
        self, data: Bytes, first_row: int, *, out: Float[Tensor, "rows columns"] | None = None
    ) -> Float[Tensor, "rows columns"]:
        """The numbers of whole rows from `first_row` on, written into `out` (contiguous, `dtype`) if it is given.

        Without `out` the result of F32 and F64 shares the memory of `data`.
        """
        raw = _raw(data)
        if self.format in PLAIN:
            numbers = raw.view(PLAIN[self.format]).view(-1, self.columns)
            return numbers.to(self.dtype) if out is None else out.copy_(numbers)
        if out is None:
            out = torch.empty(len(raw) // self.row_bytes, self.columns)
        if self.format == "MXFP4":
            torch.index_select(_E2M1_PAIRS, 0, raw.int(), out=out.view(-1).view(torch.float64))
        else:
            torch.index_select(_E4M3, 0, raw.int(), out=out.view(-1))
        return out.mul_(self._spread(self._scale_grid(first_row, len(out))))

    def encode(self, numbers: Float[Tensor, "rows columns"], first_row: int) -> Tensor:
        """The bytes of whole rows from `first_row` on, as a new contiguous tensor whose memory they are.

        What decode gave comes back as the same bytes (where a scale is 0: as zero codes). Floating-point formats
        overflow to infinity, the others are clamped; FP8 keeps NaN.

        Raises `NumericalError` for NaN in MXFP4, which has no code for it.
        """
        if self.format in PLAIN:
            return numbers.to(PLAIN[self.format], copy=True, memory_format=torch.contiguous_format)
        grid = self._scale_grid(first_row, len(numbers))
        codes = numbers / self._spread(grid.masked_fill_(grid == 0, math.inf))
        codes.clamp_(-self._largest, self._largest)
        if self.format != "MXFP4":
            return codes.to(torch.float8_e4m3fn).view(torch.uint8)
        if not math.isfinite(float(codes.sum())):
            raise NumericalError(f"rows from {first_row}: expected finite numbers, found NaN; MXFP4 cannot hold it")
        return _pack_e2m1(codes)

    def nearest(self, first_row: int, rows: int) -> Callable[[Tensor, slice], Tensor]:
        """What rounds some columns of these rows to numbers that can be stored."""
        if self.format in PLAIN:
            return lambda numbers, columns: numbers.to(PLAIN[self.format]).to(self.dtype)
        scale = self._spread(self._scale_grid(first_row, rows)).expand(-1, self.columns)
        divisor = scale.masked_fill(scale == 0, math.inf)

        def nearest(numbers: Tensor, columns: slice) -> Tensor:
            codes = (numbers / divisor[:, columns]).clamp_(-self._largest, self._largest)
            rounded = _round_e2m1(codes) if self.format == "MXFP4" else codes.to(torch.float8_e4m3fn).float()
            return rounded.mul_(scale[:, columns])

        return nearest

    @property
    def _largest(self) -> float:
        return _LARGEST[self.format.partition("-")[0]]

    def _scale_grid(self, first_row: int, rows: int) -> Float[Tensor, "rows blocks"]:
        """The scales along each row, read for these rows only: those of a whole model may not fit in memory."""
        assert self.scales is not None
        blocks = -(-self.columns // self.block[1])
        index = self._scale_rows(torch.arange(first_row, first_row + rows))
        first, last = int(index[0]), int(index[-1])
        grid = _read_scales(self.scales, first * blocks, (last + 1 - first) * blocks).view(-1, blocks)
        return grid.index_select(0, index - first)

    def _scale_rows(self, row: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """The row of the grid of scales for each row of numbers; blocks start anew with each leading index."""
        if self.format == "FP8-tensor":
            return torch.zeros_like(row)
        matrix, height = self.shape[-2], self.block[0]
        return row // matrix * -(-matrix // height) + row % matrix // height

    def _spread(self, grid: Float[Tensor, "rows blocks"]) -> Tensor:
        """The grid with an entry for every column, or as it is where one entry is good for the whole row."""
        return grid if grid.shape[1] == 1 else grid.repeat_interleave(self.block[1], 1)[:, : self.columns]


def _raw(data: Bytes) -> Tensor:
    return data.view(torch.uint8).view(-1) if isinstance(data, Tensor) else torch.frombuffer(data, dtype=torch.uint8)


def _read_scales(info: TensorInfo, start: int, count: int) -> Float[Tensor, " count"]:
    dtype = _SCALE_DTYPES[info.dtype]
    with open_tensor(info) as reader:
        stored = torch.frombuffer(reader.read(start * dtype.itemsize, count * dtype.itemsize), dtype=dtype)
    return _E8M0.index_select(0, stored.int()) if dtype is torch.uint8 else stored.float()


def _pack_e2m1(numbers: Float[Tensor, "rows columns"]) -> Tensor:
    """E2M1 codes of numbers from −6 to 6, rounded to the nearest (ties to even), two to a byte."""
    rounded = _round_e2m1(numbers)
    # 2^-126 moves ½ below the smallest normal float32: now all eight codes stand in the upper bits, ½ included.
    bits = (rounded.mul_(2.0**-126).view(torch.int32) >> 22).to(torch.int16)
    pairs = (bits & 7 | bits >> 6 & 8).to(torch.uint8).view(torch.int16)  # the earlier column in the lower byte
    return (pairs | pairs >> 4).to(torch.uint8)


def _round_e2m1(numbers: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Numbers from −6 to 6 rounded to E2M1 in place, ties to even."""
    # Spacing is half the power of two below a number, at least ½: with that taken out, rounding is to whole numbers.
    spacing = (numbers.view(torch.int32) & 0x7F800000).view(torch.float32).mul_(0.5).clamp_(min=0.5)
    return numbers.div_(spacing).round_().mul_(spacing)


class Diffusion:
    """Rounding that keeps an edit: what rounding leaves along R is made up for in the rows that follow.

    For a matrix W [d, n] whose columns are vectors of the stream, given in order from its first row to its last.
    With c = R (Q − W) [k, n] for all rows stored so far, Q being what is stored, the next block of rows B is encoded as

        W_B − R_Bᵀ (R_B R_Bᵀ + λ)⁻¹ c

    the smallest change that takes c away. It adds to every number the same multiple of its entry in R, so those
    numbers move to the next step that are closest to it for what they contribute: few do, and the error grows little.
    Blocks are halved towards the end, whose rounding nothing follows to make up for. λ bounds the change where R_B
    is small. Blocks are the same however the caller cuts the rows, and so is every byte.
    """

    def __init__(self, layout: Layout, reader: Float[Tensor, "k d"], first_row: int = 0) -> None:
        """Begin a matrix that starts at `first_row` of the tensor and has as many rows as `reader` has columns."""
        self._layout, self._first_row = layout, first_row
        self._reader = reader.to(layout.dtype)
        self._blocks = _blocks(reader.shape[1])
        self._start = self._end = self._next = 0
        self._block = torch.empty(min(HEIGHT, reader.shape[1]), layout.columns, dtype=layout.dtype)
        #: R (Q − W) [k, n] for the blocks that are complete: in the end, what rounding left along R.
        self.left = torch.zeros(len(reader), layout.columns, dtype=layout.dtype)

    def encode(
        self, numbers: Float[Tensor, "rows n"], first_row: int, *, out: Float[Tensor, "rows n"] | None = None
    ) -> Tensor:
        """The bytes of the next rows, as `Layout.encode` gives them; `out` gets the numbers that are stored."""
        if first_row != self._first_row + self._next:
            raise ValueError(f"rows come in order: expected row {self._first_row + self._next}, got {first_row}")
        stored, done = [], 0
        while done < len(numbers):
            if self._next == self._end:
                self._begin_block()
            count = min(self._end - self._next, len(numbers) - done)
            part = slice(done, done + count)
            stored.append(self._encode_part(numbers[part], None if out is None else out[part]))
            done += count
        return stored[0] if len(stored) == 1 else torch.cat(stored)

    def _begin_block(self) -> None:
        """Fill the block with the change that is to take away what is left so far."""
        self._start, self._end = next(self._blocks)
        gain = _gain(self._reader, self._start, self._end)
        torch.mm(gain.T, self.left, out=self._block[: len(gain.T)]).add_(0.0)  # −0 − 0 is −0, but −0 − (−0) is +0

    def _encode_part(self, numbers: Tensor, out: Tensor | None) -> Tensor:
        """Encode rows of one block, and put their error where the change was."""
        row = self._first_row + self._next
        change = self._block[self._next - self._start :][: len(numbers)]
        stored = self._layout.encode(numbers - change, row)
        torch.sub(self._layout.decode(stored, row, out=out), numbers, out=change)
        self._next += len(numbers)
        if self._next == self._end:  # in one product, whose rounding does not depend on how the rows were cut
            self.left.addmm_(self._reader[:, self._start : self._end], self._block[: self._end - self._start])
        return stored


def diffuse_rows(
    layout: Layout, numbers: Float[Tensor, "rows d"], reader: Float[Tensor, "k d"], first_row: int
) -> Tensor:
    """The bytes of rows that are vectors of the stream, with what rounding leaves made up for within each row.

    The same rule as `Diffusion`, over blocks of columns; every row stands for itself.
    """
    reader, nearest = reader.to(layout.dtype), layout.nearest(first_row, len(numbers))
    stored = torch.empty_like(numbers)
    left = numbers.new_zeros(len(numbers), len(reader))
    for start, end in _blocks(reader.shape[1]):
        part = slice(start, end)
        # Sums in place of matrix products: those round differently when there are more or fewer rows.
        change = (left.unsqueeze(2) * _gain(reader, start, end)).sum(1).add_(0.0)
        stored[:, part] = nearest(numbers[:, part] - change, part)
        left += ((stored[:, part] - numbers[:, part]).unsqueeze(1) * reader[:, part]).sum(2)
    return layout.encode(stored, first_row)


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    """Start and end of the blocks of an axis: equal ones, and halves of what is left at the end."""
    start = 0
    while start < size:
        rest = size - start
        end = start + (HEIGHT if rest >= 2 * HEIGHT else (rest + 1) // 2)
        yield start, end
        start = end


def _gain(reader: Float[Tensor, "k d"], start: int, end: int) -> Float[Tensor, "k block"]:
    """(R_B R_Bᵀ + λ)⁻¹ R_B, with λ a tenth of what R_B R_Bᵀ would be on average."""
    part = reader[:, start:end]
    damping = 0.1 * reader.square().mean().clamp_(min=1e-30) * (end - start)
    gain: Tensor = torch.linalg.solve(part @ part.T + damping * torch.eye(len(part), dtype=part.dtype), part)
    return gain


def layout(checkpoint: Checkpoint, info: TensorInfo) -> Layout:
    """How the bytes of `info`, a tensor of `checkpoint`, are numbers.

    Scales are found by name beside it. The size of their blocks is `weight_block_size` of config.json where that
    fits, else 128 where that fits, else what divides the tensor evenly.

    Raises `CheckpointError` for formats that cannot be edited, and for scales that are missing or do not fit.
    """
    if not info.nbytes or not info.shape:
        raise _error(info, "rows of numbers", f"shape {list(info.shape)}")
    if info.dtype in PLAIN:
        return Layout(info.shape, info.nbytes // math.prod(info.shape[:-1]), info.dtype)
    if info.dtype == "F8_E4M3":
        return _fp8(checkpoint, info)
    if info.dtype == "U8" and info.name.endswith("_blocks"):
        return _mxfp4(checkpoint, info)
    raise _error(info, f"{', '.join(PLAIN)}, F8_E4M3 or MXFP4", info.dtype)


def _fp8(checkpoint: Checkpoint, info: TensorInfo) -> Layout:
    scales = _companion(checkpoint, info)
    if math.prod(scales.shape) == 1:
        return Layout(info.shape, info.shape[-1], "FP8-tensor", scales=scales, block=(1, info.shape[-1]))
    grid = scales.shape
    if grid == info.shape[: len(grid)]:
        grid += (1,) * (len(info.shape) - len(grid))
    fits = len(grid) == len(info.shape) > 1 and grid[:-2] == info.shape[:-2]
    height, width = map(_block_size, info.shape[-2:], grid[-2:], _configured(checkpoint)) if fits else (0, 0)
    if not height or not width:
        raise _error(info, f"a scale per tensor, row or block for shape {list(info.shape)}", f"{list(scales.shape)}")
    whole = (height == info.shape[-2], width == info.shape[-1])
    kind = "FP8-channel" if whole in ((True, False), (False, True)) and 1 in (height, width) else "FP8-block"
    return Layout(info.shape, info.shape[-1], kind, scales=scales, block=(height, width))


def _companion(checkpoint: Checkpoint, info: TensorInfo) -> TensorInfo:
    """The one tensor that holds the scales of `info`."""
    module = info.name.removesuffix(".weight")
    names = dict.fromkeys(pattern.format(name=info.name, module=module) for pattern in _COMPANIONS)
    found = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
    if len(found) != 1 or found[0].dtype not in _SCALE_DTYPES or not found[0].nbytes:
        have = ", ".join(f"'{scales.name}' ({scales.dtype})" for scales in found) or "none"
        raise _error(info, "one tensor with its scales", have)
    if f"{info.name}_zero_point" in checkpoint.tensors:
        raise _error(info, "codes around zero", f"'{info.name}_zero_point'")
    return found[0]


def _configured(checkpoint: Checkpoint) -> Sequence[int | None]:
    """`weight_block_size` of config.json (rows, columns), or nothing usable."""
    try:
        size = read_config(checkpoint.folder)["quantization_config"]["weight_block_size"]
    except (CheckpointError, KeyError, TypeError):
        return None, None
    usable = isinstance(size, list) and len(size) == 2 and all(type(item) is int and item > 0 for item in size)
    return size if usable else (None, None)


def _block_size(size: int, count: int, configured: int | None) -> int:
    """Numbers along an axis that share a scale, if `count` scales are good for `size` numbers; 0 if nothing fits."""
    if count in (1, size):
        return size // count
    for candidate in (configured, 128):
        if candidate and -(-size // candidate) == count:
            return candidate
    return size // count if count and size % count == 0 else 0


def _mxfp4(checkpoint: Checkpoint, info: TensorInfo) -> Layout:
    name = info.name.removesuffix("_blocks") + "_scales"
    scales = checkpoint.tensors.get(name)
    if scales is None or scales.dtype not in ("U8", "F8_E8M0") or info.shape != (*scales.shape, 16):
        found = f"{scales.dtype} {list(scales.shape)}" if scales else "none"
        raise _error(info, f"'{name}' with a U8 scale for each 16 bytes of {list(info.shape)}", found)
    columns = 32 * info.shape[-2]
    return Layout((*info.shape[:-2], columns), columns // 2, "MXFP4", scales=scales, block=(1, 32))


def _error(info: TensorInfo, expected: str, found: str) -> CheckpointError:
    where = f"tensor '{info.name}' in {info.file}"
    return CheckpointError(f"{where}: expected {expected}, found {found}; give the full-precision checkpoint")
