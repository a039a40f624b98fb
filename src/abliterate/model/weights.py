"""The weight that a linear map computes with, whatever format it is kept in: found by running it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.errors import ModelError
from abliterate.model.offloaded import device_of, is_offloaded, value_of

#: Rows of the identity that are run at once.
_ROWS = 512


def numbers(module: nn.Module) -> Float[Tensor, "d n"]:
    """The effective weight W of a linear-like module y = W x + b, in float32 on the module's device.

    Column j is what the module gives for the j-th unit vector, less what it gives for zero, computed in the dtype
    that it computes in; the bias is set aside meanwhile, for sums with it would be rounded. Formats need not be
    known: Linear, Conv1D, and the quantised maps of other libraries. Of an embedding it is the table, transposed.
    Hooks of the module run as always.

    Raises `ModelError` when the module does not say how many inputs it takes.
    """
    if isinstance(module, nn.Embedding):
        return value_of(module, "weight").float().T
    if is_offloaded(module) and isinstance(module, nn.Linear) and module.weight.is_floating_point():
        return value_of(module, "weight").float()  # its bias cannot be set aside: it comes with every pass
    inputs, device, dtype = _inputs(module), device_of(module), _dtype(module)
    columns = []
    with torch.no_grad(), _without_bias(module):
        nothing = module(torch.zeros(1, inputs, device=device, dtype=dtype))
        for start in range(0, inputs, _ROWS):
            units = torch.zeros(min(_ROWS, inputs - start), inputs, device=device, dtype=dtype)
            units.diagonal(start).fill_(1)
            columns.append((module(units).float() - nothing.float()).T)
    return torch.cat(columns, dim=1)


def _inputs(module: nn.Module) -> int:
    for name in ("in_features", "nx"):
        if isinstance(found := getattr(module, name, None), int):
            return found
    raise ModelError(
        f"module {type(module).__name__}: expected a linear map that says how many inputs it takes (in_features), "
        "found none; load the model in full precision"
    )


def _dtype(module: nn.Module) -> torch.dtype:
    """The floating dtype that the module takes: its weight's, or what its library calls the compute dtype."""
    weight, declared = getattr(module, "weight", None), getattr(module, "compute_dtype", None)
    candidates = [weight.dtype if isinstance(weight, Tensor) else None, declared]
    candidates += [tensor.dtype for tensor in _tensors(module)]
    return next((found for found in candidates if found is not None and found.is_floating_point), torch.float32)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@contextlib.contextmanager
def _without_bias(module: nn.Module) -> Iterator[None]:
    """The module with its bias at zero."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        yield
        return
    original = bias.data
    bias.data = torch.zeros_like(original)
    try:
        yield
    finally:
        bias.data = original
