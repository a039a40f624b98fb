"""The layout of safetensors files and model folders, read and checked without reading the data.

Source: the safetensors format (https://github.com/huggingface/safetensors#format): a little-endian u64 with the length
of the header, the header (a JSON object), the data; the offsets in the header count from the start of the data, which
the tensors cover without holes and without overlap.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from abliterate.files.bounded import MB, Kind, NotRegularError, open_regular
from abliterate.files.bounded import parse_json as parse
from abliterate.files.checkpoint.links import leads_out
from abliterate.files.checkpoint.messages import OUR_FAULT, damaged, error, short
from abliterate.files.portable import read_at

BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of one element, by the dtype name of the format (safetensors 0.8)."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""A PEFT adapter, by itself or beside a model of which it is no part."""
OWN_RESULTS = frozenset({"abliteration.json", "direction.safetensors", "report.html", "undo.safetensors"})
"""Files an earlier run of this package left in the source: they describe that run, not the next one."""

CALL_LIMIT = 128 * 2**20  # bytes one system call is asked to move; Linux stops at 0x7ffff000
_MAX_HEADER = 100_000_000  # the limit of the reference reader
_MAX_U64 = 2**64 - 1

INDEX = Kind("the index of a checkpoint", 200 * MB, todo="download it again")
"""A model has one tensor for each of its experts: a million of them are 100 MB."""
CONFIG = Kind("a model's configuration", 16 * MB, todo="download it again")
"""config.json and its like, which transformers reads a second time."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes `start` to `end` of `file`, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its data starts at byte `header_bytes`; tensors in the order of the file."""

    path: Path
    header_bytes: int
    file_bytes: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All shards of a model folder and all their tensors; `index` is the index file, where there is one.

    `misplaced` are tensors that the index lists in a file which does not hold them: it was written for other shards.
    """

    folder: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    index: Path | None
    misplaced: tuple[str, ...] = ()

    @property
    def absent(self) -> tuple[str, ...]:
        """Tensors that the index lists and no shard holds."""
        return tuple(name for name in self.misplaced if name not in self.tensors)


@dataclass(frozen=True, slots=True)
class TensorReader:
    """Reads the bytes of one tensor of the source while its file is open."""

    info: TensorInfo
    _fd: int

    def read(self, offset: int, length: int) -> bytearray:
        """Bytes `offset` to `offset + length` of the tensor, in a new buffer that may be written to."""
        if offset < 0 or length < 0 or offset + length > self.info.nbytes:
            wanted = f"bytes {offset} to {offset + length} of {short(self.info.name)}"
            raise error(f"{self.info.file}: asked for {wanted}, which has {self.info.nbytes}; {OUR_FAULT}")
        buffer = bytearray(length)
        with memoryview(buffer) as view:
            done = 0
            while done < length:
                got = read_at(self._fd, view[done : done + CALL_LIMIT], self.info.start + offset + done)
                if not got:
                    raise damaged(self.info.file, "it became shorter while it was read")
                done += got
        return buffer


def read_shard(path: Path) -> Shard:
    """Read the header of a safetensors file and check all of it against the format and the file's size."""
    raw, size = _read_header(path)
    header = parse_json(raw, path, whole_numbers=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, f"__metadata__ is {short(metadata)}, expected an object of strings")
    data_start = 8 + len(raw)
    tensors = [_tensor(name, entry, path, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    _check_layout(tensors, path, data_start, size)
    return Shard(path, data_start, size, metadata, {info.name: info for info in tensors})


def _read_header(path: Path) -> tuple[bytes, int]:
    """The header of a file without its length, and the size of the whole file."""
    try:
        with open(open_source(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            limit = min(size - 8, _MAX_HEADER)
            raw = file.read(length) if 2 <= length <= limit else b""
    except OSError as exc:
        raise error(f"cannot read {path}: {exc.strerror}; download it again") from exc
    if size < 8:
        raise damaged(path, f"it has {size} bytes, expected at least 8")
    if not 2 <= length <= limit:
        raise damaged(path, f"its header length is {length}, expected 2 to {limit}; it has {size} bytes")
    if len(raw) != length:
        raise damaged(path, "it became shorter while it was read")
    return raw, size


def open_source(path: Path) -> int:
    """A descriptor to read the regular file `path`; links are followed, pipes and folders refused."""
    try:
        return open_regular(path)
    except NotRegularError as exc:
        raise error(f"{path} is {exc}, expected a file; download the model again") from exc
    except FileNotFoundError as exc:
        raise error(f"{path} does not exist, expected a file; download the model again") from exc
    except OSError as exc:
        raise error(f"cannot read {path}: {exc.strerror}; check its permissions") from exc


def _whole(text: str) -> int:
    if len(text) > 20 or not text.isdigit() or int(text) > _MAX_U64:
        raise ValueError(f"the number {text[:40]}, expected whole numbers from 0 to 2**64 - 1")
    return int(text)


def parse_json(raw: bytes, path: Path, *, whole_numbers: bool = False) -> dict[str, Any]:
    """The JSON object in `raw`, without keys that come twice; with `whole_numbers`, of u64 numbers only."""
    try:
        value = parse(raw.decode(), whole=_whole if whole_numbers else None)
    except UnicodeError as exc:
        raise error(f"{path}: its JSON is not UTF-8 ({exc}); download the file again") from exc
    except ValueError as exc:
        raise error(f"{path}: its JSON cannot be used ({exc}); download the file again") from exc
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {short(value)}; download the file again")
    return value


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    """The tensor that a header entry describes, with the size of its type and shape checked."""
    label = f"tensor {short(name)}"
    if not isinstance(entry, dict):
        raise damaged(path, f"{label} is {short(entry)}, expected an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(path, f"{label} has the dtype {short(dtype)}, expected one of {', '.join(BITS)}")
    if not _naturals(shape):
        raise damaged(path, f"{label} has the shape {short(shape)}, expected a list of whole numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{label} has the data_offsets {short(offsets)}, expected [start, end]")
    total = 1
    for count in (*shape, BITS[dtype]):  # in this order: the reference reader refuses an overflow even before a 0
        total *= count
        if total > _MAX_U64:
            raise damaged(path, f"{label} has the shape {short(shape)}, which is more than 2**64 bits")
    if total != 8 * (offsets[1] - offsets[0]):
        found = f"its data_offsets {offsets} give {offsets[1] - offsets[0]} bytes"
        raise damaged(path, f"{label} as {dtype} {short(shape)} takes {total / 8:g} bytes, {found}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1])


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(tensors: Iterable[TensorInfo], path: Path, data_start: int, size: int) -> None:
    """Check that the tensors, sorted by offset, cover the data without holes, overlap or a rest."""
    position = data_start
    for info in tensors:
        if info.start != position:
            kind = "overlaps the one before it" if info.start < position else "comes after a hole"
            raise damaged(path, f"tensor {short(info.name)} {kind}: expected at {position}, is at {info.start}")
        position = info.end
    if position != size:
        raise damaged(path, f"its tensors end at byte {position}, the file has {size} bytes")


def open_checkpoint(folder: Path, *, stale_index: bool = False) -> Checkpoint:
    """Find and check the safetensors files of a model folder: the same ones that transformers would load.

    `model.safetensors` if it is there and no index names it, else the shards of the index, else the only
    `*.safetensors` file. An index that lists a tensor in a shard without it is an error, unless a `stale_index` is
    taken: whether the model needs that tensor is then for the caller to say (`Checkpoint.misplaced`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise error(f"{folder} is not a folder; give the folder of a model with safetensors files")
    index: Path | None = folder / INDEX_NAME
    listed = _read_index(folder / INDEX_NAME) if (folder / INDEX_NAME).exists() else {}
    if (folder / SINGLE_NAME).exists() and SINGLE_NAME not in listed.values():
        listed = {}
    if listed:
        names = sorted(set(listed.values()))
    else:
        names, index = [_single_file(folder)], None
    for name in (*names, *((INDEX_NAME,) if index else ())):
        if leads_out(folder / name, folder):
            raise error(f"{folder / name} is a link out of the folder and is not followed; put the file itself there")
    shards = tuple(read_shard(folder / name) for name in names)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in shard.tensors.items():
            if name in tensors:
                both = f"{tensors[name].file} and {info.file}"
                raise error(f"tensor {short(name)} is in two files, {both}; download the model again")
            tensors[name] = info
    misplaced = tuple(n for n, file in listed.items() if n not in tensors or tensors[n].file != folder / file)
    if misplaced and not stale_index:
        missing = f"lists tensor {short(misplaced[0])} in {listed[misplaced[0]]}, which does not hold it"
        raise error(f"{folder / INDEX_NAME} {missing}; download the model again")
    return Checkpoint(folder, shards, tensors, index, misplaced)


def _read_index(path: Path) -> dict[str, str]:
    """File by tensor name, from an index; a file name that leads out of the folder is refused."""
    content = INDEX.fields(path)
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise error(f"{path} has the weight_map {short(listed)}, expected an object; download it again")
    for tensor, name in listed.items():
        if not isinstance(name, str) or not is_inside(name):
            where = f"lists tensor {short(tensor)} in {short(name)}"
            raise error(f"{path} {where}, expected a .safetensors file inside the folder; correct or remove it")
    return {tensor: str(PurePosixPath(name)) for tensor, name in listed.items()}


def is_inside(name: str) -> bool:
    """Whether a file name of an index stays in the folder of the index."""
    pure = PurePosixPath(name)
    safe = name.isprintable() and "\\" not in name and ":" not in name and ".." not in pure.parts
    return safe and not pure.is_absolute() and pure.suffix == ".safetensors"


def _single_file(folder: Path) -> str:
    if (folder / SINGLE_NAME).exists():
        return SINGLE_NAME
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    names = [name for name in names if name not in OWN_RESULTS and name != ADAPTER_NAME]
    if len(names) == 1:
        return names[0]
    if names:
        found = f"{len(names)} safetensors files without {INDEX_NAME}: {', '.join(names[:4])}"
        raise error(f"{folder} has {found}; expected {SINGLE_NAME} or an index, download the model again")
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        found = f"only has weights that are not safetensors ({', '.join(pickles[:3])})"
        raise error(f"{folder} {found}; convert them to safetensors first, pickles are never loaded")
    raise error(f"{folder} has no safetensors files, expected {SINGLE_NAME}; give the folder of a model")


@contextmanager
def open_tensor(info: TensorInfo) -> Iterator[TensorReader]:
    """A reader for one tensor, good while the context lasts."""
    fd = open_source(info.file)
    try:
        yield TensorReader(info, fd)
    finally:
        os.close(fd)


def same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two tensors have one dtype, shape and content."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = 1 << 20
    with open_tensor(a) as mine, open_tensor(b) as theirs:
        pieces = ((start, min(step, a.nbytes - start)) for start in range(0, a.nbytes, step))
        return all(mine.read(*piece) == theirs.read(*piece) for piece in pieces)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(open_source(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
