"""Residual accounting: which parameters of a block write to the stream, and the proof that there are no others.

Proof by trial. A random subspace V is taken out of the stream that enters a block and out of the parameters said to
write. What leaves the block must then hold nothing along V: a writer that was not found would put some there. Which
parameters are needed for that is found by leaving out one after the other. No table of names is needed, so an
architecture never seen before needs no code when this holds for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.algebra import orthonormal
from abliterate.errors import AnatomyError, NumericalError
from abliterate.model.anatomy.blocks import Call
from abliterate.model.anatomy.trial import BlockTrial, Candidate, candidates, joined, norms_gain
from abliterate.model.anatomy.writers import Kind, Writer, kind_of
from abliterate.model.batches import hooked
from abliterate.model.offloaded import device_of, float_copy

#: What may be left along V behind a block, relative to what the block wrote (computed in float32).
TOLERANCE = 1e-3

#: Below this share of a random vector's part along V, a norm's input holds nothing of V.
_NOTHING = 1e-3


def random_subspace(d_model: int, seed: int = 0) -> Float[Tensor, "k d"]:
    """A few random directions: what is proved for them holds for all, but for a coincidence."""
    generator = torch.Generator().manual_seed(seed)
    return orthonormal(torch.randn(max(1, min(4, d_model // 8)), d_model, generator=generator))


def structure(
    block: nn.Module, call: Call, basis: Float[Tensor, "k d"], where: str, max_leak: float = TOLERANCE
) -> list[Candidate]:
    """The parts of a block that write to the stream, from a float32 copy with random numbers in their place.

    Random numbers, so that what happens to be zero in this model (a fresh bias) is found all the same.

    Raises `AnatomyError` when more is left along V than that, whatever is edited.
    """
    twin = float_copy(block)
    parts = candidates(twin, basis.shape[1])
    _draw(twin, parts)
    trial = BlockTrial(twin, call, basis)
    parts = _at_called(trial, parts)
    wrote = trial.along(trial.run(clean=False) - trial.stream)
    parts, norms = _behind_norms(trial, parts)
    leak = trial.leak(parts, wrote)
    if not leak <= max_leak:
        raise AnatomyError(not_closed(where, block, leak, _known(trial, parts, wrote, leak), norms, trial))
    if leak > TOLERANCE:  # what leaks hides what leaving one out would show
        return [part for part in parts if part.weight is not None and trial.reach(parts, part, wrote) > 3 * leak + 0.5]
    enough = max(30 * leak, 1e-5)
    for pattern in dict.fromkeys(part.pattern for part in reversed(parts)):
        fewer = [part for part in parts if part.pattern != pattern]
        if trial.leak(fewer, wrote) <= enough:
            parts = fewer
    return parts


def _at_called(trial: BlockTrial, parts: list[Candidate]) -> list[Candidate]:
    """Put the hook of a module that is never called itself (its parameters are used from outside) around it."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda _, __, ___, name=name: called.add(name))
        for name, module in trial.block.named_modules()
    ]
    with hooked(handles):
        trial.run(clean=False)

    def around(name: str) -> str:
        while name and name not in called and not re.search(r"\.\d+(\.|$)", name):  # experts may just not be chosen
            name = name.rpartition(".")[0]
        return name

    return [replace(part, module=around(part.module)) for part in parts]


def _draw(twin: nn.Module, parts: Sequence[Candidate]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in dict.fromkeys(name for part in parts for name in (part.weight, part.bias) if name):
        data = twin.get_parameter(name).data
        noise = torch.randn(data.shape, generator=generator).to(data.device)
        spread = float(data.std()) if data.numel() > 1 else 0.0
        data.copy_(noise * (spread if spread > 1e-3 and spread < 10 else 0.02))


def _behind_norms(trial: BlockTrial, parts: list[Candidate]) -> tuple[list[Candidate], dict[str, str]]:
    """Say which parts write through which norms, the norm nearest to the stream last.

    A norm stands behind parts when its input holds nothing of V once they are edited; those that, left alone, put V
    into it are the ones. Norms behind norms show once the first ones are accounted for.
    """
    kinds: dict[str, str] = {}
    while True:
        weights = [part for part in parts if part.weight is not None]
        with trial.edited(weights):
            silent = {name for name, share in _norm_inputs(trial).items() if share < _NOTHING} - kinds.keys()
        feeding: dict[str, str] = {}
        for pattern in dict.fromkeys(part.pattern for part in weights) if silent else ():
            with trial.edited([part for part in weights if part.pattern != pattern]):
                fed = [name for name, share in _norm_inputs(trial).items() if name in silent and share >= _NOTHING]
            if fed:
                feeding[pattern] = fed[0]
        if not feeding:
            return parts, kinds
        kinds |= {name: type(trial.block.get_submodule(name)).__name__ for name in feeding.values()}
        parts = [
            replace(part, post_norms=(*part.post_norms, feeding[part.pattern])) if part.pattern in feeding else part
            for part in parts
        ]


def _norm_inputs(trial: BlockTrial) -> dict[str, float]:
    """For every module that makes another vector of the stream's width of one: the share of V in what it takes.

    Relative to that of a random vector.
    """
    shares: dict[str, float] = {}
    handles = []
    d_model = trial.basis.shape[1]
    usual = (len(trial.basis) / d_model) ** 0.5
    for name, module in trial.block.named_modules():
        if next(module.children(), None) is not None or isinstance(module, nn.Linear | nn.Embedding):
            continue

        def seen(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            taken = args[0] if args else None
            if not isinstance(taken, Tensor) or not isinstance(output, Tensor) or taken.shape != output.shape:
                return
            if taken.shape[-1] == d_model and not torch.equal(taken, output):
                share = trial.along(taken) / max(float(taken.cpu().double().norm()), 1e-30) / usual
                shares[name] = max(share, shares.get(name, 0.0))

        handles.append(module.register_forward_hook(seen))
    with hooked(handles):
        trial.run(clean=False)
    return shares


def _known(trial: BlockTrial, parts: Sequence[Candidate], wrote: float, leak: float) -> list[str]:
    """Parts that do write: without them even more leaks."""
    known = []
    for part in parts:
        without = trial.leak([other for other in parts if other.pattern != part.pattern], wrote)
        if without > 1.02 * leak + 1e-3:
            known.append(part.name)
    return known


def not_closed(
    where: str, block: nn.Module, error: float, known: Sequence[str], norms: Mapping[str, str], trial: BlockTrial
) -> str:
    """The message for a block that writes past all known writers."""
    hints = [f"behind '{name}' ({kind})" for name, kind in norms.items()]
    if (name := _norm_on_stream(trial)) is not None:
        hints.append(f"the norm '{name}' stands on the residual stream itself")
    return (
        f"block {where} ({type(block).__name__}): not every writer to the residual stream is known: relative error "
        f"{error:.2g}, expected at most {TOLERANCE:.0e}; {'; '.join([*hints, ''])}--max-leak goes on without what "
        f"leaks; known writers: {', '.join(known) or 'none'}"
    )


def _norm_on_stream(trial: BlockTrial) -> str | None:
    """The norm whose output is what leaves the block, if one is."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in trial.block.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor) and module.get_parameter("weight").dim() == 1:

            def seen(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    outputs[name] = output.detach().clone()

            handles.append(module.register_forward_hook(seen))
    with hooked(handles):
        given = trial.run(clean=False)
    return next((n for n, x in outputs.items() if x.shape == given.shape and torch.equal(x, given)), None)


@dataclass(frozen=True, slots=True)
class Account:
    """The writers of one block, and the relative error that is left."""

    writers: tuple[Writer, ...]
    error: float


def close_block(
    block: nn.Module,
    index: int,
    name: str,
    call: Call,
    basis: Float[Tensor, "k d"],
    known: dict[Any, list[Candidate]],
    max_leak: float = TOLERANCE,
) -> Account:
    """Prove the writers of one block on its own numbers; blocks built alike share the structure in `known`.

    Proved is that nothing else writes, and that the same edit as hooks and as weights gives the same stream.

    Raises `AnatomyError` naming the block, `NumericalError` when it computes NaN or infinity.
    """
    basis = basis.to(device_of(block))
    key = build(block)
    trial = BlockTrial(float_copy(block), call, basis)
    after = trial.run(clean=False)
    if not bool(torch.isfinite(after).all()):
        raise NumericalError(f"block {name}: expected finite numbers, found NaN or infinity; is the model damaged?")
    wrote = trial.along(after - trial.stream)
    if key in known and (error := trial.leak(known[key], wrote)) <= max_leak:
        parts = known[key]
    else:
        del trial  # one float32 copy at a time
        parts = structure(block, call, basis, name, max_leak)
        known.setdefault(key, parts)
        trial = BlockTrial(float_copy(block), call, basis)
        error = trial.leak(parts, wrote)
        if math.isnan(error):
            raise NumericalError(f"block {name}: its numbers are too large to compute with; is the model damaged?")
        if error > max_leak:
            raise AnatomyError(not_closed(name, block, error, [part.name for part in parts], {}, trial))
    _check_hooks(trial, parts, name, block, float((after - trial.stream).cpu().double().norm()))
    writers = tuple(_writer(trial.block, part, name, index, trial.width) for part in parts)
    if index == 0:
        writers = tuple(
            replace(w, multiplier=None if w.kind is Kind.EXPERTS else trial.multiplier(parts, part))
            if not w.post_norms
            else w
            for w, part in zip(writers, parts, strict=True)
        )
    return Account(writers, error)


def build(block: nn.Module) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """How a block is built: names, classes and shapes. Blocks built alike have the same structure."""
    return tuple(
        (name, type(module).__name__, *(tuple(p.shape) for p in module.parameters(recurse=False)))
        for name, module in block.named_modules()
    )


def _check_hooks(trial: BlockTrial, parts: Sequence[Candidate], name: str, block: nn.Module, wrote: float) -> None:
    with trial.edited(parts):
        weights = trial.run(clean=False)
    with trial.ablated(parts):
        hooks = trial.run(clean=False)
    error = float((weights - hooks).cpu().double().norm()) / max(wrote, 1e-30)
    if error > TOLERANCE:
        raise AnatomyError(
            f"block {name} ({type(block).__name__}): an edit as hooks and as weights differ by {error:.2g}, expected "
            f"at most {TOLERANCE:.0e}; writers: {', '.join(part.name for part in parts)}"
        )


def _writer(block: nn.Module, part: Candidate, name: str, index: int, d_model: int) -> Writer:
    gain, centred = None, False
    if part.post_norms:
        gain, centred = norms_gain(block, part.post_norms, d_model)
    return Writer(
        module=joined(name, part.module) if part.module else name,
        kind=kind_of(block, part.module),
        block=index,
        weight=None if part.weight is None else f"{name}.{part.weight}",
        axis=part.axis,
        bias=None if part.bias is None else f"{name}.{part.bias}",
        post_norms=tuple(f"{name}.{norm}" for norm in part.post_norms),
        gain=gain,
        centred=centred,
    )
