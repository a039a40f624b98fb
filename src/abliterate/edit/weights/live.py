"""Stored tensors in a live model, so that what is measured is what was saved."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.algebra import remove_from_weight
from abliterate.edit.plan import Edit, Plan
from abliterate.edit.weights.numbers import length_back
from abliterate.edit.weights.tensors import Grid, planned_parameters, refusal
from abliterate.errors import CheckpointError, ModelError, UsageError
from abliterate.files.checkpoint import Checkpoint, open_checkpoint, open_tensor
from abliterate.files.formats import PLAIN, layout
from abliterate.model.anatomy import Stored
from abliterate.model.offloaded import Exchange


class SwappedWeights:
    """Parameters of a live model that hold stored tensors for a while; `original()` puts them back inside."""

    def __init__(self, model: Any, stored: Mapping[str, Callable[[], Tensor]]) -> None:
        """Hold what `stored` reads (by parameter name) in each parameter's own dtype and place; swap nothing yet.

        What belongs to offloaded parameters is not held: it is read whenever it is needed.
        """
        self._exchanges = [Exchange(model, name, functools.partial(_read_anew, read)) for name, read in stored.items()]

    def swap(self) -> None:
        """Exchange what the parameters hold with what is kept here."""
        for exchange in self._exchanges:
            exchange.swap()

    @contextlib.contextmanager
    def original(self) -> Iterator[None]:
        """The model as it was, inside."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def _read_anew(read: Callable[[], Tensor], _: Tensor) -> Tensor:
    return read()


@contextlib.contextmanager
def weights_from(
    model: Any, folder: Path, plan: Plan, names: Mapping[str, tuple[Stored, ...]]
) -> Iterator[SwappedWeights]:
    """Let a live model use the tensors stored in `folder` for the parameters that `plan` changes, for a while.

    Experts stored one by one are stacked, axes put in the order of memory, FP8 and MXFP4 made numbers.

    Raises `ModelError` for a parameter that the live model holds quantised, `CheckpointError` for other shapes.
    """
    checkpoint, axes = open_checkpoint(folder), planned_parameters(plan)
    for name in axes:
        _floats(name, model.get_parameter(name))
    stored = {
        name: functools.partial(_parameter, model, checkpoint, name, axis, names[name]) for name, axis in axes.items()
    }
    swapped = SwappedWeights(model, stored)
    with swapped.original():  # the same exchange, read the other way round
        yield swapped


def edit_live(model: Any, plan: Plan) -> Callable[[], None]:
    """Change the weights of a live model as `plan` says; the function returned puts the old numbers back.

    Each tensor is computed in float32 and rounded to its own dtype, as in files. The old numbers of what is changed are
    kept beside the model.

    Raises `UsageError`, naming the writer, for an edit that live weights cannot hold; nothing is changed then.
    """
    if plan.untie:
        raise UsageError("--untie: a live model keeps its tie of embedding and head; write the model instead")
    for edit in plan.edits:
        if edit.changes and (reason := refusal(edit)) is not None:
            raise UsageError(reason)
        for name in _names(edit):
            _floats(name, model.get_parameter(name))
    made: list[Exchange] = []
    for edit in plan.edits:
        for name in _names(edit):
            made.append(Exchange(model, name, functools.partial(_edited, edit=edit, name=name)))
            made[-1].swap()

    def back() -> None:
        for exchange in reversed(made):
            exchange.swap()

    return back


def _names(edit: Edit) -> list[str]:
    return list(planned_parameters(Plan((edit,), edit.basis, edit.strength, ())))


def _edited(old: Tensor, edit: Edit, name: str) -> Tensor:
    """The new numbers of one parameter in float32 (see `TensorEdit` for the same of a stored tensor)."""
    writer = edit.writer
    bias = name == writer.bias
    axis = -1 if bias else writer.axis
    wide, device = old.float(), old.device
    new = remove_from_weight(wide, edit.basis.to(device), edit.strength, axis, edit.reads.to(device))
    if edit.norm_preserving and not bias and edit.strength != 0:
        lengths = (numbers.square().sum(axis, keepdim=True) for numbers in (wide, new))
        new = new * length_back(*lengths)
    if edit.stored_offset is not None and name == (writer.bias or writer.weight):
        new = new + edit.stored_offset.to(device)
    return new


def _floats(name: str, parameter: Tensor) -> None:
    """Raise `ModelError` for a parameter whose numbers are codes."""
    if parameter.dtype not in PLAIN.values():
        raise ModelError(
            f"parameter '{name}': expected floats in the live model, found {parameter.dtype}; load it dequantised"
        )


def _parameter(model: Any, checkpoint: Checkpoint, name: str, axis: int, places: tuple[Stored, ...]) -> Tensor:
    """The numbers of one parameter as they lie in memory, in its dtype."""
    parameter: nn.Parameter = model.get_parameter(name)
    found = torch.empty(parameter.shape, dtype=parameter.dtype)
    for place in places:
        part = found if place.expert is None else found[place.expert]
        memory_axis = axis % parameter.dim() - (place.expert is not None)
        turned = part.dim() > 1 and place.axis != memory_axis
        _read_into(part.mT if turned else part, checkpoint, place)
    return found


def _read_into(out: Tensor, checkpoint: Checkpoint, place: Stored) -> None:
    """Copy the numbers of one stored tensor, block by block, into a view of memory of the same shape."""
    info = checkpoint.tensors[place.tensor]
    how = layout(checkpoint, info)
    if how.shape != tuple(out.shape):
        raise CheckpointError(
            f"tensor '{info.name}' in {info.file}: expected shape {list(out.shape)} for parameter "
            f"'{place.parameter}', found {list(how.shape)}"
        )
    grid = Grid.of(how, max(0, len(how.shape) - 2))
    matrices = out.view(1, 1, -1) if out.dim() == 1 else out if out.dim() == 3 else out[None]
    (buffer,) = grid.buffers(1)
    with open_tensor(info) as reader:
        for matrix in range(grid.matrices):
            for block in grid.blocks(matrix):
                matrices[matrix][block.rows] = grid.numbers(grid.read(reader, block), block, buffer)
