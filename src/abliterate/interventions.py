"""A plan as hooks on a live model, and steering by addition. Context managers: the model is restored, always."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.algebra import remove_from_outputs, remove_from_weight
from abliterate.anatomy import Kind
from abliterate.errors import UsageError
from abliterate.inference import hooked, on_output
from abliterate.plan import Edit, Plan


def refuse_hooks(plan: Plan) -> None:
    """Raise `UsageError`, naming the writer, for an edit that hooks cannot hold exactly."""
    for edit in plan.edits:
        if edit.keep_norms and edit.writer.kind is Kind.EXPERTS:
            raise UsageError(
                f"writer '{edit.writer.module}': norm-preserving experts cannot be hooks, since what their last map "
                "takes is not seen outside; write weights, or leave experts out"
            )


@contextlib.contextmanager
def ablation(model: Any, *plans: Plan) -> Iterator[None]:
    """Realise a plan as hooks on every writer's output (before its post-norm); nothing in the model is changed.

    With several plans for the same writers at the same strength, the rows of a batch are cut into equal parts, one
    for each plan in order: many directions are tried in one forward pass.

    Raises `UsageError` for an edit that hooks cannot hold exactly, or plans that differ in more than their basis.
    """
    for plan in plans:
        refuse_hooks(plan)
    handles: list[Any] = []
    rows = _Rows()
    with hooked(handles):
        if len(plans) > 1:
            handles.append(model.get_input_embeddings().register_forward_pre_hook(rows.count))
        for edits in zip(*(plan.edits for plan in plans), strict=True):
            if len(edits) > 1 and any(edit.keep_norms or edit.offset is not None for edit in edits):
                raise UsageError("several plans at once: expected plain edits")
            if edits[0].changes:
                handles += _hooks(model, edits, rows)
        yield


class _Rows:
    """How many rows the batch that is being run has."""

    number = 1

    def count(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.number = len(args[0])


def _hooks(model: Any, edits: Sequence[Edit], rows: _Rows) -> Iterator[Any]:
    """Hooks on one writer, for one edit of it or several side by side."""
    edit = edits[0]
    module = model.get_submodule(edit.writer.module)
    if edit.keep_norms and edit.writer.kind is not Kind.EMBEDDING:
        scale = _column_scale(model.get_parameter(edit.writer.weight), edit)
        yield module.register_forward_pre_hook(lambda _, args: (args[0] * scale.to(args[0]), *args[1:]))
    yield module.register_forward_hook(on_output(_remover(model, module, edits, rows)))


def _column_scale(weight: Tensor, edit: Edit) -> Float[Tensor, " n"]:
    """How much longer each vector that an input feature writes was before the removal."""
    rows = weight.detach().float().movedim(edit.writer.axis, -1)
    basis, reader = (tensor.to(rows.device) for tensor in (edit.basis, edit.reads))
    after = remove_from_weight(rows, basis, edit.strength, -1, reader).norm(dim=-1)
    return torch.where(after > 0, rows.norm(dim=-1) / after.clamp_min(1e-30), torch.ones_like(after))


def _remover(model: Any, module: nn.Module, edits: Sequence[Edit], rows: _Rows) -> Any:
    edit = edits[0]
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    basis = torch.stack([edit.basis for edit in edits]).to(device)
    reader = None if edit.reader is None else torch.stack([edit.reads for edit in edits]).to(device)
    offset = None if edit.offset is None else edit.offset.to(device)
    embedding = edit.writer.kind is Kind.EMBEDDING
    if edit.writer.weight is None and edit.writer.bias is not None:
        return _shifter(model.get_parameter(edit.writer.bias).detach().float(), basis, reader, edit.strength, rows)

    def change(output: Tensor) -> Tensor:
        if embedding and len(edits) > 1:  # positions are often embedded once for all rows: [s, d] or [1, s, d]
            output = output.expand(rows.number, *output.shape[-2:])
        read = None if reader is None else reader.to(output.device)
        changed = remove_from_outputs(output, basis.to(output.device), edit.strength, read)
        if edit.keep_norms and embedding:
            changed = _lengthened(changed, output)
        return changed if offset is None else (changed.float() + offset.to(output.device)).to(output.dtype)

    return change


def _lengthened(changed: Float[Tensor, "*b d"], old: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Vectors with their old length."""
    after = changed.float().norm(dim=-1, keepdim=True)
    scale = torch.where(after > 0, old.float().norm(dim=-1, keepdim=True) / after.clamp_min(1e-30), 1.0)
    return (changed.float() * scale).to(old.dtype)


def _shifter(
    bias: Float[Tensor, " d"],
    basis: Float[Tensor, "g k d"],
    reader: Float[Tensor, "g k d"] | None,
    strength: float,
    rows: _Rows,
) -> Any:
    """What an edit of a bias alone does to outputs: a constant."""
    inside = torch.einsum("d,gkd->gk", bias, basis if reader is None else reader)
    constants = strength * torch.einsum("gk,gkd->gd", inside, basis)

    def change(output: Tensor) -> Tensor:
        if len(constants) > 1:
            output = output.expand(rows.number, *output.shape[-2:])
        wide = output.float().reshape(len(constants), -1, output.shape[-1])
        return (wide - constants.to(output.device)[:, None]).reshape(output.shape).to(output.dtype)

    return change


@contextlib.contextmanager
def addition(block: nn.Module, vectors: Float[Tensor, "g d"]) -> Iterator[None]:
    """Add to the residual stream where it enters `block`, at every token (Arditi et al. 2024, eq. 3).

    The rows of a batch are cut into g equal parts and each gets its own vector.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (_added(args[0], vectors), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _added(kwargs["hidden_states"], vectors)}

    with hooked([block.register_forward_pre_hook(hook, with_kwargs=True)]):
        yield


def _added(hidden: Float[Tensor, "b s d"], vectors: Float[Tensor, "g d"]) -> Float[Tensor, "b s d"]:
    wide = hidden.float().reshape(len(vectors), -1, hidden.shape[-1])
    added = wide + vectors.to(hidden.device, torch.float32)[:, None]
    return added.reshape(hidden.shape).to(hidden.dtype)
