"""Whether an edited checkpoint differs from its source where it was meant to, and nowhere else.

Both folders are read once from front to back, a few megabytes at a time, however their tensors are dealt out to files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from abliterate.errors import UsageError
from abliterate.files.checkpoint import INDEX_NAME, Checkpoint, Shard, TensorInfo, TensorReader, sha256
from abliterate.files.checkpoint.outputs import index_of, other_files
from abliterate.files.checkpoint.reading import INDEX, open_source

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Integrity:
    """How a checkpoint compares with its source. Names of tensors and files are sorted.

    `changed` and `unchanged` are the planned tensors whose bytes differ and do not. `damaged` are tensors outside the
    plan that differ, `reshaped` those of another dtype or shape, `missing` and `extra` those in one folder only.
    `headers` are shards in both folders that hold the same tensors under different headers. `sha256` are the hashes of
    the shards, `wrong_hashes` the shards whose hash is not the recorded one, or that are missing or not recorded.
    `other_files` says of every file beside the shards: "equal", "different", "missing" or "extra".
    """

    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    damaged: tuple[str, ...]
    reshaped: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    headers: tuple[str, ...]
    sha256: Mapping[str, str]
    wrong_hashes: tuple[str, ...]
    other_files: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether every tensor outside the plan is as in the source and every recorded hash is right.

        A flipped bit in a planned tensor shows only in a hash, so `ok` covers those where hashes were recorded.
        """
        wrong = (self.damaged, self.reshaped, self.missing, self.extra, self.headers, self.wrong_hashes)
        return not any(wrong)


def check(
    new: Checkpoint,
    old: Checkpoint,
    planned: Collection[str],
    *,
    extra: Mapping[str, str] | None = None,
    recorded: Mapping[str, str] | None = None,
    indexed: bool = False,
) -> Integrity:
    """Compare the checkpoint `new` with the one that it was made from, byte by byte.

    `planned` names the tensors that may differ. `extra` names tensors that were added, each with the tensor of
    `old` whose bytes it must have. `recorded` has the SHA-256 of the shards of `new` by file name. `indexed`: it was
    written with an index, so one that `old` does not have must be there and be right.

    Raises `UsageError` when `planned` or `extra` names a tensor that `old` does not have.
    """
    added = dict(extra or {})
    if unknown := sorted({*planned, *added.values()} - old.tensors.keys()):
        raise UsageError(f"tensor '{unknown[0]}': expected one of {old.folder}, found none; check what was planned")
    origins = {name: old.tensors.get(added.get(name, name)) for name in new.tensors}
    reshaped = {name for name, origin in origins.items() if origin and not same_layout(new.tensors[name], origin)}
    different, hashes = _compare(new, origins)
    return Integrity(
        changed=_sorted(different & set(planned)),
        unchanged=_sorted(new.tensors.keys() & set(planned) - different - reshaped),
        damaged=_sorted(different - set(planned)),
        reshaped=_sorted(reshaped),
        missing=_sorted({*old.tensors, *added} - new.tensors.keys()),
        extra=_sorted(name for name, origin in origins.items() if origin is None),
        headers=_sorted(_other_headers(new, old)),
        sha256=hashes,
        wrong_hashes=_sorted(_wrong(hashes, recorded)) if recorded is not None else (),
        other_files=_other_files(new, old, indexed=indexed),
    )


def has_own_index(edited: Checkpoint, like: Path | None = None) -> bool:
    """Whether the index of `edited` is the one an edit makes for these shards where the source's is `like`."""
    path = edited.folder / INDEX_NAME
    return path.is_file() and INDEX.read(path) == index_of(edited, like)


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names))


def same_layout(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two tensors have one dtype and shape."""
    return (a.dtype, a.shape) == (b.dtype, b.shape)


def _compare(new: Checkpoint, origins: Mapping[str, TensorInfo | None]) -> tuple[set[str], dict[str, str]]:
    """Names of the tensors whose bytes differ from their origin's, and the hashes of the shards."""
    different: set[str] = set()
    hashes: dict[str, str] = {}
    with _Readers() as readers:
        for shard in new.shards:
            digest = hashlib.sha256(_header(shard))
            for name, info in shard.tensors.items():
                origin = origins[name]
                known = readers.of(origin) if origin and same_layout(info, origin) else None
                if not _same(readers.of(info), known, digest.update):
                    different.add(name)
            hashes[_name(new, shard)] = digest.hexdigest()
    return different, hashes


def _same(new: TensorReader, old: TensorReader | None, see: Callable[[bytearray], None]) -> bool:
    """Whether two tensors have the same bytes; `see` gets all those of the first, whatever comes out."""
    same = True
    for start in range(0, new.info.nbytes, _PIECE):
        count = min(_PIECE, new.info.nbytes - start)
        piece = new.read(start, count)
        see(piece)
        same = same and (old is None or piece == old.read(start, count))
    return same


class _Readers:
    """Readers of tensors; every file is opened once, and all are closed at the end."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def of(self, info: TensorInfo) -> TensorReader:
        if info.file not in self._open:
            self._open[info.file] = open_source(info.file)
        return TensorReader(info, self._open[info.file])


def _header(shard: Shard) -> bytes:
    with open(open_source(shard.path), "rb") as file:
        return file.read(shard.header_bytes)


def _name(checkpoint: Checkpoint, shard: Shard) -> str:
    return str(shard.path.relative_to(checkpoint.folder))


def _other_headers(new: Checkpoint, old: Checkpoint) -> Iterator[str]:
    """Shards of one name with the same tensors in the same order, but other bytes in the header."""
    before = {_name(old, shard): shard for shard in old.shards}
    for shard in new.shards:
        name = _name(new, shard)
        if name in before and _contents(shard) == _contents(before[name]) and _header(shard) != _header(before[name]):
            yield name


def _contents(shard: Shard) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(info.name, info.dtype, info.shape) for info in shard.tensors.values()]


def _wrong(hashes: Mapping[str, str], recorded: Mapping[str, str]) -> Iterator[str]:
    for name in {*hashes, *recorded}:
        if hashes.get(name) != recorded.get(name):
            yield name


def _other_files(new: Checkpoint, old: Checkpoint, *, indexed: bool) -> dict[str, str]:
    after, before = (
        {str(path.relative_to(checkpoint.folder)): path for path in other_files(checkpoint)[0]}
        for checkpoint in (new, old)
    )
    found = {}
    for name in sorted({*after, *before}):
        if name not in before or name not in after:
            found[name] = "extra" if name in after else "missing"
        else:
            found[name] = "equal" if sha256(after[name]) == sha256(before[name]) else "different"
    if indexed and old.index is None:  # also one that the shards are not found by any more
        there = (new.folder / INDEX_NAME).exists()
        found[INDEX_NAME] = "missing" if not there else "extra" if has_own_index(new) else "different"
    return found
