"""A plan as weights: streaming surgery on the original files, which never loads the model."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abliterate.edit.plan import Edit, Plan
from abliterate.edit.weights.passes import Passage
from abliterate.edit.weights.tensors import TensorEdit, tensor_edits
from abliterate.edit.weights.undo_files import FOLDER, UndoWriter, merge
from abliterate.edit.weights.undo_files import NAME as UNDO
from abliterate.files.checkpoint import (
    Changes,
    Checkpoint,
    EditedFiles,
    Journal,
    Note,
    Rewriter,
    TensorReader,
    open_tensor,
    write_edited,
)
from abliterate.model.anatomy import Stored
from abliterate.record import ResidualPart


@dataclass(frozen=True, slots=True)
class Surgery:
    """What was written, what is left of the direction in every edited tensor, and the files that undo needs."""

    files: EditedFiles
    residuals: tuple[ResidualPart, ...]
    undo: tuple[str, ...]


def edit_checkpoint(
    source: Checkpoint,
    target: Path,
    plan: Plan,
    names: Mapping[str, tuple[Stored, ...]],
    *,
    keep_undo: bool = True,
    changes: Changes | None = None,
    journal: Journal | None = None,
    progress: Callable[[int], None] | None = None,
) -> Surgery:
    """Write `source` with `plan` applied into the empty folder `target`.

    `names` says where the plan's parameters lie in the checkpoint (see `anatomy.names_on_disk`). `changes`, `journal`
    and `progress` are those of `checkpoint.write_edited`. With `keep_undo`, what undo needs is written beside the
    model (see `undo_files`).

    Raises `UsageError` for an edit that weights cannot hold, `CheckpointError` when a tensor has an unexpected shape
    or format or is planned twice, both before anything is written; `NumericalError` when a tensor holds or would get
    numbers that are not finite.
    """
    place = target if journal is None else journal.scratch
    work = _Work(place, tensor_edits(source, plan, names), keep_undo)
    with one_thread(), contextlib.closing(work):
        files = write_edited(
            source, target, work.rewriters(), changes=changes, journal=journal, note=work.note, progress=progress
        )
    residuals = [ResidualPart.model_validate(left) for note in files.notes for left in note["residuals"]]
    found = {residual.tensor: residual for residual in residuals}
    parts = [note["undo"] for note in files.notes if note["undo"]]
    if parts:
        merge(place, parts, target / UNDO)
    if journal is None:
        shutil.rmtree(place / FOLDER, ignore_errors=True)
    return Surgery(files, tuple(found[name] for name in work.tasks), (UNDO,) if parts else ())


def removed_rows(
    source: Checkpoint, plan: Plan, names: Mapping[str, tuple[Stored, ...]]
) -> Iterator[tuple[Edit, Stored, Tensor]]:
    """A = R W of every stored tensor that `plan` changes, without writing anything.

    Laid out as the tensor is, with k in the place of the stream's axis: [k, n] for a Linear, [n, k] for an embedding,
    [E, k, n] or [E, n, k] for experts, [k] for a bias. Errors are those of `edit_checkpoint`.
    """
    for task in tensor_edits(source, plan, names):
        with open_tensor(task.info) as reader, one_thread():
            removed = Passage(task).removed(reader)
        yield task.edit, task.stored, removed


class _Work:
    """The tensors of one surgery: their rewriters, and what is noted for every finished file."""

    def __init__(self, place: Path, tasks: list[TensorEdit], keep_undo: bool) -> None:
        self.tasks = {task.info.name: task for task in tasks}
        self._place, self._keep_undo = place, keep_undo
        self._undo: UndoWriter | None = None
        self._residuals: list[ResidualPart] = []

    def close(self) -> None:
        """Let go of an undo file that is not finished."""
        if self._undo:
            self._undo.abandon()

    def rewriters(self) -> dict[str, Rewriter]:
        return {name: self._rewriter(task) for name, task in self.tasks.items()}

    def _rewriter(self, task: TensorEdit) -> Rewriter:
        def rewrite(reader: TensorReader) -> Iterator[memoryview]:
            if self._keep_undo and self._undo is None:
                self._undo = UndoWriter(self._place)
            keeper = self._undo.keeper(task) if self._undo else None
            passage = Passage(task, keeper)
            yield from passage.edit(reader)
            if keeper:
                keeper.finish()
            self._residuals.append(passage.residual)

        return rewrite

    def note(self, name: str, _: tuple[str, ...]) -> Note:
        """Close what belongs to the file `name`, which has just been written."""
        path = self._undo.close(name) if self._undo else None
        value = {
            "residuals": [residual.model_dump() for residual in self._residuals],
            "undo": None if path is None else str(path.relative_to(self._place)),
        }
        self._undo, self._residuals = None, []
        return Note(value, () if path is None else (path,))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: blocks this small gain nothing from more, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
