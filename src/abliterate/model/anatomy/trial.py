"""A block on trial: the parameters of it that may write to the stream, and runs with them edited."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.algebra import before_norm, remove_from_outputs, remove_from_weight
from abliterate.errors import AnatomyError
from abliterate.model.anatomy.blocks import Call, stream_out
from abliterate.model.batches import hooked, on_output
from abliterate.model.offloaded import device_of


@dataclass(frozen=True, slots=True)
class Candidate:
    """Parameters of a block that may write to the stream; names are relative to the block (see `writers.Writer`).

    `post_norms` are the norms between them and the stream, the last one nearest to it.
    """

    module: str
    weight: str | None
    axis: int
    bias: str | None
    post_norms: tuple[str, ...] = ()

    @property
    def pattern(self) -> str:
        """The same for all experts of a list."""
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{self.weight or self.bias}@{self.axis}")

    @property
    def name(self) -> str:
        """What to call it."""
        return (self.weight or self.bias or self.module).removesuffix(".weight")


def candidates(block: nn.Module, d_model: int) -> list[Candidate]:
    """Every parameter of a block with an output as wide as the stream.

    Linear, Conv1D and Embedding say which axis is the output; of other modules' matrices each axis as wide as the
    stream is tried. A norm's bias is a constant that may reach the stream.
    """
    parts = []
    for name, module in block.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weight, bias = own.get("weight"), own.get("bias")
        if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D":
            axis = 0 if isinstance(module, nn.Linear) else 1
            if weight is not None and weight.shape[axis] == d_model:
                parts.append(
                    Candidate(name, joined(name, "weight"), axis, None if bias is None else joined(name, "bias"))
                )
        elif weight is not None and weight.dim() == 1:
            if bias is not None and bias.shape == (d_model,):
                parts.append(Candidate(name, None, 0, joined(name, "bias")))
        else:
            parts += _raw(name, own, d_model)
    return parts


def _is_bias(name: str, value: Tensor, d_model: int) -> bool:
    return name.endswith("bias") and value.shape == (d_model,)


def _raw(module: str, own: Mapping[str, nn.Parameter], d_model: int) -> Iterator[Candidate]:
    """Matrices held by a module itself: experts stacked [E, …], and maps of classes nobody knows."""
    matrices = [name for name, value in own.items() if value.dim() in (2, 3) and not name.endswith("bias")]
    if not matrices:
        yield from (Candidate(module, None, 0, joined(module, n)) for n, v in own.items() if _is_bias(n, v, d_model))
    for name, value in own.items():
        if value.dim() not in (2, 3) or name.endswith("bias"):
            continue
        biases = [other for other in (f"{name}_bias", "bias") if other in own and own[other].shape[-1] == d_model]
        for axis in range(value.dim() - 2, value.dim()):
            if value.shape[axis] == d_model and (value.dim() == 3 or axis < 2):
                yield Candidate(module, joined(module, name), axis, joined(module, biases[0]) if biases else None)


def joined(module: str, name: str) -> str:
    """The name of a parameter of `module`, which may be the block itself."""
    return f"{module}.{name}" if module else name


class BlockTrial:
    """A float32 block with the arguments of one call, for runs with and without edits."""

    def __init__(self, block: nn.Module, call: Call, basis: Float[Tensor, "k d"]) -> None:
        """Take a block that is ours to change; `basis` is the random subspace V."""
        self.block, self.basis = block, basis
        self._call = call.floated(basis.device)
        self.stream = self._call.stream.clone()
        self.width = basis.shape[1]

    def run(self, *, clean: bool) -> Tensor:
        """What leaves the block; `clean` takes V out of what enters it."""
        stream = self.stream.clone()
        if clean:
            stream = remove_from_outputs(self._apart(stream), self.basis[None], 1.0).reshape(stream.shape)
        call = self._call.with_stream(stream)
        with torch.inference_mode():
            return stream_out(self.block(*call.args, **call.kwargs))

    def along(self, x: Tensor) -> float:
        """‖V x‖."""
        return float((self._apart(x.float()) @ self.basis.T).cpu().double().norm())

    def _apart(self, x: Tensor) -> Tensor:
        """Several streams side by side (hyper-connections) one by one."""
        return x.reshape(*x.shape[:-1], -1, self.width)

    def bases(self, parts: Sequence[Candidate]) -> list[Tensor]:
        """The subspace that each part must not write so that V does not reach the stream."""
        found: dict[tuple[str, ...], Tensor] = {(): self.basis}
        for norms in dict.fromkeys(part.post_norms for part in parts if part.post_norms):
            gain, centred = norms_gain(self.block, norms, self.width)
            found[norms] = before_norm(self.basis, gain.to(self.basis.device), centred=centred)
        return [found[part.post_norms] for part in parts]

    @contextlib.contextmanager
    def edited(self, parts: Sequence[Candidate]) -> Iterator[None]:
        """The block with V taken out of the weights of `parts`, inside."""
        kept: list[tuple[nn.Parameter, Tensor]] = []
        done: set[int] = set()
        try:
            for part, basis in zip(parts, self.bases(parts), strict=True):
                for name, axis in ((part.weight, part.axis), (part.bias, -1)):
                    parameter = None if name is None else self.block.get_parameter(name)
                    if parameter is None or (id(parameter) in done and axis == -1):
                        continue
                    kept.append((parameter, parameter.data))
                    done.add(id(parameter))
                    parameter.data = remove_from_weight(parameter.data, basis, 1.0, axis)
            yield
        finally:
            for parameter, data in reversed(kept):
                parameter.data = data

    @contextlib.contextmanager
    def ablated(self, parts: Sequence[Candidate]) -> Iterator[None]:
        """The block with V taken out of the outputs of `parts` by hooks, inside."""
        handles: list[Any] = []
        with hooked(handles):
            for part, basis in zip(parts, self.bases(parts), strict=True):
                change = _remover(self.block, part, basis)
                handles.append(self.block.get_submodule(part.module).register_forward_hook(on_output(change)))
            yield

    def multiplier(self, parts: Sequence[Candidate], part: Candidate) -> float | None:
        """What a constant added to a part's output is multiplied by on its way out; None if not one number."""
        added = self.basis[0] * float(self.stream.square().mean().sqrt()) * self.width**0.5
        module = self.block.get_submodule(part.module)
        with self.edited(parts), hooked([module.register_forward_hook(on_output(lambda y: y + added))]):
            found = self._apart(self.run(clean=True)) @ self.basis[0] / added.norm()
        if float(found.max() - found.min()) > 1e-2 * float(found.abs().max()):
            return None
        factor = float(found.mean())
        return 1.0 if abs(factor - 1) < 1e-5 else factor

    def leak(self, parts: Sequence[Candidate], wrote: float) -> float:
        """What leaves the block along V when it enters without and `parts` are edited, relative to what it wrote."""
        with self.edited(parts):
            return self.along(self.run(clean=True)) / max(wrote, 1e-30)

    def reach(self, parts: Sequence[Candidate], part: Candidate, wrote: float) -> float:
        """What leaves the block along V when `part` alone writes there, and much, relative to what the block wrote."""
        with self.edited(parts):
            parameter = self.block.get_parameter(part.weight or "")
            rows = parameter.data.movedim(part.axis, -1)
            drawn = torch.randn(*rows.shape[:-1], len(self.basis), generator=torch.Generator().manual_seed(0))
            size = 10 * float(rows.square().mean().sqrt()) * self.width**0.5
            parameter.data = (rows + size * drawn.to(rows.device) @ self.basis).movedim(-1, part.axis)
            return self.along(self.run(clean=True)) / max(wrote, 1e-30)


def _remover(block: nn.Module, part: Candidate, basis: Tensor) -> Any:
    if part.weight is not None:
        return lambda y: remove_from_outputs(y, basis[None], 1.0)
    bias = block.get_parameter(part.bias or "").data
    return lambda y: y - (bias @ basis.T) @ basis


def norms_gain(model: nn.Module, names: Sequence[str], d_model: int) -> tuple[Float[Tensor, " d"], bool]:
    """The gain of norms one behind the other, and whether they take the mean off.

    Raises `AnatomyError` for several of which one does.
    """
    gains = [norm_gain(model.get_submodule(name), d_model) for name in names]
    if len(gains) > 1 and any(centred for _, centred in gains):
        raise AnatomyError(f"norms {', '.join(names)}: expected at most one behind the other that takes the mean off")
    product = gains[0][0]
    for gain, _ in gains[1:]:
        product = product * gain
    return product, gains[0][1]


def norm_gain(norm: nn.Module, d_model: int) -> tuple[Float[Tensor, " d"], bool]:
    """The gain of a norm, up to a constant, and whether it takes the mean off first.

    Learnt from what the norm does to ±1, not from its class: some multiply by `weight`, some by 1 + `weight`. A bias
    is the even part of what it does and falls out.
    """
    signs = torch.ones(2, d_model, device=device_of(norm))
    signs[1, ::2] = -1  # (nearly) without a mean, so that a centring norm shows its gain too
    with torch.inference_mode():
        plain, alternating = (norm(signs) - norm(-signs)) / 2
    centred = bool(plain.abs().max() < 1e-3 * alternating.abs().max())
    gain = alternating * signs[1] if centred else plain
    return gain.float().cpu(), centred
