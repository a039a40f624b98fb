"""A plan as hooks on a live model, and steering by addition. Context managers: the model is restored, always."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.algebra import SHORTEST, remove_from_outputs, remove_from_weight
from abliterate.edit.plan import Edit, Plan
from abliterate.edit.steering import Steering
from abliterate.errors import UsageError
from abliterate.model.anatomy import Kind
from abliterate.model.batches import hooked, on_output, predicting
from abliterate.model.offloaded import device_of, value_of
from abliterate.model.weights import numbers

#: What is done to activations of the stream.
Change = Callable[[Float[Tensor, "b s d"]], Float[Tensor, "b s d"]]


def refuse_hooks(plan: Plan) -> None:
    """Raise `UsageError`, naming the writer, for an edit that hooks cannot hold exactly."""
    for edit in plan.edits:
        writer = edit.writer
        unseen = writer.kind is Kind.EXPERTS or writer.weight != f"{writer.module}.weight"
        if edit.changes and edit.norm_preserving and unseen:
            raise UsageError(
                f"writer '{writer.module}': a norm-preserving edit cannot be hooks, since what its last map takes "
                "is not seen outside; write weights, or leave it out"
            )


@contextlib.contextmanager
def ablation(model: Any, *plans: Plan) -> Iterator[None]:
    """Realise a plan as hooks on every writer's output (before its post-norm); nothing in the model is changed.

    With several plans for the same writers at the same strength, the rows of a batch are cut into equal parts, one
    for each plan in order: many directions are tried in one forward pass.

    Raises `UsageError` for an edit that hooks cannot hold exactly, or plans that differ in more than their basis.
    """
    _refuse_other(model)
    _refuse_different(plans)
    for plan in plans:
        refuse_hooks(plan)
    handles: list[Any] = []
    rows = _Rows()
    with hooked(handles):
        if len(plans) > 1:
            handles.append(model.get_input_embeddings().register_forward_pre_hook(rows.count))
        for edits in zip(*(plan.edits for plan in plans), strict=True):
            if edits[0].changes:
                handles += _hooks(model, edits, rows)
        yield


def _refuse_other(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"ablation: expected a live model of transformers, found {type(model).__name__}")


def go_together(plans: Sequence[Plan]) -> bool:
    """Whether `ablation` takes these plans in one pass."""
    try:
        _refuse_different(plans)
    except UsageError:
        return False
    return True


def _refuse_different(plans: Sequence[Plan]) -> None:
    if len(plans) < 2:
        return
    if any(edit.norm_preserving or edit.offset is not None for plan in plans for edit in plan.edits):
        raise UsageError("several plans at once: expected plain edits")
    alike = {tuple((e.writer.module, e.strength, e.basis.shape, e.reader is None) for e in p.edits) for p in plans}
    if len(alike) > 1:
        raise UsageError("several plans at once: expected the same writers, strengths and ranks, found others")


class _Rows:
    """How many rows the batch that is being run has."""

    number = 1

    def count(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.number = len(args[0])


def _hooks(model: Any, edits: Sequence[Edit], rows: _Rows) -> Iterator[Any]:
    """Hooks on one writer, for one edit of it or several side by side."""
    edit = edits[0]
    module = model.get_submodule(edit.writer.module)
    if edit.norm_preserving and not isinstance(module, nn.Embedding):
        scale = _column_scale(module, edit)
        yield module.register_forward_pre_hook(lambda _, args: (args[0] * scale.to(args[0]), *args[1:]))
    yield module.register_forward_hook(on_output(_remover(model, module, edits, rows)))


def _column_scale(module: nn.Module, edit: Edit) -> Float[Tensor, " n"]:
    """How much longer each vector that an input feature writes was before the removal.

    With orthonormal rows V, ‖w − s Vᵀ V w‖² = ‖w‖² − (2 s − s²) ‖V w‖².
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        rows = value_of(module, "weight").movedim(edit.writer.axis, -1)
    else:
        rows = numbers(module).T  # its numbers are packed
    if edit.reader is not None:
        wide, basis, reader = rows.float(), edit.basis.to(rows.device), edit.reader.to(rows.device)
        return _length_back(wide, remove_from_weight(wide, basis, edit.strength, -1, reader))[:, 0]
    before = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32) ** 2
    inside = (rows @ edit.basis.T.to(rows)).float()
    after = before - (2 * edit.strength - edit.strength**2) * (inside**2).sum(-1)
    return torch.where(after > SHORTEST**2 * before, before / after.clamp_min(1e-30), 1.0).sqrt()


def _length_back(old: Float[Tensor, "*b d"], new: Float[Tensor, "*b d"]) -> Float[Tensor, "*b 1"]:
    """The factor that gives vectors their old length, 1 where hardly anything is left of them."""
    before, after = (vectors.float().norm(dim=-1, keepdim=True) for vectors in (old, new))
    return torch.where(after > SHORTEST * before, before / after.clamp_min(1e-30), 1.0)


def _remover(model: Any, module: nn.Module, edits: Sequence[Edit], rows: _Rows) -> Any:
    edit = edits[0]
    device = device_of(module)
    basis = torch.stack([edit.basis for edit in edits]).to(device)
    reader = None if edit.reader is None else torch.stack([edit.reads for edit in edits]).to(device)
    offset = None if edit.offset is None else edit.offset.to(device)
    front, lookup = edit.writer.kind is Kind.EMBEDDING, isinstance(module, nn.Embedding)
    if edit.writer.weight is None and edit.writer.bias is not None:
        bias = value_of(model, edit.writer.bias).float()
        return _shifter(_constants(bias, basis, reader, edit), rows)

    def change(output: Tensor) -> Tensor:
        if front and len(edits) > 1:  # positions are often embedded once for all rows: [s, d] or [1, s, d]
            output = output.expand(rows.number, *output.shape[-2:])
        read = None if reader is None else reader.to(output.device)
        changed = remove_from_outputs(output, basis.to(output.device), edit.strength, read)
        if edit.norm_preserving and lookup:
            changed = (changed.float() * _length_back(output, changed)).to(output.dtype)
        return changed if offset is None else (changed.float() + offset.to(output.device)).to(output.dtype)

    return change


def _constants(
    bias: Float[Tensor, " d"], basis: Float[Tensor, "g k d"], reader: Float[Tensor, "g k d"] | None, edit: Edit
) -> Float[Tensor, "g d"]:
    """What an edit of a bias alone adds to outputs."""
    inside = torch.einsum("d,gkd->gk", bias, basis if reader is None else reader)
    constants = -edit.strength * torch.einsum("gk,gkd->gd", inside, basis)
    return constants if edit.offset is None else constants + edit.offset.to(constants.device)


def _shifter(constants: Float[Tensor, "g d"], rows: _Rows) -> Any:
    def change(output: Tensor) -> Tensor:
        if len(constants) > 1:
            output = output.expand(rows.number, *output.shape[-2:])
        return _added(output, constants)

    return change


@contextlib.contextmanager
def additions(blocks: Sequence[nn.Module], vectors: Float[Tensor, "g d"], layers: Sequence[int]) -> Iterator[None]:
    """Each vector added where the stream enters the block of its layer, to its own part of a batch's rows."""
    with contextlib.ExitStack() as stack:
        for layer in dict.fromkeys(layers):
            here = torch.tensor([other == layer for other in layers])
            stack.enter_context(addition(blocks[layer], torch.where(here[:, None], vectors, 0)))
        yield


@contextlib.contextmanager
def addition(block: nn.Module, vectors: Float[Tensor, "g d"], *, leaving: bool = False) -> Iterator[None]:
    """Add to the residual stream where it enters `block`, at every token (Arditi et al. 2024, eq. 3).

    The rows of a batch are cut into g equal parts and each gets its own vector. With `leaving` it is added where the
    stream leaves the block: behind the last one no other begins.
    """
    with in_stream(block, lambda hidden: _added(hidden, vectors), leaving=leaving):
        yield


@contextlib.contextmanager
def steered(blocks: Sequence[nn.Module], steering: Steering) -> Iterator[None]:
    """The model whose `blocks` these are with its stream steered at every layer that `steering` names.

    Layer l is where the stream enters block l, the last one where it leaves the last block. Nothing in the model is
    changed.
    """
    with contextlib.ExitStack() as stack:
        for layer in steering.layers:
            last = layer == len(blocks)
            block = blocks[layer - last]
            there = steering.on(device_of(block))  # once, and not at every token
            stack.enter_context(in_stream(block, _steerer(there, layer), leaving=last))
        yield


def _steerer(steering: Steering, layer: int) -> Change:
    def change(hidden: Tensor) -> Tensor:
        changed = steering.at(layer, hidden.float()).to(hidden.dtype)
        return changed if steering.tokens == "all" else torch.where(predicting(hidden), changed, hidden)

    return change


@contextlib.contextmanager
def in_stream(block: nn.Module, change: Change, *, leaving: bool = False) -> Iterator[None]:
    """The residual stream changed where it enters `block`; with `leaving`, where it leaves it."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    if leaving:
        handle = block.register_forward_hook(on_output(change))
    else:
        handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    with hooked([handle]):
        yield


def _added(hidden: Float[Tensor, "b s d"], vectors: Float[Tensor, "g d"]) -> Float[Tensor, "b s d"]:
    wide = hidden.float().reshape(len(vectors), -1, hidden.shape[-1])
    added = wide + vectors.to(hidden.device, torch.float32)[:, None]
    return added.reshape(hidden.shape).to(hidden.dtype)
