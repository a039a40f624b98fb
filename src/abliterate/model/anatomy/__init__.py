"""Blocks, and every writer to the residual stream, found by trial and proved by residual accounting.

See `accounting` for the proof. Where more than 1e-3 of what a block writes is left, a writer was not found, and the
run stops there, naming the block.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from abliterate.errors import AnatomyError
from abliterate.model.anatomy.accounting import TOLERANCE, close_block, random_subspace
from abliterate.model.anatomy.blocks import check_between, find_blocks, probe, probe_ids, stream_out
from abliterate.model.anatomy.front import study_front
from abliterate.model.anatomy.names import Stored, names_on_disk, unclaimed
from abliterate.model.anatomy.trial import Candidate, norms_gain
from abliterate.model.anatomy.writers import Anatomy, Kind, Writer

__all__ = [
    "TOLERANCE",
    "Anatomy",
    "Kind",
    "Stored",
    "Writer",
    "find_blocks",
    "names_on_disk",
    "norms_gain",
    "stream_out",
    "study",
    "unclaimed",
]


def study(model: Any, *, seed: int = 0, max_leak: float = TOLERANCE) -> Anatomy:
    """Find every writer of a live `model` and prove that there is no other.

    Costs one short forward pass, and a few of each block in float32. `max_leak` lets blocks pass that write that share
    along a direction although all their writers are edited.

    Raises `AnatomyError`, naming the block, for anything that is not fully understood.
    """
    if not isinstance(model, nn.Module):
        raise AnatomyError(f"study: expected a live model of transformers, found {type(model).__name__}")
    names, blocks = find_blocks(model)
    ids = probe_ids(model, seed)
    calls = probe(model, blocks, ids)
    d_model = _width(model, calls[0].stream.shape[-1])
    check_between(names, calls, TOLERANCE)
    basis = random_subspace(d_model, seed)
    front, error = study_front(model, blocks[0], names[0], ids, basis)
    writers, closure = list(front), [error]
    known: dict[Any, list[Candidate]] = {}
    for index, (name, block, call) in enumerate(zip(names, blocks, calls, strict=True)):
        account = close_block(block, index, name, call, basis, known, max_leak)
        writers += account.writers
        closure.append(account.error)
    return Anatomy(d_model, tuple(names), tuple(writers), tuple(closure))


def _width(model: Any, found: int) -> int:
    """The width of the stream; several streams may lie side by side (hyper-connections)."""
    stated = getattr(model.config.get_text_config(decoder=True), "hidden_size", found)
    return stated if found % stated == 0 else found
