"""What is written to the stream before the first block: embeddings, positions, and what stands between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.algebra import before_norm, remove_from_outputs
from abliterate.errors import AnatomyError
from abliterate.model._compat import is_head
from abliterate.model.anatomy.accounting import TOLERANCE
from abliterate.model.anatomy.trial import norm_gain
from abliterate.model.anatomy.writers import Kind, Writer
from abliterate.model.batches import body, hooked, on_output
from abliterate.model.offloaded import value_of


class _AtFirstBlock(BaseException):
    """The stream has reached the first block: nothing after it is needed."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


@dataclass(frozen=True, slots=True)
class _Seen:
    """A module without children that was called before the first block and gave vectors of the stream's width."""

    name: str
    module: nn.Module
    taken: Tensor | None
    output: Tensor

    @property
    def is_map(self) -> bool:
        return isinstance(self.module, nn.Linear | nn.Embedding)

    @property
    def is_norm(self) -> bool:
        return not self.is_map and self.taken is not None and self.taken.shape == self.output.shape


class _Front:
    """Runs of the model up to its first block."""

    def __init__(self, model: Any, first: nn.Module, ids: Tensor, basis: Float[Tensor, "k d"]) -> None:
        self.model, self.ids, self.basis = model, ids, basis
        self._first = first
        inside = {id(module) for module in first.modules()}
        self.leaves = [
            (name, module)
            for name, module in model.named_modules()
            if id(module) not in inside and next(module.children(), None) is None
        ]

    def run(self, changes: Mapping[str, Any] | None = None) -> tuple[Tensor, dict[str, _Seen]]:
        """The stream at site 0 with the outputs of some modules changed, and all modules that gave such vectors."""
        seen: dict[str, _Seen] = {}
        handles = [self._first.register_forward_pre_hook(_stop, with_kwargs=True)]
        for name, change in (changes or {}).items():
            handles.append(self.model.get_submodule(name).register_forward_hook(on_output(change)))
        width = self.basis.shape[1]
        for name, module in self.leaves:

            def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                output = output[0] if isinstance(output, tuple) and output else output
                if isinstance(output, Tensor) and output.is_floating_point() and output.shape[-1] == width:
                    taken = args[0] if args and isinstance(args[0], Tensor) else None
                    seen[name] = _Seen(name, module, taken, output.detach().clone())

            handles.append(module.register_forward_hook(note))
        with hooked(handles), torch.inference_mode():
            try:
                body(self.model)(input_ids=self.ids, use_cache=False)
            except _AtFirstBlock as arrived:
                return arrived.stream, seen
        raise AnatomyError("blocks: the first block was not called in a forward pass")

    def share(self, x: Tensor) -> float:
        """‖V x‖ / ‖x‖, relative to that of a random vector."""
        inside = (x.float().reshape(-1, self.basis.shape[1]) @ self.basis.to(x.device).T).cpu().double().norm()
        usual: float = (self.basis.shape[0] / self.basis.shape[1]) ** 0.5
        return float(inside / x.cpu().double().norm().clamp_min(1e-30)) / usual


def _stop(_: nn.Module, args: Any, kwargs: Any) -> None:
    raise _AtFirstBlock((args[0] if args else kwargs["hidden_states"]).detach())


def study_front(
    model: Any, first: nn.Module, name: str, ids: Tensor, basis: Float[Tensor, "k d"]
) -> tuple[list[Writer], float]:
    """Every writer before the first block, and the relative error that residual accounting leaves.

    Modules without weights that write (fixed positions) are writers without parameters.

    Raises `AnatomyError` when more is left than that.
    """
    front = _Front(model, first, ids, basis)
    stream, seen = front.run()
    writers = [_writer(model, item) for item in seen.values() if item.is_map]
    writers += [_fixed(item) for item in seen.values() if not item.is_map and not item.is_norm]
    # The stream at site 0 is a sum of stored numbers: it can be no more exact than their dtype.
    tolerance = max(TOLERANCE, 4 * torch.finfo(stream.dtype).eps)
    writers = _behind_norms(front, writers, tolerance)
    error = _leak(front, writers)
    if error > tolerance:
        known = ", ".join(writer.module for writer in writers)
        raise AnatomyError(
            f"embedding (input of block {name}): it holds what no known embedding writes: relative error "
            f"{error:.2g}, expected at most {tolerance:.0e}; known writers: {known or 'none'}"
        )
    size = float(stream.float().square().mean().sqrt())
    writers = [w for w in writers if _reach(front, writers, w, size) > max(10 * error, TOLERANCE)]
    return _with_multipliers(writers, seen, stream, tolerance), error


def _leak(front: _Front, writers: Sequence[Writer]) -> float:
    return front.share(front.run({w.module: _change(front, w) for w in writers})[0])


def _reach(front: _Front, writers: Sequence[Writer], writer: Writer, size: float) -> float:
    """The share of V in the stream when one writer writes vectors in V as long as the stream, and no other any.

    Its own numbers may be small (next to what half precision rounds off) or zero.
    """
    basis = _basis(front, writer)
    removed = _change(front, writer)

    def spoken(y: Tensor) -> Tensor:
        drawn = torch.randn(*y.shape[:-1], len(basis), generator=torch.Generator().manual_seed(0)) @ basis.cpu()
        length: float = size * (y.shape[-1] / len(basis)) ** 0.5
        loud: Tensor = removed(y).float() + length * drawn.to(y.device)
        return loud.to(y.dtype)

    changes = {w.module: _change(front, w) for w in writers}
    return front.share(front.run({**changes, writer.module: spoken})[0])


def _basis(front: _Front, writer: Writer) -> Tensor:
    """What the writer must not write so that V does not reach the stream."""
    if writer.gain is None:
        return front.basis
    basis: Tensor = before_norm(front.basis, writer.gain, centred=writer.centred)
    return basis


def _change(front: _Front, writer: Writer) -> Any:
    basis = _basis(front, writer)
    if writer.weight is None and writer.bias is not None:
        bias = value_of(front.model, writer.bias).float()
        constant = (bias @ basis.to(bias.device).T) @ basis.to(bias.device)
        return lambda y: (y.float() - constant).to(y.dtype)
    return lambda y: remove_from_outputs(y, basis[None].to(y.device), 1.0)


def _writer(model: Any, item: _Seen) -> Writer:
    bias = getattr(item.module, "bias", None)
    return Writer(
        module=item.name,
        kind=Kind.EMBEDDING,
        block=None,
        weight=f"{item.name}.weight",
        axis=1 if isinstance(item.module, nn.Embedding) else 0,
        bias=None if bias is None else f"{item.name}.bias",
        inner=_inner(model, item),
        tied=is_head(model, f"{item.name}.weight"),
    )


def _inner(model: Any, item: _Seen) -> float:
    """The constant by which an embedding multiplies the rows that it looks up; 1 where it does something else."""
    ids, weight = item.taken, item.module.get_parameter("weight")
    if not isinstance(item.module, nn.Embedding) or ids is None or ids.is_floating_point():
        return 1.0
    if ids.shape != item.output.shape[:-1] or int(ids.max()) >= len(weight):
        return 1.0
    rows, output = value_of(model, f"{item.name}.weight")[ids].cpu().double(), item.output.cpu().double()
    scale = float((rows * output).sum() / rows.square().sum().clamp_min(1e-30))
    exact = float((output - scale * rows).norm()) <= 1e-2 * float(output.norm())
    return scale if exact and abs(scale - 1) > 1e-2 else 1.0


def _fixed(item: _Seen) -> Writer:
    return Writer(module=item.name, kind=Kind.EMBEDDING, block=None, weight=None, axis=1, bias=None)


def _behind_norms(front: _Front, writers: list[Writer], tolerance: float) -> list[Writer]:
    """A norm whose input holds nothing of V when all embeddings are edited stands between them and the stream."""
    _, edited = front.run({w.module: _change(front, w) for w in writers})
    norms = [
        item
        for item in edited.values()
        if item.is_norm
        and item.taken is not None
        and front.share(item.taken) <= tolerance
        and not torch.equal(item.taken, item.output)
    ]
    if not norms:
        return writers
    norm = norms[0]
    gain, centred = norm_gain(norm.module, front.basis.shape[1])
    result = [replace(w, post_norms=(norm.name,), gain=gain, centred=centred) for w in writers]
    if getattr(norm.module, "bias", None) is not None:
        tied = any(writer.tied for writer in writers)
        result.append(Writer(norm.name, Kind.EMBEDDING, None, None, 0, f"{norm.name}.bias", tied=tied))
    return result


def _with_multipliers(
    writers: list[Writer], seen: Mapping[str, _Seen], stream: Tensor, tolerance: float
) -> list[Writer]:
    """The constant between each embedding and the stream, where the stream is their weighted sum."""
    plain = [w for w in writers if not w.post_norms and w.module in seen]
    try:
        outputs = [seen[w.module].output.to(stream.device).expand_as(stream) for w in plain]
    except RuntimeError:  # several streams, or rows packed: no plain sum
        return writers
    if not outputs or len(plain) != len(writers):
        return writers
    target = stream.cpu().double().flatten()
    matrix = torch.stack([output.cpu().double().flatten() for output in outputs], dim=1)
    fitted = torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0]
    if float((target - matrix @ fitted).norm() / target.norm()) > tolerance:
        return writers
    ones = torch.ones_like(fitted)
    best = ones if float((target - matrix.sum(1)).norm() / target.norm()) <= tolerance else fitted
    return [replace(w, multiplier=float(m)) for w, m in zip(plain, best, strict=True)]
