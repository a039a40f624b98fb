"""A plan as hooks on a live model, and steering by addition. Context managers: the model is restored, always."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.anatomy import Kind
from abliterate.inference import hooked
from abliterate.plan import Edit, Plan, remove_from_outputs


@contextlib.contextmanager
def ablation(model: Any, *plans: Plan) -> Iterator[None]:
    """Realise a plan as hooks on every writer's output (before its post-norm); nothing in the model is changed.

    With several plans for the same writers at the same strength, the rows of a batch are cut into equal parts, one
    for each plan in order: many directions are tried in one forward pass.
    """
    handles: list[Any] = []
    rows = _Rows()
    with hooked(handles):
        if len(plans) > 1:
            handles.append(model.get_input_embeddings().register_forward_pre_hook(rows.count))
        for edits in zip(*(plan.edits for plan in plans), strict=True):
            if edits[0].strength != 0:
                module = model.get_submodule(edits[0].writer.module)
                handles.append(module.register_forward_hook(_remover(module, edits, rows)))
        yield


class _Rows:
    """How many rows the batch that is being run has."""

    number = 1

    def count(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.number = len(args[0])


def _remover(module: nn.Module, edits: Sequence[Edit], rows: _Rows) -> Any:
    device = next(module.parameters()).device
    basis = torch.stack([edit.basis for edit in edits]).to(device)
    strength = edits[0].strength
    embedding = edits[0].writer.kind is Kind.EMBEDDING

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if embedding and len(edits) > 1:  # positions are often embedded once for all rows: [s, d] or [1, s, d]
            output = output.expand(rows.number, *output.shape[-2:])
        return remove_from_outputs(output, basis.to(output.device), strength)

    return hook


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
