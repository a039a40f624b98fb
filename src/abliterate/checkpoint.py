"""Safetensors checkpoints as bytes on disk: read their layout, write an edited copy, put it in place.

Nothing here knows a model, computes with numbers or loads a pickle; every size and offset is in bytes.
Source: the safetensors format (https://github.com/huggingface/safetensors#format): a little-endian u64 with
the length of the header, the header (a JSON object), the data; the offsets in the header count from the
start of the data, which the tensors cover without holes and without overlap.
Every function raises CheckpointError for files that are damaged, missing or cannot be written, and
UsageError where what was asked for is not allowed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeGuard

from abliterate.errors import CheckpointError, UsageError

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
OWN_RESULTS = frozenset({"abliteration.json", "direction.safetensors", "report.html"})
"""Files an earlier run of this package left in the source: they describe that run, not the next one."""

_MAX_HEADER = 100_000_000  # the limit of the reference reader
_MAX_U64 = 2**64 - 1
_CHUNK = 16 * 2**20  # plain read and write
_CALL_LIMIT = 128 * 2**20  # one copy_file_range or sendfile; Linux stops at 0x7ffff000
_UNSUPPORTED = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTSOCK}
_OUR_FAULT = "this is a fault of the program, please report it"
_OTHER_WEIGHTS = re.compile(
    r"\.(bin|pth?|pt2|ckpt|gguf|ggml|h5|keras|msgpack|onnx|pkl|pickle|safetensors|npz|ot|tflite|nemo|pdparams)"
    r"(\.index\.json|[._]data.*|\.index|\.part.*|\.\d+)?$",
    re.IGNORECASE,
)


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
    """All shards of a model folder and all their tensors; `index` is the index file, where there is one."""

    folder: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    index: Path | None


@dataclass(frozen=True, slots=True)
class TensorReader:
    """Reads the bytes of one tensor of the source while its file is open."""

    info: TensorInfo
    _fd: int

    def read(self, offset: int, length: int) -> bytearray:
        """Bytes `offset` to `offset + length` of the tensor, in a new buffer that may be written to."""
        if offset < 0 or length < 0 or offset + length > self.info.nbytes:
            wanted = f"bytes {offset} to {offset + length} of {_short(self.info.name)}"
            raise _error(f"{self.info.file}: asked for {wanted}, which has {self.info.nbytes}; {_OUR_FAULT}")
        buffer = bytearray(length)
        with memoryview(buffer) as view:
            done = 0
            while done < length:
                got = os.preadv(self._fd, [view[done : done + _CALL_LIMIT]], self.info.start + offset + done)
                if not got:
                    raise _damaged(self.info.file, "it became shorter while it was read")
                done += got
        return buffer


@dataclass(frozen=True, slots=True)
class EditedFiles:
    """What `write_edited` wrote and left out (names relative to the folder), and the bytes written."""

    written: tuple[str, ...]
    left_out: tuple[str, ...]
    nbytes: int


Chunk: TypeAlias = bytes | bytearray | memoryview
Rewriter: TypeAlias = Callable[[TensorReader], Iterable[Chunk]]
"""Yields the new bytes of a tensor in order, `info.nbytes` of them in all."""


# ---------------------------------------------------------------------------------------------- messages


def _error(text: str) -> CheckpointError:
    """The error with `text` on one line, whatever the names in it hold."""
    return CheckpointError(_line(text))


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return _error(f"{path} is not a whole safetensors file: {reason}; download or convert it again")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**7 else f"{nbytes} bytes"


def _write_error(exc: OSError, where: Path, needed: int | None = None) -> CheckpointError:
    """The one-line error for a failed write below the folder `where`, `needed` bytes before the end."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "disk full" if exc.errno == errno.ENOSPC else "disk quota used up"
        need = f"{_size(needed)} more needed, " if needed is not None else ""
        return _error(f"{what}: {need}{_size(_free(where))} free at {where}; free space or choose another -o")
    if exc.errno == errno.EFBIG:
        return _error(f"{where}: this file system or a limit forbids files this large; choose another -o")
    reason = exc.strerror or str(exc)
    return _error(f"cannot write {exc.filename or where}: {reason}; check permissions or choose another -o")


# --------------------------------------------------------------------------------------- reading the layout


def read_shard(path: Path) -> Shard:
    """Read the header of a safetensors file and check all of it against the format and the file's size."""
    raw, size = _read_header(path)
    header = _parse_json(raw, path, whole_numbers=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"__metadata__ is {_short(metadata)}, expected an object of strings")
    data_start = 8 + len(raw)
    tensors = [_tensor(name, entry, path, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    _check_layout(tensors, path, data_start, size)
    return Shard(path, data_start, size, metadata, {info.name: info for info in tensors})


def _read_header(path: Path) -> tuple[bytes, int]:
    """The header of a file without its length, and the size of the whole file."""
    try:
        with open(_open_source(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            limit = min(size - 8, _MAX_HEADER)
            raw = file.read(length) if 2 <= length <= limit else b""
    except OSError as exc:
        raise _error(f"cannot read {path}: {exc.strerror}; download it again") from exc
    if size < 8:
        raise _damaged(path, f"it has {size} bytes, expected at least 8")
    if not 2 <= length <= limit:
        raise _damaged(path, f"its header length is {length}, expected 2 to {limit}; it has {size} bytes")
    if len(raw) != length:
        raise _damaged(path, "it became shorter while it was read")
    return raw, size


def _open_source(path: Path) -> int:
    """A descriptor to read the regular file `path`; links are followed, pipes and folders refused."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    except FileNotFoundError as exc:
        raise _error(f"{path} does not exist, expected a file; download the model again") from exc
    except OSError as exc:
        raise _error(f"cannot read {path}: {exc.strerror}; check its permissions") from exc
    raise _error(f"{path} is not a regular file; download the model again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`; ValueError for a key that comes twice or a string that UTF-8 cannot hold."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {_short(key)} comes twice")
        (key + value if isinstance(value, str) else key).encode()
        result[key] = value
    return result


def _whole(text: str) -> int:
    if len(text) > 20 or not text.isdigit() or int(text) > _MAX_U64:
        raise ValueError(f"the number {text[:40]}, expected whole numbers from 0 to 2**64 - 1")
    return int(text)


def _parse_json(raw: bytes, path: Path, *, whole_numbers: bool = False) -> dict[str, Any]:
    hooks: dict[str, Any] = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), _whole)
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, **(hooks if whole_numbers else {}))
    except RecursionError as exc:
        raise _error(f"{path}: its JSON is nested too deeply; download the file again") from exc
    except UnicodeError as exc:
        raise _error(f"{path}: its JSON is not UTF-8 ({exc}); download the file again") from exc
    except ValueError as exc:
        raise _error(f"{path}: its JSON cannot be used ({exc}); download the file again") from exc
    if not isinstance(value, dict):
        raise _error(f"{path}: expected a JSON object, found {_short(value)}; download the file again")
    return value


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    """The tensor that a header entry describes, with the size of its type and shape checked."""
    label = f"tensor {_short(name)}"
    if not isinstance(entry, dict):
        raise _damaged(path, f"{label} is {_short(entry)}, expected an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(path, f"{label} has the dtype {_short(dtype)}, expected one of {', '.join(BITS)}")
    if not _naturals(shape):
        raise _damaged(path, f"{label} has the shape {_short(shape)}, expected a list of whole numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{label} has the data_offsets {_short(offsets)}, expected [start, end]")
    total = BITS[dtype]
    for count in shape:  # in this order: the reference reader refuses an overflow even before a 0
        total *= count
        if total > _MAX_U64:
            raise _damaged(path, f"{label} has the shape {_short(shape)}, which is more than 2**64 bits")
    if total != 8 * (offsets[1] - offsets[0]):
        found = f"its data_offsets {offsets} give {offsets[1] - offsets[0]} bytes"
        raise _damaged(path, f"{label} as {dtype} {_short(shape)} takes {total / 8:g} bytes, {found}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1])


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(tensors: Iterable[TensorInfo], path: Path, data_start: int, size: int) -> None:
    """Check that the tensors, sorted by offset, cover the data without holes, overlap or a rest."""
    position = data_start
    for info in tensors:
        if info.start != position:
            kind = "overlaps the one before it" if info.start < position else "comes after a hole"
            raise _damaged(path, f"tensor {_short(info.name)} {kind}: expected at {position}, is at {info.start}")
        position = info.end
    if position != size:
        raise _damaged(path, f"its tensors end at byte {position}, the file has {size} bytes")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find and check the safetensors files of a model folder: the same ones that transformers would load.

    `model.safetensors` if it is there and no index names it, else the shards of the index, else the only
    `*.safetensors` file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise _error(f"{folder} is not a folder; give the folder of a model with safetensors files")
    index: Path | None = folder / INDEX_NAME
    listed = _read_index(folder / INDEX_NAME) if (folder / INDEX_NAME).exists() else {}
    if (folder / SINGLE_NAME).exists() and SINGLE_NAME not in listed.values():
        listed = {}
    if listed:
        names = sorted(set(listed.values()))
    else:
        names, index = [_single_file(folder)], None
    shards = tuple(read_shard(folder / name) for name in names)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in shard.tensors.items():
            if name in tensors:
                both = f"{tensors[name].file} and {info.file}"
                raise _error(f"tensor {_short(name)} is in two files, {both}; download the model again")
            tensors[name] = info
    for name, file in listed.items():
        if name not in tensors or tensors[name].file != folder / file:
            missing = f"lists tensor {_short(name)} in {file}, which does not hold it"
            raise _error(f"{folder / INDEX_NAME} {missing}; download the model again")
    return Checkpoint(folder, shards, tensors, index)


def _read_index(path: Path) -> dict[str, str]:
    """File by tensor name, from an index; a file name that leads out of the folder is refused."""
    try:
        with open(_open_source(path), "rb") as file:
            content = _parse_json(file.read(), path)
    except OSError as exc:
        raise _error(f"cannot read {path}: {exc.strerror}; download it again") from exc
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise _error(f"{path} has the weight_map {_short(listed)}, expected an object; download it again")
    for tensor, name in listed.items():
        if not isinstance(name, str) or not _is_inside(name):
            where = f"lists tensor {_short(tensor)} in {_short(name)}"
            raise _error(f"{path} {where}, expected a .safetensors file inside the folder; correct or remove it")
    return {tensor: str(PurePosixPath(name)) for tensor, name in listed.items()}


def _is_inside(name: str) -> bool:
    pure = PurePosixPath(name)
    safe = name.isprintable() and "\\" not in name and ":" not in name and ".." not in pure.parts
    return safe and not pure.is_absolute() and pure.suffix == ".safetensors"


def _single_file(folder: Path) -> str:
    if (folder / SINGLE_NAME).exists():
        return SINGLE_NAME
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    names = [name for name in names if name not in OWN_RESULTS and name != "adapter_model.safetensors"]
    if len(names) == 1:
        return names[0]
    if names:
        found = f"{len(names)} safetensors files without {INDEX_NAME}: {', '.join(names[:4])}"
        raise _error(f"{folder} has {found}; expected {SINGLE_NAME} or an index, download the model again")
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        found = f"only has weights that are not safetensors ({', '.join(pickles[:3])})"
        raise _error(f"{folder} {found}; convert them to safetensors first, pickles are never loaded")
    raise _error(f"{folder} has no safetensors files, expected {SINGLE_NAME}; give the folder of a model")


@contextmanager
def open_tensor(info: TensorInfo) -> Iterator[TensorReader]:
    """A reader for one tensor, good while the context lasts."""
    fd = _open_source(info.file)
    try:
        yield TensorReader(info, fd)
    finally:
        os.close(fd)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(_open_source(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------ writing the copy


def bytes_to_write(source: Checkpoint) -> int:
    """Bytes that `write_edited` will write: the shards and the other files that come along."""
    others, _ = _other_files(source)
    return sum(shard.file_bytes for shard in source.shards) + sum(os.stat(path).st_size for path in others)


def write_edited(
    source: Checkpoint,
    target: Path,
    rewriters: Mapping[str, Rewriter],
    *,
    progress: Callable[[int], None] | None = None,
) -> EditedFiles:
    """Copy the folder of `source` into the empty folder `target`, with the named tensors rewritten.

    Headers, all other tensors and all other files come along byte for byte; links become files. Left out:
    hidden folders and, listed in the result, other copies of the weights and an earlier run's results.
    Every file is on disk when this returns. `progress` is called with the bytes written since its last call.
    """
    if unknown := sorted(rewriters.keys() - source.tensors.keys()):
        raise _error(f"{source.folder} has no tensor {_short(unknown[0])}; {_OUR_FAULT}")
    if not target.is_dir() or any(target.iterdir()):
        raise _error(f"{target} is not an empty folder; choose another -o")
    if _overlap(target, source.folder):
        raise UsageError(_line(f"{target} overlaps with the model {source.folder}; choose another -o"))
    others, left_out = _other_files(source)
    names: list[str] = []
    total = remaining = bytes_to_write(source)

    def step(count: int) -> None:
        nonlocal remaining
        remaining -= count
        if progress:
            progress(count)

    try:
        with _flusher() as flush:
            for path, shard in [*((s.path, s) for s in source.shards), *((path, None) for path in others)]:
                names.append(str(path.relative_to(source.folder)))
                (target / names[-1]).parent.mkdir(parents=True, exist_ok=True)
                flush(_write_file(path, target / names[-1], shard, rewriters, step))
        _sync_folders(target)
    except OSError as exc:
        raise _write_error(exc, target, remaining) from exc
    return EditedFiles(tuple(names), left_out, total)


def _other_files(source: Checkpoint) -> tuple[list[Path], tuple[str, ...]]:
    """The files of the folder beside the shards: those that come along, and the names of the rest."""
    shards = {shard.path for shard in source.shards}
    others: list[Path] = []
    left_out: list[str] = []
    for path in _walk(source.folder, ()):
        name = str(path.relative_to(source.folder))
        if path in shards:
            continue
        if name in OWN_RESULTS or (path != source.index and _OTHER_WEIGHTS.search(path.name)):
            left_out.append(name)
        elif path.is_file():
            others.append(path)
        else:
            raise _error(f"{path} is a broken link or no regular file; remove it or download the model again")
    return others, tuple(left_out)


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """Everything below `folder` that is not a folder, through links, without hidden folders."""
    real = os.path.realpath(folder)
    if real in above:
        raise _error(f"{folder} is a link to a folder around it; remove the link")
    try:
        paths = sorted(folder.iterdir())
    except OSError as exc:
        raise _error(f"cannot read {folder}: {exc.strerror}; check its permissions") from exc
    for path in paths:
        if not path.is_dir():
            yield path
        elif not path.name.startswith("."):
            yield from _walk(path, (*above, real))


def _write_file(
    path: Path,
    target: Path,
    shard: Shard | None,
    rewriters: Mapping[str, Rewriter],
    step: Callable[[int], None],
) -> int:
    """Write the new file `target` from `path`; returns its descriptor, to be flushed and closed."""
    src = _open_source(path)
    try:
        info = os.fstat(src)
        if shard and info.st_size != shard.file_bytes:
            raise _damaged(path, f"it had {shard.file_bytes} bytes and now has {info.st_size}")
        dst = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with suppress(PermissionError):  # file systems without modes
                os.fchmod(dst, info.st_mode & 0o777 | stat.S_IRUSR | stat.S_IWUSR)
            position = 0
            for name, tensor in shard.tensors.items() if shard else ():
                if name in rewriters:
                    _copy_range(src, dst, position, tensor.start, path, step)
                    _rewrite(TensorReader(tensor, src), dst, rewriters[name], step)
                    position = tensor.end
            _copy_range(src, dst, position, info.st_size, path, step)
        except BaseException:
            os.close(dst)
            raise
    finally:
        os.close(src)
    return dst


def _rewrite(reader: TensorReader, dst: int, rewriter: Rewriter, step: Callable[[int], None]) -> None:
    position, info = reader.info.start, reader.info
    for chunk in rewriter(reader):
        view = memoryview(chunk).cast("B")
        position += len(view)
        if position > info.end:
            break
        _write_all(dst, view, position - len(view))
        step(len(view))
    if position != info.end:
        wrong = f"{info.nbytes} bytes expected, {'more' if position > info.end else position - info.start} given"
        raise _error(f"{info.file}: tensor {_short(info.name)} rewritten wrongly: {wrong}; {_OUR_FAULT}")


def _write_all(dst: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(dst, view[done : done + _CALL_LIMIT], offset + done)


def _copy_range(src: int, dst: int, start: int, end: int, path: Path, step: Callable[[int], None]) -> None:
    """Copy bytes `start` to `end` to the same place of `dst`, inside the kernel where it can."""
    while start < end:
        count = _copy_some(src, dst, start, min(end - start, _CALL_LIMIT))
        if not count:
            raise _damaged(path, "it became shorter while it was read")
        start += count
        step(count)


def _copy_some(src: int, dst: int, offset: int, count: int) -> int:
    """Copy up to `count` bytes; returns how many, 0 at the end of the source."""
    for copy in (_by_copy_file_range, _by_sendfile):
        try:
            if done := copy(src, dst, offset, count):
                return done
        except OSError as exc:
            if exc.errno not in _UNSUPPORTED:
                raise
    data = os.pread(src, min(count, _CHUNK), offset)
    _write_all(dst, memoryview(data), offset)
    return len(data)


def _by_copy_file_range(src: int, dst: int, offset: int, count: int) -> int:
    return os.copy_file_range(src, dst, count, offset, offset) if hasattr(os, "copy_file_range") else 0


def _by_sendfile(src: int, dst: int, offset: int, count: int) -> int:
    os.lseek(dst, offset, os.SEEK_SET)
    return os.sendfile(dst, src, offset, count)


@contextmanager
def _flusher() -> Iterator[Callable[[int], None]]:
    """A function that flushes and closes a descriptor in a second thread, while the next file is written."""
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:

        def flush(fd: int) -> None:
            pending.append(pool.submit(_sync_and_close, fd))
            if len(pending) > 1:
                pending.pop(0).result()

        yield flush
        for future in pending:
            future.result()


def _sync_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush a folder
            raise
    finally:
        os.close(fd)


def _sync_folders(folder: Path, *, files: bool = False) -> None:
    """Flush `folder` and all folders below it, and with `files` all their files."""
    for place, _, names in os.walk(folder):
        for name in (*names, ".") if files else (".",):
            _sync_and_close(os.open(os.path.join(place, name), os.O_RDONLY | os.O_CLOEXEC))


# -------------------------------------------------------------------------------------- putting it in place


def ensure_space(target_parent: Path, needed_bytes: int) -> None:
    """Check that the disk under `target_parent`, which need not exist yet, has `needed_bytes` free."""
    free = _free(target_parent)
    if free < needed_bytes:
        sizes = f"{_size(needed_bytes)} needed, {_size(free)} free at {target_parent}"
        raise _error(f"not enough disk space: {sizes}; free space or choose another -o")


def _free(where: Path) -> int:
    place = Path(os.path.abspath(where))
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


@contextmanager
def staged(out: Path, *, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out`, flushed and in one step, when the body is done.

    If the body fails, nothing is left. If the process is killed, `out` stays as it was, and the next call
    removes what was left. `overwrite` replaces a model or an earlier result. UsageError: `out` exists or
    overlaps with `source`; CheckpointError: it cannot be written, or the disk is full.
    """
    out = Path(os.path.abspath(out))
    if not out.name:
        raise UsageError(f"{out} cannot be replaced; give another -o")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    made: list[Path] = []
    lock = -1
    try:
        made, lock = _prepare(out, partial, overwrite=overwrite, source=source)
        yield partial
        _install(partial, out, overwrite=overwrite)
    except BaseException as exc:
        error = _write_error(exc, out.parent) if isinstance(exc, OSError) and _concerns(exc, partial) else exc
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for place in made:
                place.rmdir()
        if error is exc:
            raise
        raise error from exc
    finally:
        if lock >= 0:
            os.close(lock)


def _concerns(exc: OSError, partial: Path) -> bool:
    """Whether `exc` says that something in the staging folder cannot be written."""
    below = exc.filename is not None and Path(os.fsdecode(exc.filename)).is_relative_to(partial)
    return below or exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _prepare(out: Path, partial: Path, *, overwrite: bool, source: Path | None) -> tuple[list[Path], int]:
    """Check `out`, make `partial` and lock it; returns the folders above it that were made, and the lock."""
    made: list[Path] = []
    try:
        if source is not None and _overlap(out, source):
            raise UsageError(_line(f"{out} overlaps with the model {source}; choose another -o"))
        _clear_abandoned(out)
        _check_out(out, overwrite=overwrite)
        made = [place for place in out.parents if not place.exists()]
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as exc:
        with suppress(OSError):
            for place in made:
                place.rmdir()
        raise _write_error(exc, out.parent) from exc
    with suppress(OSError):  # a file system without locks
        return made, _lock(partial)
    return made, -1


def _overlap(out: Path, source: Path) -> bool:
    """Whether one folder is or holds the other, or `out` holds a file that `source` links to."""
    target, model = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    files = [Path(os.path.realpath(path)) for path in source.iterdir()] if source.is_dir() else []
    return target.is_relative_to(model) or any(path.is_relative_to(target) for path in (model, *files))


def _check_out(out: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError(_line(f"{out} exists and is not a folder; give another -o"))
    if os.path.ismount(out):
        raise UsageError(_line(f"{out} is a mount point and cannot be replaced; give a folder inside it as -o"))
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(_line(f"{out} exists; give another -o or --overwrite"))
    if not (out / "config.json").exists() and not (out / "abliteration.json").exists():
        raise UsageError(_line(f"{out} exists and holds no model, so --overwrite is refused; give another -o"))


def _install(partial: Path, out: Path, *, overwrite: bool) -> None:
    """Rename `partial` to `out`; with `overwrite`, what is there goes aside and comes back on failure."""
    aside = partial.with_name(partial.name.replace(f".{out.name}.partial-", f".{out.name}.replaced-", 1))
    try:
        _sync_folders(partial, files=True)
        if overwrite and out.exists():
            os.rename(out, aside)
        try:
            os.rename(partial, out)
        except BaseException:
            if aside.exists():
                os.rename(aside, out)
            raise
    except OSError as exc:
        raise _error(f"cannot move the finished model to {out}: {exc.strerror}; choose another -o") from exc
    _sync_and_close(os.open(out.parent, os.O_RDONLY | os.O_CLOEXEC))
    shutil.rmtree(aside, ignore_errors=True)


def _clear_abandoned(out: Path) -> None:
    """Remove what killed runs left beside `out`; put a folder that one had set aside back in its place."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(partial|replaced)-(\d{{1,9}})-[0-9a-f]{{8}}")
    for path in sorted(out.parent.iterdir()) if out.parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if not match or path.is_symlink() or not path.is_dir() or not _abandoned(path, int(match[2])):
            continue
        if match[1] == "replaced" and not os.path.lexists(out):
            os.rename(path, out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _abandoned(folder: Path, pid: int) -> bool:
    """Whether the process that made `folder` is gone; the lock tells where process ids mean nothing."""
    try:
        if pid != os.getpid():
            os.kill(pid, 0)
            return False
    except PermissionError:  # alive, and somebody else's
        return False
    except ProcessLookupError:
        pass
    try:
        os.close(_lock(folder))
    except OSError as exc:
        return not isinstance(exc, BlockingIOError) and pid != os.getpid()
    return True


def _lock(folder: Path) -> int:
    """A descriptor that holds the lock of `folder` until it is closed; BlockingIOError if another has it."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd
