"""An edited copy of a checkpoint: every file is written once, front to back, hashed on the way and flushed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from abliterate.errors import UsageError
from abliterate.files.checkpoint.growing import GrowingFile, Trail, sync_folders, sync_path
from abliterate.files.checkpoint.journal import Finished, Journal, Note
from abliterate.files.checkpoint.messages import OUR_FAULT, damaged, error, short, write_error
from abliterate.files.checkpoint.outputs import Changes, Output, Outputs, Span, plan_outputs
from abliterate.files.checkpoint.reading import Checkpoint, Shard, TensorReader, open_source, sha256
from abliterate.files.checkpoint.staging import overlap
from abliterate.texts import printable

Chunk: TypeAlias = bytes | bytearray | memoryview
Rewriter: TypeAlias = Callable[[TensorReader], Iterable[Chunk]]
"""Yields the new bytes of a tensor in order, `info.nbytes` of them in all."""

Noter: TypeAlias = Callable[[str, tuple[str, ...]], Note]
"""Called with the name of a file just written and its rewritten tensors; what it returns stays with the file."""


@dataclass(frozen=True, slots=True)
class EditedFiles:
    """What `write_edited` wrote and left out (names relative to the folder), and the bytes written.

    `sha256` has the hash of every file written, `source_sha256` that of every shard of the source, `companion_sha256`
    that of every other file of the source that came along. `links` are those of `left_out` that lead out of the folder
    and were not followed. `notes` are the values noted for the files with rewritten tensors, in the order of the files,
    whether this run wrote them or an earlier one that was killed; `kept` names the files of the latter.
    """

    written: tuple[str, ...]
    left_out: tuple[str, ...]
    nbytes: int
    sha256: Mapping[str, str] = field(default_factory=dict)
    source_sha256: Mapping[str, str] = field(default_factory=dict)
    companion_sha256: Mapping[str, str] = field(default_factory=dict)
    links: tuple[str, ...] = ()
    notes: tuple[Any, ...] = ()
    kept: tuple[str, ...] = ()


def bytes_to_write(source: Checkpoint, changes: Changes | None = None) -> int:
    """Bytes of all files that `write_edited` puts into its folder."""
    return plan_outputs(source, changes or Changes()).nbytes


def write_edited(
    source: Checkpoint,
    target: Path,
    rewriters: Mapping[str, Rewriter],
    *,
    changes: Changes | None = None,
    journal: Journal | None = None,
    note: Noter | None = None,
    progress: Callable[[int], None] | None = None,
) -> EditedFiles:
    """Copy the folder of `source` into the empty folder `target`, with the named tensors rewritten.

    Headers, all other tensors and all other files come along byte for byte, except for `changes`; links inside
    the folder (and into the hub's cache) become files. Left out: hidden folders and, listed in the result, other copies
    of the weights, an earlier run's results, and links that lead out.
    Every file is on disk when this returns. `progress` is called with the bytes written since its last call.

    With the `journal` of a `resumable` run, files that it holds are in `target` and not written again. `note` is
    called when a file with rewritten tensors is written, before the next one is begun, so what rewriters gathered
    since the last call belongs to this file alone; its value is kept in the journal.

    Hashing keeps one more core busy for what is written, and one for the source.
    """
    outputs = plan_outputs(source, changes or Changes())
    _check(source, target, rewriters, journal)
    run = _Run(source, target, rewriters, journal, note, progress)
    run.remaining = outputs.nbytes
    try:
        finished, hashes = run.write(outputs)
        sync_folders(target)
    except OSError as exc:
        raise write_error(exc, target, run.remaining) from exc
    edited = [output.name for output in outputs.files if _rewritten(output, rewriters)]
    return EditedFiles(
        written=tuple(output.name for output in outputs.files),
        left_out=outputs.left_out,
        nbytes=outputs.nbytes,
        sha256={output.name: finished[output.name].sha256 for output in outputs.files},
        source_sha256=hashes,
        companion_sha256={copy.name: _hash_of(copy, outputs, finished) for copy in outputs.companions},
        links=outputs.links,
        notes=tuple(finished[name].note for name in edited),
        kept=tuple(run.kept),
    )


def _hash_of(copy: Output, outputs: Outputs, finished: Mapping[str, Finished]) -> str:
    """The hash of a file of the source beside the shards: that of its copy, where it came along as it is."""
    return finished[copy.name].sha256 if copy in outputs.files or copy.like is None else sha256(copy.like)


def _check(source: Checkpoint, target: Path, rewriters: Mapping[str, Rewriter], journal: Journal | None) -> None:
    if unknown := sorted(rewriters.keys() - source.tensors.keys()):
        raise error(f"{source.folder} has no tensor {short(unknown[0])}; {OUR_FAULT}")
    if not target.is_dir() or (journal is None and any(target.iterdir())):
        raise error(f"{target} is not an empty folder; choose another -o")
    if journal and target != journal.folder:
        raise error(f"{target} is not the folder of the journal in {journal.place}; {OUR_FAULT}")
    if overlap(target, source.folder):
        raise UsageError(printable(f"{target} overlaps with the model {source.folder}; choose another -o"))


def _rewritten(output: Output, rewriters: Mapping[str, Rewriter]) -> tuple[str, ...]:
    tensors = (span.tensor.name for span in output.spans if span.tensor)
    return tuple(name for name in tensors if name in rewriters)


@dataclass(slots=True)
class _Run:
    """One call of `write_edited`."""

    source: Checkpoint
    target: Path
    rewriters: Mapping[str, Rewriter]
    journal: Journal | None
    note: Noter | None
    progress: Callable[[int], None] | None
    remaining: int = 0
    kept: list[str] = field(default_factory=list)

    def write(self, outputs: Outputs) -> tuple[dict[str, Finished], dict[str, str]]:
        """Write what the journal does not hold; the entries of all files, and the hashes of the source's shards."""
        finished = dict(self.journal.finished) if self.journal else {}
        pending: list[tuple[str, Future[Finished]]] = []
        with _Threads() as threads, self._other_hashes(outputs) as hashes:
            for output in outputs.files:
                if output.name in finished:
                    self.kept.append(output.name)
                    self._step(output.nbytes)
                    continue
                pending.append((output.name, self._write_file(output, threads)))
                if len(pending) > 1:  # one file is finished while the next is written
                    name, future = pending.pop(0)
                    finished[name] = future.result()
            finished |= {name: future.result() for name, future in pending}
            found = {name: trail.digest() for name, trail in hashes.items()}
        for output in outputs.files:
            if output.original and (digest := finished[output.name].source_sha256):
                found[output.name] = digest
        return finished, {name: found[name] for name in map(self._name, self.source.shards)}

    def _name(self, shard: Shard) -> str:
        return str(shard.path.relative_to(self.source.folder))

    def _step(self, count: int) -> None:
        self.remaining -= count
        if self.progress:
            self.progress(count)

    @contextmanager
    def _other_hashes(self, outputs: Outputs) -> Iterator[dict[str, Trail]]:
        """Hashes of shards whose layout no file of the copy has: they are read once more for that."""
        same = {output.original for output in outputs.files}
        with ThreadPoolExecutor(1) as pool, _Sources(self.source) as sources, ExitStack() as stack:
            trails: dict[str, Trail] = {}
            for shard in self.source.shards:
                if shard.path not in same:
                    trail = stack.enter_context(Trail(pool, sources.fd(shard.path), shard.path))
                    trail.tell(shard.file_bytes)
                    trail.end()
                    trails[self._name(shard)] = trail
            yield trails

    def _write_file(self, output: Output, threads: _Threads) -> Future[Finished]:
        """Write the bytes of a file; what comes back is finished when it is hashed, on disk and in the journal."""
        path = self.target / output.name
        path.parent.mkdir(parents=True, exist_ok=True)
        rewritten = _rewritten(output, self.rewriters)
        with ExitStack() as stack:
            sources = stack.enter_context(_Sources(self.source))
            file = stack.enter_context(GrowingFile(path, _mode(output.like), threads.flusher, self._step))
            trails = [stack.enter_context(Trail(threads.hashers, file.fd, path))]
            if output.original and rewritten:
                trails.append(stack.enter_context(Trail(threads.hashers, sources.fd(output.original), output.original)))
            for trail in trails:
                file.follow(trail)
            file.write(memoryview(output.head))
            for span in output.spans:
                self._write_span(file, span, sources.fd(span.path))
            file.end()
            note = self.note(output.name, rewritten) if self.note and rewritten else Note()
            held = stack.pop_all()
        return threads.finisher.submit(self._finish, output, held, file, trails, note)

    def _write_span(self, file: GrowingFile, span: Span, src: int) -> None:
        if span.tensor is None or span.tensor.name not in self.rewriters:
            file.copy(src, span.start, span.end, span.path)
            return
        info, done = span.tensor, 0
        for chunk in self.rewriters[info.name](TensorReader(info, src)):
            view = memoryview(chunk).cast("B")
            done += len(view)
            if done > info.nbytes:
                break
            file.write(view)
        if done != info.nbytes:
            wrong = f"{info.nbytes} bytes expected, {'more' if done > info.nbytes else done} given"
            raise error(f"{info.file}: tensor {short(info.name)} rewritten wrongly: {wrong}; {OUR_FAULT}")

    def _finish(self, output: Output, held: ExitStack, file: GrowingFile, trails: list[Trail], note: Note) -> Finished:
        with held:
            digests = [trail.digest() for trail in trails]
            file.sync()
        for path in note.files:
            sync_path(path)
        files = {self.journal.relative(path): path.stat().st_size for path in note.files} if self.journal else {}
        source = digests[-1] if output.original else None
        value = json.loads(json.dumps(note.value))  # the same now as after a kill
        entry = Finished(output.nbytes, digests[0], source, value, files)
        if self.journal:
            self.journal.add(output.name, entry)
        return entry


class _Threads:
    """The threads that work behind the one that writes: two that hash, one that flushes, one that ends files."""

    def __init__(self) -> None:
        self.hashers = ThreadPoolExecutor(2, "hash")
        self.flusher = ThreadPoolExecutor(1, "flush")
        self.finisher = ThreadPoolExecutor(1, "finish")

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self.finisher, self.flusher, self.hashers):
            pool.shutdown()


class _Sources:
    """Files of the source, each opened once and closed at the end; a shard must have the size it had."""

    def __init__(self, source: Checkpoint) -> None:
        self._sizes = {shard.path: shard.file_bytes for shard in source.shards}
        self._open: dict[Path, int] = {}

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def fd(self, path: Path) -> int:
        """A descriptor to read `path`."""
        if path not in self._open:
            self._open[path] = open_source(path)
            size = os.fstat(self._open[path]).st_size
            if size != self._sizes.get(path, size):
                raise damaged(path, f"it had {self._sizes[path]} bytes and now has {size}")
        return self._open[path]


def _mode(like: Path | None) -> int | None:
    """The mode of a copy of `like`, which its owner can always read and replace."""
    return None if like is None else os.stat(like).st_mode & 0o777 | stat.S_IRUSR | stat.S_IWUSR
