"""An edit taken back: bit for bit from the original's files where they are still there, else by arithmetic.

The files that surgery leaves beside an edited model say what was taken out of every vector. Adding that to the stored
numbers and rounding gives the old ones to within one step of the stored format; most are the same to the last bit.
Tensors that were not edited come back as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from abliterate.edit.weights.edit import one_thread
from abliterate.edit.weights.numbers import Terms, restored, taken
from abliterate.edit.weights.passes import Known, terms_for
from abliterate.edit.weights.tensors import Block, Grid, damaged
from abliterate.edit.weights.undo_files import NAME as UNDO
from abliterate.edit.weights.undo_files import Exceptions, UndoEntry, UndoFile
from abliterate.errors import AbliterateError, CheckpointError, UsageError
from abliterate.files.checkpoint import (
    INDEX_NAME,
    OWN_RESULTS,
    Checkpoint,
    EditedFiles,
    Rewriter,
    TensorReader,
    bytes_to_write,
    ensure_space,
    open_checkpoint,
    sha256,
    staged,
    write_edited,
)
from abliterate.files.formats import PLAIN, layout
from abliterate.files.integrity import check, has_own_index
from abliterate.monitor import Monitor
from abliterate.record import IntegrityPart, PlanPart, Record, UndonePart, read_record

#: The model card, which says that the model was edited.
_CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Restored:
    """What `restore` wrote, and the tensors in it that were computed."""

    files: EditedFiles
    tensors: tuple[str, ...]


def verify_files(out: Path, source: Path | None = None, monitor: Monitor | None = None) -> IntegrityPart:
    """Compare the weights in `out` with those of the original (`source`, or where the record says it was).

    Raises `UsageError` when `out` has no record of edited weights or the original is not there, `CheckpointError` when
    it is another model than the one that was edited.
    """
    record, plan = _edited(out)
    origin = Path(record.model.folder) if source is None else source
    if not origin.is_dir():
        raise UsageError(f"{out}: its original is not at {origin} any more; give its folder with --source")
    with (monitor or Monitor()).phase("compare with the original"):
        original = open_checkpoint(origin)
        for shard in original.shards:
            if sha256(shard.path) != record.model.source_sha256.get(str(shard.path.relative_to(origin))):
                raise CheckpointError(f"{shard.path}: expected the file that was edited, found another; see --source")
        planned = [edit.tensor for edit in plan.edits]
        indexed = INDEX_NAME in plan.files
        edited = open_checkpoint(out)
        found = check(edited, original, planned, extra=plan.copied, recorded=record.output_sha256, indexed=indexed)
    rewritten = {_CARD, *record.left_out}
    if plan.copied or plan.variant.get("untie"):
        rewritten.add("config.json")
    if not indexed or (original.index and has_own_index(edited, original.index)):
        rewritten.add(INDEX_NAME)
    wrong = [name for name, how in found.other_files.items() if how in ("different", "missing")]
    not_original = [name for name in wrong if name not in rewritten]
    return IntegrityPart(
        intact=found.ok and not not_original,
        out=str(out),
        source=str(origin),
        not_original=not_original,
        rewritten=sorted(name for name in rewritten if found.other_files.get(name) == "different"),
        **asdict(found),
    )


def _edited(out: Path) -> tuple[Record, PlanPart]:
    """The record of a model whose weights were edited, and its plan."""
    record = read_record(out)
    if record.plan is None or record.plan.realisation != "weights":
        found = "no plan" if record.plan is None else record.plan.realisation
        raise UsageError(f"{out}: expected a model with edited weights, found {found}")
    return record, record.plan


def undo(
    out: Path,
    *,
    target: Path | None = None,
    source: Path | None = None,
    monitor: Monitor | None = None,
) -> UndonePart:
    """Take back the edit of the model in `out`, in place or into the new folder `target`.

    The original's files are taken from `source`, or from where the record says they were; if they are not there any
    more, or are others, what was edited is computed. `out` stays as it is until the restored model is complete.

    Raises `UsageError` when `out` has no record of edited weights, `CheckpointError`, naming the file, when its weights
    are not those that the record describes, or when `source` is given and is not the model that was edited.
    """
    record, plan = _edited(out)
    edited = open_checkpoint(out)
    _check_hashes(edited, record.output_sha256, "is not as it was written")
    original, reason = _original(record, source)
    monitor = monitor or Monitor()
    place: AbstractContextManager[Path]
    place = staged(out, overwrite=True) if target is None else staged(target, source=out)
    with place as folder:
        if original is None:
            return _computed(edited, plan, folder, monitor).model_copy(
                update={"folder": str(target or out), "reason": reason}
            )
        total = bytes_to_write(original)
        ensure_space(folder, total)
        with monitor.phase("restore", total) as advance:
            files = write_edited(original, folder, {}, progress=advance)
        _check_copies(files, record.model.source_sha256)
        if target is None:
            _carry_along(out, folder, {*plan.files, *record.output_sha256, *files.left_out})
        return UndonePart(folder=str(target or out), exact=True, steps=0, files=list(files.written))


def _computed(edited: Checkpoint, plan: PlanPart, folder: Path, monitor: Monitor) -> UndonePart:
    """Write what the original was into `folder`, computed from what the edit kept."""
    out, total = edited.folder, bytes_to_write(edited)
    ensure_space(folder, total)
    undo_files = [out / name for name in plan.undo]
    if missing := [path for path in undo_files or [out / UNDO] if not path.is_file()]:
        raise CheckpointError(f"{missing[0]}: expected what undo needs, found none; give the original with --source")
    tensors = [edit.tensor for edit in plan.edits]
    with monitor.phase("restore", total) as advance:
        restored_files = restore(edited, undo_files, folder, expected=tensors, progress=advance)
    added = {_CARD}
    if INDEX_NAME in plan.files and len(edited.shards) == 1 and has_own_index(edited):
        added.add(INDEX_NAME)
    for name in added:
        (folder / name).unlink(missing_ok=True)
    return UndonePart(
        folder=str(folder),
        exact=False,
        steps=1,
        files=[name for name in restored_files.files.written if name not in added],
        tensors=list(restored_files.tensors),
        remains=[*plan.copied, *(("config.json",) if plan.copied else ())],
    )


def _carry_along(out: Path, folder: Path, known: Collection[str]) -> None:
    """Copy what somebody else put into `out` since it was written."""
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if name not in known and name not in OWN_RESULTS and name != _CARD and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name)


def restore(
    edited: Checkpoint,
    undo_files: Sequence[Path],
    target: Path,
    *,
    expected: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Restored:
    """Write `edited` with its edit taken back into the empty folder `target`, in one stream, by arithmetic.

    Raises `CheckpointError` when an undo file is damaged or not for these tensors, or those of `expected` are not all
    in them.
    """
    rewriters: dict[str, Rewriter] = {}
    for path in undo_files:
        kept = UndoFile(path)
        for entry in kept.entries:
            rewriters[entry.tensor] = _restorer(_grid(edited, entry, path), entry, kept)
    if missing := [name for name in expected if name not in rewriters]:
        raise CheckpointError(f"{edited.folder}: expected what undo needs of '{missing[0]}', found nothing")
    with one_thread():
        files = write_edited(edited, target, rewriters, progress=progress)
    return Restored(files, tuple(rewriters))


def _grid(edited: Checkpoint, entry: UndoEntry, path: Path) -> Grid:
    info = edited.tensors.get(entry.tensor)
    if info is None:
        raise CheckpointError(f"{path}: expected tensor '{entry.tensor}' in {edited.folder}, found none of that name")
    how = layout(edited, info)
    if (how.format, how.shape) != (entry.format, entry.shape):
        raise CheckpointError(
            f"tensor '{info.name}' in {info.file}: expected {entry.format} {list(entry.shape)} as {path} says, found "
            f"{how.format} {list(how.shape)}"
        )
    return Grid.of(how, entry.axis)


def _restorer(grid: Grid, entry: UndoEntry, kept: UndoFile) -> Rewriter:
    def rewrite(reader: TensorReader) -> Iterator[memoryview]:
        new, u, spare = grid.buffers(3)
        terms_of, exceptions = _terms(grid, entry, kept), kept.exceptions(entry)
        for matrix in range(grid.matrices):
            for block in grid.blocks(matrix):
                numbers = grid.numbers(grid.read(reader, block), block, new)
                terms = terms_of(matrix, block)
                restored(numbers, taken(terms, u[: block.count], spare[: block.count]), terms)
                stored = _with_exceptions(grid, block, _encoded(grid, block, numbers, reader), exceptions)
                data: memoryview = stored.view(torch.uint8).numpy().data
                yield data

    return rewrite


def _terms(grid: Grid, entry: UndoEntry, kept: UndoFile) -> Callable[[int, Block], Terms]:
    """What was done to each block, as surgery had it."""
    basis, offset, known = kept.array(entry.basis), kept.array(f"{entry.key}.offset"), kept.known(entry)
    if basis is None:
        raise CheckpointError(f"{kept.path}: expected the basis of '{entry.tensor}', found none")
    width, vectors = (grid.columns, grid.rows) if grid.in_rows else (grid.rows, grid.columns)
    k = len(basis) if basis.dim() else 0
    for name, found, shape in (
        ("basis", basis, (k, width)),
        ("removed", known.removed, (grid.matrices, k, vectors)),
        ("scales", known.scale, (grid.matrices, vectors)),
        ("offset", offset, (width,)),
    ):
        if found is not None and not (found.shape == shape and found.is_floating_point() and _is_finite(found)):
            raise CheckpointError(
                f"{kept.path}: expected finite '{name}' {list(shape)} for '{entry.tensor}', found others"
            )
    wide = basis.to(grid.dtype)
    constant = None if offset is None else offset.to(grid.dtype)[None]

    def terms_of(matrix: int, block: Block) -> Terms:
        part = block.rows if grid.in_rows else slice(None)
        scale = None if known.scale is None else known.scale[matrix, part]
        here = Known(known.removed[matrix][:, part], scale)
        return terms_for(grid, block, wide, here, entry.strength, constant)

    return terms_of


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def _encoded(grid: Grid, block: Block, numbers: Tensor, reader: TensorReader) -> Tensor:
    """The bytes of restored numbers; what rounding would make infinite is the largest number."""
    limit = torch.finfo(PLAIN.get(grid.layout.format, numbers.dtype)).max
    if not bool(torch.isfinite(numbers.clamp_(-limit, limit)).all()):
        raise damaged(reader.info)
    return grid.encode(numbers, block)


def _with_exceptions(grid: Grid, block: Block, stored: Tensor, exceptions: Exceptions) -> Tensor:
    """The bytes of a block with what cannot be computed in its place."""
    start = block.first * grid.columns
    places, codes = exceptions.between(start, start + block.count * grid.columns)
    if not len(places):
        return stored
    whole = grid.codes(stored)
    whole.view(-1)[places] = codes
    return grid.packed(whole)


def _original(record: Record, source: Path | None) -> tuple[Checkpoint | None, str | None]:
    """The model that was edited, if its files are there and are the same; else why not."""
    if source is None and not record.model.folder:
        return None, "the record does not say where the original was"
    folder = source or Path(record.model.folder)
    try:
        found = open_checkpoint(folder)
        _check_hashes(found, record.model.source_sha256, "is not the one that was edited")
    except AbliterateError as error:
        if source is not None:
            raise
        return None, str(error)
    return found, None


def _check_hashes(found: Checkpoint, expected: Mapping[str, str], wrong: str) -> None:
    """Check that the shards are exactly those with these hashes."""
    if not expected:
        raise UsageError(
            f"{found.folder}: expected a record with hashes of the files, found none; files cannot be trusted"
        )
    shards = {str(shard.path.relative_to(found.folder)): shard.path for shard in found.shards}
    for name in sorted(shards.keys() | expected.keys()):
        if name not in shards or name not in expected:
            what = "is missing" if name in expected else "is not known to the record"
            raise CheckpointError(f"{found.folder / name}: {what}; expected {', '.join(sorted(expected)[:4])}")
        if sha256(shards[name]) != expected[name]:
            raise CheckpointError(f"{shards[name]}: {wrong}: expected SHA-256 {expected[name]}")


def _check_copies(files: EditedFiles, expected: Mapping[str, str]) -> None:
    for name, digest in expected.items():
        if files.sha256[name] != digest:
            raise CheckpointError(f"{name}: changed while it was copied: expected SHA-256 {digest}; try again")
