"""A plan as hooks on a live model, and steering by addition. Context managers: the model is restored, always."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.inference import hooked
from abliterate.plan import Edit, Plan, remove_from_outputs


@contextlib.contextmanager
def ablation(model: Any, plan: Plan) -> Iterator[None]:
    """Realise `plan` as hooks on every writer's output (before its post-norm); nothing in the model is changed."""
    handles: list[Any] = []
    with hooked(handles):
        for edit in plan.edits:
            if edit.strength != 0:
                module = model.get_submodule(edit.writer.module)
                handles.append(module.register_forward_hook(_remover(module, edit)))
        yield


def _remover(module: nn.Module, edit: Edit) -> Any:
    device = next(module.parameters()).device
    basis = edit.basis.to(device)

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return remove_from_outputs(output, basis.to(output.device), edit.strength)

    return hook


@contextlib.contextmanager
def addition(block: nn.Module, vector: Float[Tensor, " d"]) -> Iterator[None]:
    """Add `vector` to the residual stream where it enters `block`, at every token (Arditi et al. 2024, eq. 3)."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (_added(args[0], vector), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _added(kwargs["hidden_states"], vector)}

    with hooked([block.register_forward_pre_hook(hook, with_kwargs=True)]):
        yield


def _added(hidden: Tensor, vector: Tensor) -> Tensor:
    return (hidden.float() + vector.to(hidden.device, torch.float32)).to(hidden.dtype)
