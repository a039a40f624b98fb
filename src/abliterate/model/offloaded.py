"""Weights that are not where the model computes: accelerate fetches them for each module's pass and lets them go again.

Meanwhile their parameters are on torch's meta device: shape and dtype, and no numbers. Whoever reads numbers of a live
model outside a pass asks here, gets those of one module at a time, and holds them no longer than needed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_META = torch.device("meta")


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of a model are fetched for each pass."""
    return any(_hook(module) is not None for module in model.modules())


def is_spread(model: nn.Module) -> bool:
    """Whether a model computes on several devices."""
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers())} - {_META}
    return len(found | {torch.device(h.execution_device) for h in map(_hook, model.modules()) if h is not None}) > 1


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, wherever its weights are meanwhile; the CPU where it has none."""
    for part in module.modules():
        if (hook := _hook(part)) is not None and hook.execution_device is not None:
            return torch.device(hook.execution_device)
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def fetched(module: nn.Module, *, recurse: bool = True) -> Iterator[None]:
    """The weights of a module where it computes, inside, with those of its parts unless told otherwise."""
    with contextlib.ExitStack() as stack:
        for part in module.modules() if recurse else (module,):
            if (hook := _hook(part)) is not None:
                hook.pre_forward(part)
                stack.callback(hook.post_forward, part, None)
        yield


def value_of(model: nn.Module, name: str) -> Tensor:
    """The numbers of a parameter, by its name in the model; those of an offloaded one live as long as the tensor."""
    with fetched(model.get_submodule(name.rpartition(".")[0]), recurse=False):
        found = model.get_parameter(name).detach()
        return found.full_tensor() if hasattr(found, "full_tensor") else found  # of one that processes share


def float_copy(module: nn.Module) -> nn.Module:
    """A copy of a module in float32 that holds all its weights, without a copy in another dtype between."""
    with fetched(module):
        memo: dict[int, Any] = {}
        for part in module.modules():
            if (hook := getattr(part, "_hf_hook", None)) is not None:
                memo[id(hook)] = hook  # it may hold the weights of the whole model
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                memo[id(tensor)] = _float(tensor)
        twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        if part.__dict__.pop("_hf_hook", None) is not None:
            part.forward = part.__dict__.pop("_old_forward")
    return twin


def _float(tensor: Tensor) -> Tensor:
    wide = tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
    return nn.Parameter(wide, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide


@contextlib.contextmanager
def recomputed(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, a backward pass through a model with offloaded weights holds those of one of its `blocks` at a time.

    What a block computes is computed again when it is differentiated, so hooks that were on must still be on then.
    Nothing is changed where no weights are offloaded.
    """
    forwards = [(block, block.forward) for block in blocks] if is_offloaded(model) else []
    held = [(block, block.__dict__["forward"]) for block, _ in forwards if "forward" in block.__dict__]
    try:
        for block, forward in forwards:
            block.forward = functools.partial(checkpoint, forward, use_reentrant=False)
        yield
    finally:
        for block, _ in forwards:
            del block.forward
        for block, forward in held:
            block.forward = forward


class Exchange:
    """Other numbers for a parameter of a live model, which `swap` puts in and takes out again.

    `change` makes them of its own numbers: once, or, where it is offloaded, whenever it is fetched, and then nothing is
    kept.
    """

    def __init__(self, model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Of the parameter `name` of `model`; nothing is swapped yet."""
        module, _, self.own = name.rpartition(".")
        self.change = change
        self._hook = _hook(model.get_submodule(module))
        self._parameter = model.get_parameter(name)
        if self._hook is None:
            data = self._parameter.data
            self._other = change(data).to(data.device, data.dtype)

    def swap(self) -> None:
        """Exchange what the parameter holds, or is fetched as, with what is kept here."""
        if self._hook is None:
            self._parameter.data, self._other = self._other, self._parameter.data
            return
        if not isinstance(self._hook.weights_map, _Changed):
            self._hook.weights_map = _Changed(self._hook.weights_map)
        changed: _Changed = self._hook.weights_map
        if self in changed.by:
            changed.by.remove(self)
        else:
            changed.by.append(self)
        if not changed.by:
            self._hook.weights_map = changed.base


class _Changed(Mapping[str, Tensor]):
    """Weights of one module by name, changed as they are read."""

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        self.base, self.by = base, list[Exchange]()

    def __getitem__(self, name: str) -> Tensor:
        found = self.base[name]
        for exchange in self.by:
            if exchange.own == name:
                found = exchange.change(found).to(found.device, found.dtype)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def stored_places(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The file of safetensors and the tensor in it that each offloaded weight of a module is read from, if it is."""
    for part in module.modules():
        hook = _hook(part)
        weights = getattr(hook, "weights_map", None)
        places: Mapping[str, Any] = getattr(getattr(weights, "dataset", None), "index", {})
        for name, _ in part.named_parameters(recurse=False):
            key = f"{getattr(weights, 'prefix', '')}{name}"
            if "safetensors_file" in (place := places.get(key, {})):
                yield place["safetensors_file"], place.get("weight_name", key)


def _hook(module: nn.Module) -> Any:
    """accelerate's hook that fetches a module's own weights; None where they stay."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((one for one in hooks if getattr(one, "offload", False)), None)
