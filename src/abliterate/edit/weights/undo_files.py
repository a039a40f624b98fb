"""What undo needs of every edited tensor, as safetensors files beside the edited model.

One file for each file of weights while they are edited, of the same name, so that what is finished survives a kill; in
the end one, `undo.safetensors`, with the number of the part before each name. For tensor i it holds

============== ============================ ==================================================================
`i.removed`    F32 (F64) [matrices, k, v]   A of the v vectors of the stream in each matrix
`i.scales`     F32 (F64) [matrices, v]      the factors that gave the vectors their length back, if they got one
`i.counts`     I32 [pages]                  how many exceptions there are in each page of 65,536 numbers
`i.exceptions` U8                           place in its page (U16) and what was stored (see `Grid.codes`), then zeros
`i.sample`     U8                           some numbers as they were stored (see `capture.sample_places`)
`i.offset`     F32 [d]                      the constant that was added, if one was
`basis.j`      F32 [k, d]                   L, once for all tensors it was used on
============== ============================ ==================================================================

and under the metadata key `abliterate` a JSON object: `version`, `sha256` of the data, and for each tensor its name,
format, shape, stream axis, strength and basis.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from abliterate.edit.weights.capture import ordered, sample_places
from abliterate.edit.weights.passes import Known
from abliterate.edit.weights.tensors import TensorEdit, code_dtype
from abliterate.errors import CheckpointError
from abliterate.files.atomic import new_file, real_folder
from abliterate.files.bounded import MB, Kind
from abliterate.files.checkpoint import TensorInfo, open_tensor, read_shard
from abliterate.files.checkpoint.reading import open_source

#: Folder of the undo files while a model is edited, and the one file in OUT that they become.
FOLDER, NAME = "undo", "undo.safetensors"

_VERSION = 1
_PAGE = 1 << 16
_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int32: "I32", torch.uint8: "U8"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

_FILE = Kind("an undo file of version 1", 200 * MB)


@dataclass(frozen=True, slots=True)
class UndoEntry:
    """How one tensor was edited; `key` begins the names of its arrays."""

    key: str
    tensor: str
    format: str
    shape: tuple[int, ...]
    axis: int
    strength: float
    basis: str


class _SaidOfTensor(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: str
    tensor: str
    format: str
    shape: Annotated[tuple[Annotated[int, Field(ge=1, lt=2**48)], ...], Field(min_length=1, max_length=8)]
    axis: Annotated[int, Field(ge=0)]
    strength: Annotated[float, Field(gt=-1e3, lt=1e3)]
    basis: str

    @model_validator(mode="after")
    def _axis_is_there(self) -> Self:
        if self.axis >= len(self.shape):
            raise ValueError(f"axis {self.axis} of {len(self.shape)}")
        return self


class _Said(BaseModel):
    # What an undo file says beside its arrays.
    version: Literal[1]
    sha256: str
    tensors: list[_SaidOfTensor]


class UndoWriter:
    """Writes one undo file; what does not grow with the exceptions stays in memory until `close`."""

    def __init__(self, folder: Path) -> None:
        """Make a folder for undo files in `folder`, and a file there to work in."""
        self._place = folder / FOLDER
        real_folder(self._place)
        self._data = os.fdopen(new_file(self._place / ".data"), "w+b")
        self._hash, self._position = hashlib.sha256(), 0
        self._header: dict[str, Any] = {}
        self._entries: list[UndoEntry] = []
        self._bases: list[Tensor] = []

    def keeper(self, task: TensorEdit) -> UndoKeeper:
        """Takes in what is kept of the next tensor; one at a time, each closed by `finish`."""
        return UndoKeeper(self, str(len(self._entries)), task)

    def append(self, data: bytes | memoryview) -> None:
        """Put bytes at the end of the data."""
        self._hash.update(data)
        self._data.write(data)
        self._position += len(data)

    def array(self, name: str, values: Tensor) -> None:
        """Put an array at the end of the data."""
        start = self._position
        self.append(values.contiguous().view(torch.uint8).numpy().tobytes())
        self.name(name, _NAMES[values.dtype], list(values.shape), start)

    def name(self, name: str, dtype: str, shape: list[int], start: int) -> None:
        """Let the data from `start` to the end be the array `name`."""
        self._header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, self._position]}

    @property
    def position(self) -> int:
        """Bytes of data so far."""
        return self._position

    def basis(self, basis: Float[Tensor, "k d"]) -> str:
        """The name of the array that holds `basis`, written once."""
        for number, known in enumerate(self._bases):
            if known.dtype == basis.dtype and torch.equal(known, basis):
                return f"basis.{number}"
        self._bases.append(basis)
        self.array(f"basis.{len(self._bases) - 1}", basis)
        return f"basis.{len(self._bases) - 1}"

    def finish(self, entry: UndoEntry) -> None:
        """Close what is kept of one tensor."""
        self._entries.append(entry)

    def abandon(self) -> None:
        """Stop where it is."""
        self._data.close()

    def close(self, name: str) -> Path:
        """Put the file in place, for the file of weights `name`; not yet flushed."""
        path = self._place / name
        with self._data as data:
            data.seek(0)
            chunks = iter(functools.partial(data.read, 1 << 20), b"")
            _put_together(path, self._header, self._entries, self._hash.hexdigest(), chunks)
        (self._place / ".data").unlink()
        return path


def merge(folder: Path, names: Sequence[str], target: Path) -> None:
    """Make one undo file `target` of the undo files `names` in `folder`."""
    parts = [UndoFile(folder / name) for name in names]
    entries, header, position = [], {}, 0
    for number, part in enumerate(parts):
        entries += [replace(e, key=f"{number}/{e.key}", basis=f"{number}/{e.basis}") for e in part.entries]
        for name, info in part.arrays.tensors.items():
            start = position + info.start - part.arrays.header_bytes
            offsets = [start, start + info.nbytes]
            header[f"{number}/{name}"] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        position += part.arrays.file_bytes - part.arrays.header_bytes
    digest = hashlib.sha256()
    for part in parts:
        for chunk in part.data():
            digest.update(chunk)
    chunks = (chunk for part in parts for chunk in part.data())
    _put_together(target, header, entries, digest.hexdigest(), chunks)


def _put_together(
    path: Path, arrays: Mapping[str, Any], entries: Sequence[UndoEntry], digest: str, data: Iterable[bytes]
) -> None:
    """Write an undo file: its header, then `data`."""
    said = {"version": _VERSION, "sha256": digest, "tensors": [asdict(entry) for entry in entries]}
    header = json.dumps({"__metadata__": {"abliterate": json.dumps(said)}, **arrays}).encode()
    header += b" " * (-len(header) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(new_file(path), "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.writelines(data)


class UndoKeeper:
    """What is kept of one tensor on its way through an edit (a `passes.Keeper`)."""

    def __init__(self, writer: UndoWriter, key: str, task: TensorEdit) -> None:
        """Begin with the data as far as `writer` has come."""
        self._writer, self._key, self._task = writer, key, task
        self._basis = writer.basis(task.edit.basis)
        self._counts = np.zeros(-(-int(np.prod(task.grid.layout.shape, dtype=np.int64)) // _PAGE), dtype=np.int32)
        self._start = writer.position
        self._ended = False

    def exceptions(self, places: Int[Tensor, " p"], codes: Int[Tensor, " p"]) -> None:
        """Append some numbers that undo cannot compute."""
        if not len(places):
            return
        where = places.numpy()
        records = np.empty(len(where), dtype=_record(codes.dtype))
        records["place"] = where & (_PAGE - 1)
        records["code"] = codes.numpy()
        first = int(where[0]) // _PAGE
        counts = np.bincount(where // _PAGE - first).astype(np.int32)
        self._counts[first : first + len(counts)] += counts
        self._writer.append(records.tobytes())

    def array(self, name: str, values: Tensor) -> None:
        """Append a whole array; there are no exceptions after the first."""
        self._end_exceptions()
        self._writer.array(f"{self._key}.{name}", values)

    def finish(self) -> None:
        """Close the tensor."""
        self._end_exceptions()
        task = self._task
        if task.offset is not None:
            self._writer.array(f"{self._key}.offset", task.offset[0])
        layout = task.grid.layout
        self._writer.finish(
            UndoEntry(
                key=self._key,
                tensor=task.info.name,
                format=layout.format,
                shape=layout.shape,
                axis=task.stored.axis,
                strength=task.edit.strength,
                basis=self._basis,
            )
        )

    def _end_exceptions(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._writer.append(bytes(-self._writer.position % 8))  # what follows can be mapped
        self._writer.name(f"{self._key}.exceptions", "U8", [self._writer.position - self._start], self._start)
        self._writer.array(f"{self._key}.counts", torch.from_numpy(self._counts))


class UndoFile:
    """A whole undo file, checked."""

    def __init__(self, path: Path) -> None:
        """Read what the file says, and all of it once against its hash.

        Raises `CheckpointError` when it is damaged or not an undo file of this version.
        """
        self.path = path
        self.arrays = read_shard(path)
        said = _FILE.checked(path, _FILE.parsed(path, self.arrays.metadata.get("abliterate", "null")), _Said)
        self.entries = tuple(UndoEntry(**dict(entry)) for entry in said.tensors)
        if self._data_hash() != said.sha256:
            raise CheckpointError(f"{path}: is damaged, its data are not what was written; copy it again")

    def array(self, name: str) -> Tensor | None:
        """One array, None where there is none of that name."""
        info = self.arrays.tensors.get(name)
        if info is None:
            return None
        if info.dtype not in _DTYPES:
            raise _FILE.refused(self.path, f"'{name}' as {info.dtype}")
        with open_tensor(info) as reader:
            return torch.frombuffer(reader.read(0, info.nbytes), dtype=_DTYPES[info.dtype]).view(info.shape)

    def known(self, entry: UndoEntry) -> Known:
        """What the edit of one tensor depended on, for all its matrices."""
        removed = self.array(f"{entry.key}.removed")
        if removed is None:
            raise CheckpointError(f"{self.path}: expected what was taken out of '{entry.tensor}', found nothing")
        return Known(removed, self.array(f"{entry.key}.scales"))

    def exceptions(self, entry: UndoEntry) -> Exceptions:
        """The numbers of one tensor that cannot be computed."""
        counts = self.array(f"{entry.key}.counts")
        info = self.arrays.tensors.get(f"{entry.key}.exceptions")
        record = _record(code_dtype(entry.format))
        pages = -(-math.prod(entry.shape) // _PAGE)
        whole = counts is not None and counts.dtype == torch.int32 and counts.shape == (pages,)
        if counts is None or info is None or not whole or not bool(((counts >= 0) & (counts <= _PAGE)).all()):
            raise CheckpointError(f"{self.path}: expected the exceptions of '{entry.tensor}', found none that fit it")
        if info.nbytes // record.itemsize < int(counts.sum()):
            raise CheckpointError(f"{self.path}: expected the exceptions of '{entry.tensor}', found too few")
        return Exceptions(info, np.concatenate(([0], counts.numpy().cumsum(dtype=np.int64))), record)

    def sample(self, entry: UndoEntry) -> Sample | None:
        """Some numbers of one tensor as they were; None in files of earlier versions, which kept none."""
        kept = self.array(f"{entry.key}.sample")
        if kept is None:
            return None
        places = sample_places(int(np.prod(entry.shape, dtype=np.int64)))
        dtype = code_dtype(entry.format)
        if kept.dtype != torch.uint8 or kept.numel() != len(places) * dtype.itemsize:
            raise CheckpointError(f"{self.path}: expected {len(places)} numbers of '{entry.tensor}', found others")
        return Sample(places, kept.view(dtype))

    def _data_hash(self) -> str:
        found = hashlib.sha256()
        for chunk in self.data():
            found.update(chunk)
        return found.hexdigest()

    def data(self) -> Iterator[bytes]:
        """All that follows the header."""
        with open(open_source(self.path), "rb") as file:
            file.seek(self.arrays.header_bytes)
            while chunk := file.read(1 << 20):
                yield chunk


@dataclass(frozen=True, slots=True)
class Exceptions:
    """Exceptions on disk; those before page i are `ends[i]` in number."""

    info: TensorInfo
    ends: Any
    record: np.dtype[Any]

    def between(self, start: int, end: int) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
        """Places and codes of those from `start` up to `end`, counted from `start`."""
        first, last = start // _PAGE, -(-end // _PAGE)
        width = self.record.itemsize
        with open_tensor(self.info) as reader:
            low, high = int(self.ends[first]), int(self.ends[last])
            records = np.frombuffer(reader.read(low * width, (high - low) * width), self.record)
        pages = np.repeat(np.arange(first, last), np.diff(self.ends[first : last + 1]))
        places = pages * _PAGE + records["place"] - start
        inside = (places >= 0) & (places < end - start)
        return torch.from_numpy(places[inside]), torch.from_numpy(records["code"][inside])


@dataclass(frozen=True, slots=True)
class Sample:
    """Numbers of the original at some places of a tensor, as they were stored."""

    places: Any
    codes: Int[Tensor, " n"]

    def steps(self, found: Int[Tensor, "rows columns"], start: int) -> Int[Tensor, " p"]:
        """How many stored numbers those of a block that begins at `start` are away from what they were."""
        low, high = np.searchsorted(self.places, (start, start + found.numel()))
        now = found.reshape(-1)[torch.from_numpy(self.places[low:high] - start)]
        apart = (ordered(now).long() - ordered(self.codes[low:high]).long()).abs()
        return torch.where(apart < 0, torch.iinfo(torch.int64).max, apart)  # F64: more than can be counted


def _record(codes: torch.dtype) -> np.dtype[Any]:
    """One exception on disk."""
    return np.dtype([("place", "<u2"), ("code", f"<i{codes.itemsize}")])
