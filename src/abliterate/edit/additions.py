"""Low-rank additions to writers, W + Lᵀ A: what gives a model something back, or makes it stronger, without training.

Realised as hooks on a live model and as weights in a checkpoint, as a plan is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.errors import CheckpointError, NumericalError, UsageError
from abliterate.files.checkpoint import Checkpoint, EditedFiles, Rewriter, TensorReader, open_tensor, write_edited
from abliterate.files.formats import PLAIN, layout
from abliterate.model.anatomy import Kind, Stored, Writer
from abliterate.model.batches import hooked

_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class Addition:
    """What a writer additionally writes: `left` [k, d] in the stream for `right` [k, n] of what its map takes."""

    writer: Writer
    left: Float[Tensor, "k d"]
    right: Float[Tensor, "k n"]


def can_add(writer: Writer) -> bool:
    """Whether hooks see what the writer's last map takes."""
    return writer.weight == f"{writer.module}.weight" and writer.kind not in (Kind.EXPERTS, Kind.EMBEDDING)


@contextlib.contextmanager
def adding(model: Any, additions: Sequence[Addition]) -> Iterator[None]:
    """The live model with additions as hooks; several on one writer add up.

    Raises `UsageError` for a writer whose input hooks do not see.
    """
    handles: list[Any] = []
    with hooked(handles):
        for addition in additions:
            if not can_add(addition.writer):
                raise UsageError(
                    f"writer '{addition.writer.module}': expected one linear map, found {addition.writer.kind}"
                )
            module: nn.Module = model.get_submodule(addition.writer.module)
            handles.append(module.register_forward_hook(_adder(addition)))
        yield


def _adder(addition: Addition) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        taken = args[0].float() @ addition.right.to(output.device).T
        changed: Tensor = output.float() + taken @ addition.left.to(output.device)
        return changed.to(output.dtype)

    return hook


def write_additions(
    source: Checkpoint,
    target: Path,
    changes: Mapping[str, Callable[[Float[Tensor, "d n"]], Float[Tensor, "d n"]]],
    axes: Mapping[str, int],
    *,
    whole: Mapping[str, Checkpoint] | None = None,
    progress: Callable[[int], None] | None = None,
) -> EditedFiles:
    """Copy `source` into the empty folder `target` with some tensors changed; `changes` gets them stream first.

    Tensors of `whole` come byte for byte from another checkpoint with the same ones.

    Raises `CheckpointError` for tensors that are not stored as floats, `NumericalError` for results that are not
    finite.
    """
    rewriters: dict[str, Rewriter] = {name: _copier(other, name) for name, other in (whole or {}).items()}
    for name, change in changes.items():
        how = layout(source, source.tensors[name])
        if how.format not in PLAIN:
            raise CheckpointError(
                f"tensor '{name}': expected floats to add to, found {how.format}; give a copy in bfloat16"
            )
        rewriters[name] = _rewriter(source, name, change, axes[name])
    return write_edited(source, target, rewriters, progress=progress)


def _rewriter(source: Checkpoint, name: str, change: Callable[[Tensor], Tensor], axis: int) -> Rewriter:
    def rewrite(reader: TensorReader) -> Iterator[memoryview]:
        how = layout(source, source.tensors[name])
        numbers = how.decode(reader.read(0, reader.info.nbytes), 0).reshape(how.shape)
        changed = change(numbers.movedim(axis, 0)).movedim(0, axis).contiguous()
        if not bool(torch.isfinite(changed).all()):
            raise NumericalError(f"tensor '{name}': expected finite numbers, found NaN or infinity")
        data: memoryview = how.encode(changed.view(-1, how.columns), 0).view(torch.uint8).numpy().data
        yield data

    return rewrite


def _copier(other: Checkpoint, name: str) -> Rewriter:
    def rewrite(_: TensorReader) -> Iterator[bytearray]:
        info = other.tensors[name]
        with open_tensor(info) as reader:
            for start in range(0, info.nbytes, _BLOCK):
                yield reader.read(start, min(_BLOCK, info.nbytes - start))

    return rewrite


def changes_of(
    additions: Sequence[Addition], names: Mapping[str, tuple[Stored, ...]]
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, int]]:
    """What `write_additions` takes, for additions to a model whose parameters lie on disk where `names` says."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    axes = {}
    grouped: dict[str, list[Addition]] = {}
    for addition in additions:
        (place,) = names[str(addition.writer.weight)]
        grouped.setdefault(place.tensor, []).append(addition)
        axes[place.tensor] = place.axis

    def adder(own: Sequence[Addition]) -> Callable[[Tensor], Tensor]:
        return lambda weight: weight + sum(one.left.to(weight).T @ one.right.to(weight) for one in own)

    for tensor, own in grouped.items():
        changes[tensor] = adder(own)
    return changes, axes


__all__ = ["Addition", "adding", "can_add", "changes_of", "write_additions"]
