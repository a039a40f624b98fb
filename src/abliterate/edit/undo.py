"""An edit taken back: bit for bit from the original's files where they are still there, else by arithmetic.

The files that surgery leaves beside an edited model say what was taken out of every vector. Adding that to the stored
numbers and rounding gives the old ones to within one step of the stored format; most are the same to the last bit.
Tensors that were not edited come back as they are.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

import torch
from jaxtyping import Int
from torch import Tensor

from abliterate.edit.weights.edit import one_thread
from abliterate.edit.weights.numbers import Terms, restored, taken
from abliterate.edit.weights.passes import Known, terms_for
from abliterate.edit.weights.tensors import Block, Grid, damaged
from abliterate.edit.weights.undo_files import NAME as UNDO
from abliterate.edit.weights.undo_files import Exceptions, UndoEntry, UndoFile
from abliterate.edit.write import untied_config
from abliterate.errors import AbliterateError, CheckpointError, UsageError
from abliterate.files.atomic import new_file
from abliterate.files.checkpoint import (
    CARD,
    FRONT,
    INDEX_NAME,
    OWN_RESULTS,
    Changes,
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
from abliterate.files.checkpoint.links import leads_out
from abliterate.files.checkpoint.reading import CONFIG, open_source
from abliterate.files.formats import PLAIN, layout
from abliterate.files.integrity import check, has_own_index
from abliterate.files.local import is_sealed
from abliterate.monitor import Monitor
from abliterate.record import (
    FILE_NAME,
    IntegrityPart,
    PlanPart,
    Record,
    UndonePart,
    companion,
    read_record,
    sealed_parts,
)

#: What the hub and its client put beside what was uploaded: which files it stores apart, and when each was fetched.
_HUB_FILE = re.compile(r"\.gitattributes|\.cache/huggingface/(\.gitignore|CACHEDIR\.TAG|download/.*\.(metadata|lock))")


@dataclass(slots=True)
class Measured:
    """Numbers of the original that were `compared` with restored ones, and how many of them are `equal`."""

    compared: int = 0
    equal: int = 0

    def see(self, entry: UndoEntry, steps: Int[Tensor, " n"]) -> None:
        """Add how many steps apart some are; raises `CheckpointError` when one is more than a step away."""
        self.compared += len(steps)
        self.equal += int((steps == 0).sum())
        if len(steps) and int(steps.max()) > 1:
            raise CheckpointError(
                f"tensor '{entry.tensor}': restored numbers are {int(steps.max())} steps of the stored format from the "
                "original's; the undo file is another run's, give the original with --source"
            )


@dataclass(frozen=True, slots=True)
class Restored:
    """What `restore` wrote, the tensors in it that were computed, and how they compare with the original."""

    files: EditedFiles
    tensors: tuple[str, ...]
    measured: Measured


def verify_files(out: Path, source: Path | None = None, monitor: Monitor | None = None) -> IntegrityPart:
    """Compare the files in `out` with those of the original (`source`, or where the record says it was).

    Every file in `out` must be the original's, byte for byte, or a result of this program with the hash that the record
    has of it; what the record says of other files excuses nothing.

    Raises `UsageError` when `out` has no record of edited weights or the original is not there, `CheckpointError` when
    it is another model than the one that was edited.
    """
    record, plan = _edited(out)
    origin = Path(record.model.folder) if source is None else source
    if not origin.is_dir():
        raise UsageError(f"{out}: its original is not at {origin} any more; give its folder with --source")
    with (monitor or Monitor()).phase("compare with the original"):
        original = open_checkpoint(origin, stale_index=True)
        for shard in original.shards:
            if sha256(shard.path) != record.model.source_sha256.get(str(shard.path.relative_to(origin))):
                raise CheckpointError(f"{shard.path}: expected the file that was edited, found another; see --source")
        planned = [edit.tensor for edit in plan.edits]
        indexed = INDEX_NAME in plan.files
        edited = open_checkpoint(out)
        found = check(edited, original, planned, extra=plan.copied, recorded=record.output_sha256, indexed=indexed)
        beside = _Beside.of(edited, original, record, found.other_files, indexed=indexed)
    return IntegrityPart(
        intact=found.ok and beside.ok,
        proved=bool(record.files),
        out=str(out),
        source=str(origin),
        not_original=beside.not_original,
        unknown=beside.unknown,
        of_hub=beside.of_hub,
        changed_files=beside.changed,
        rewritten=sorted(name for name in beside.rewritten if found.other_files.get(name) == "different"),
        **asdict(found),
    )


@dataclass(frozen=True, slots=True)
class _Beside:
    """What is wrong with the files beside the weights (see `IntegrityPart`), and which ones the edit may rewrite."""

    proved: bool
    rewritten: frozenset[str]
    not_original: list[str]
    unknown: list[str]
    of_hub: list[str]
    changed: list[str]

    @property
    def ok(self) -> bool:
        return self.proved and not (self.not_original or self.unknown or self.changed)

    @classmethod
    def of(
        cls, edited: Checkpoint, original: Checkpoint, record: Record, compared: Mapping[str, str], *, indexed: bool
    ) -> _Beside:
        out, recorded = edited.folder, record.files
        rewritten = frozenset({CARD, *_remade(edited, original, compared, indexed=indexed)})
        wrong = [name for name, how in compared.items() if how in ("different", "missing")]
        shards = {str(shard.path.relative_to(out)) for shard in edited.shards}
        ours = {name for name in _names(out) if _is_result(name)} | rewritten | shards
        same = {name for name, how in compared.items() if how in ("equal", "different")}
        unknown = {name for name in _names(out) if name not in ours | same or not _is_own(out / name, out)}
        if recorded:
            unknown |= _names(out) - recorded.keys() - {FILE_NAME}
        changed = [
            name
            for name, digest in recorded.items()
            if name not in shards and not (_is_own(out / name, out) and sha256(out / name) == digest)
        ]
        not_original = sorted(name for name in wrong if name not in rewritten)
        of_hub = {name for name in unknown if _HUB_FILE.fullmatch(name) and _is_own(out / name, out)}
        return cls(bool(recorded), rewritten, not_original, sorted(unknown - of_hub), sorted(of_hub), sorted(changed))


def _remade(edited: Checkpoint, original: Checkpoint, compared: Mapping[str, str], *, indexed: bool) -> Iterator[str]:
    """Files of the original that an edit makes anew, where they are what it makes."""
    config, index = edited.folder / "config.json", edited.folder / INDEX_NAME
    if compared.get(config.name) == "different" and CONFIG.read(config) == untied_config(original.folder):
        yield config.name
    if has_own_index(edited, original.index) or (not indexed and compared.get(INDEX_NAME) == "missing"):
        yield index.name


def _is_result(name: str) -> bool:
    """Whether a file is one that `run` and `apply` leave beside a model, by its name."""
    path = PurePath(name)
    return name in OWN_RESULTS or name == CARD or (path.parts[:-1] == (FRONT,) and path.suffix == ".safetensors")


def _names(out: Path) -> set[str]:
    """Everything in a folder that is no folder, hidden or not; links to folders too."""
    found = set()
    for parent, folders, files in os.walk(out):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found |= {str(Path(parent, name).relative_to(out)) for name in (*files, *links)}
    return found


def _is_own(path: Path, out: Path) -> bool:
    """Whether a file of OUT is a regular file, in OUT or in the hub's cache that it lies in."""
    return path.is_file() and not leads_out(path, out)


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
    confirm: Callable[[Path], bool] | None = None,
    monitor: Monitor | None = None,
) -> UndonePart:
    """Take back the edit of the model in `out`, in place or into the new folder `target`.

    The original's files are taken from `source`; or from where the record says they were, if it is this user's own
    record on this machine, or `confirm`, asked with that folder, says so. If they are not there any more, or are
    others, what was edited is computed. Only files that the record lists come along; what somebody has put into `out`
    stays there in place. `out` stays as it is until the restored model is complete.

    Raises `UsageError` when `out` has no record of edited weights; `CheckpointError`, naming the file, when its files
    are not those that the record describes, when `source` is given and is not the model that was edited, or when what
    is restored is measured not to be the original.
    """
    record, plan = _edited(out)
    edited = open_checkpoint(out)
    _check_hashes(edited, record.output_sha256, "is not as it was written")
    for name in plan.undo:
        if os.path.lexists(out / name):  # another run's says that this is not what was written, needed or not
            companion(out, record, name)
    original, reason = _original(record, source, confirm)
    monitor = monitor or Monitor()
    place: AbstractContextManager[Path]
    place = staged(out, overwrite=True) if target is None else staged(target, source=out)
    others = _strangers(out, record, plan) if target is None else []
    with place as folder:
        if original is None:
            done = _computed(edited, record, plan, folder, monitor)
        else:
            done = _copied(original, record, folder, out, monitor)
        others = [name for name in others if not os.path.lexists(folder / name)]
        _keep(out, others, folder)
        return done.model_copy(update={"folder": str(target or out), "reason": reason, "others": others})


def _copied(original: Checkpoint, record: Record, folder: Path, out: Path, monitor: Monitor) -> UndonePart:
    """Write the original's files that the record lists into `folder`."""
    changes = Changes(only=record.model.companion_sha256 or None)
    total = bytes_to_write(original, changes)
    ensure_space(folder, total)
    with monitor.phase("restore", total) as advance:
        files = write_edited(original, folder, {}, changes=changes, progress=advance)
    _check_copies(files, record.model.source_sha256)
    _complete(record, files, folder, out)
    names = dict.fromkeys((*files.written, *record.model.companion_sha256))
    return UndonePart(folder=str(folder), exact=True, steps=0, files=list(names))


def _strangers(out: Path, record: Record, plan: PlanPart) -> list[str]:
    """What somebody put into `out` since it was written: neither a result nor in any list of the record."""
    known = {*record.files, *plan.files, *record.output_sha256, *record.left_out, *record.model.companion_sha256}
    return sorted(name for name in _names(out) if name not in known and not _is_result(name))


def _keep(out: Path, names: Sequence[str], folder: Path) -> None:
    """Let files of `out` stay where they are in the folder that takes its place; links stay links."""
    for name in names:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (out / name).is_symlink():
            os.symlink(os.readlink(out / name), place)
            continue
        _copy(out / name, place)


def _copy(file: Path, place: Path) -> None:
    """A file of OUT at a new place, whatever its size."""
    with open(open_source(file), "rb") as old, open(new_file(place), "wb") as new:
        shutil.copyfileobj(old, new)


def _complete(record: Record, files: EditedFiles, folder: Path, out: Path) -> None:
    """Check the files beside the weights; one that has changed since is taken from `out`, if it still is there."""
    for name, digest in record.model.companion_sha256.items():
        if files.sha256.get(name) == digest:
            continue
        kept = out / name
        if not _is_own(kept, out) or sha256(kept) != digest:
            raise CheckpointError(f"{name}: is not what it was when the model was edited, neither here nor there")
        (folder / name).unlink(missing_ok=True)
        _copy(kept, folder / name)


def _computed(edited: Checkpoint, record: Record, plan: PlanPart, folder: Path, monitor: Monitor) -> UndonePart:
    """Write what the original was into `folder`, computed from what the edit kept."""
    out = edited.folder
    names = _listed(record, plan)
    undo_files = [out / name for name in plan.undo]
    if missing := [path for path in undo_files or [out / UNDO] if not path.is_file()]:
        raise CheckpointError(f"{missing[0]}: expected what undo needs, found none; give the original with --source")
    for name in (*plan.undo, *(names or ())):
        companion(out, record, name)
    total = bytes_to_write(edited, Changes(only=names))
    ensure_space(folder, total)
    tensors = [edit.tensor for edit in plan.edits]
    with monitor.phase("restore", total) as advance:
        restored_files = restore(edited, undo_files, folder, expected=tensors, only=names, progress=advance)
    added = {CARD}
    if INDEX_NAME in plan.files and len(edited.shards) == 1 and has_own_index(edited):
        added.add(INDEX_NAME)
    for name in added:
        (folder / name).unlink(missing_ok=True)
    exact = {name: restored_files.files.sha256.get(name) for name in record.model.source_sha256}
    measured = restored_files.measured
    same = exact == record.model.source_sha256
    return UndonePart(
        folder=str(folder),
        exact=same,
        steps=0 if same else 1 if measured.compared else None,
        compared=measured.compared,
        equal=measured.equal,
        files=[name for name in restored_files.files.written if name not in added],
        tensors=list(restored_files.tensors),
        remains=[*plan.copied, *(("config.json",) if plan.copied else ())],
    )


def _listed(record: Record, plan: PlanPart) -> frozenset[str] | None:
    """The files beside the weights that the original had; None where an earlier version's record does not say."""
    if record.model.companion_sha256:
        return frozenset(record.model.companion_sha256) - {CARD}
    return frozenset(plan.files) - {CARD} if plan.files else None


def restore(
    edited: Checkpoint,
    undo_files: Sequence[Path],
    target: Path,
    *,
    expected: Sequence[str] = (),
    only: Collection[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Restored:
    """Write `edited` with its edit taken back into the empty folder `target`, in one stream, by arithmetic.

    Of the files beside the weights `only` those named come along. What is restored is compared with the numbers of the
    original that were kept for that.

    Raises `CheckpointError` when an undo file is damaged or not for these tensors, those of `expected` are not all in
    them, or a number that was kept is more than one step from what is restored.
    """
    rewriters: dict[str, Rewriter] = {}
    measured = Measured()
    for path in undo_files:
        kept = UndoFile(path)
        for entry in kept.entries:
            rewriters[entry.tensor] = _restorer(_grid(edited, entry, path), entry, kept, measured)
    if missing := [name for name in expected if name not in rewriters]:
        raise CheckpointError(f"{edited.folder}: expected what undo needs of '{missing[0]}', found nothing")
    with one_thread():
        files = write_edited(edited, target, rewriters, changes=Changes(only=only), progress=progress)
    return Restored(files, tuple(rewriters), measured)


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


def _restorer(grid: Grid, entry: UndoEntry, kept: UndoFile, measured: Measured) -> Rewriter:
    def rewrite(reader: TensorReader) -> Iterator[memoryview]:
        new, u, spare = grid.buffers(3)
        terms_of, exceptions, sample = _terms(grid, entry, kept), kept.exceptions(entry), kept.sample(entry)
        for matrix in range(grid.matrices):
            for block in grid.blocks(matrix):
                numbers = grid.numbers(grid.read(reader, block), block, new)
                terms = terms_of(matrix, block)
                restored(numbers, taken(terms, u[: block.count], spare[: block.count]), terms)
                stored = _with_exceptions(grid, block, _encoded(grid, block, numbers, reader), exceptions)
                if sample is not None:
                    measured.see(entry, sample.steps(grid.codes(stored), block.first * grid.columns))
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


def _original(
    record: Record, source: Path | None, confirm: Callable[[Path], bool] | None
) -> tuple[Checkpoint | None, str | None]:
    """The model that was edited, if its files are there and are the same and a user named its folder; else why not."""
    if source is None and not record.model.folder:
        return None, "the record does not say where the original was"
    folder = source or Path(record.model.folder)
    named = source is not None or is_sealed(record.model.seal, *sealed_parts(record.model))
    if not named and not (confirm is not None and folder.is_dir() and confirm(folder)):
        return (
            None,
            f"the record is not this user's own, and says that the original is in {folder}; see --source",
        )
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
