"""Whether the files of a model hold every number of it: asked by every loader, answered in one way.

transformers draws at random what it does not find and leaves out what it does not know; it only warns of both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from abliterate.errors import CheckpointError
from abliterate.model._compat import loading_report, quiet_transformers
from abliterate.model.anatomy.names import Source, stored_twice, uneven_parts, without_tensors

_BLOCK = re.compile(r"(.*?)\.(\d+)\.(.*)", re.DOTALL)

Report = Mapping[str, Any]
"""transformers' report on loading: `missing_keys`, `unexpected_keys`, `mismatched_keys` (name, found, expected)."""


def check_stored(
    name: str, skeleton: Any, stored: Mapping[str, torch.Tensor], sources: Mapping[str, Sequence[Source]]
) -> None:
    """Check that `stored` (meta tensors by name, as model `name` has them in its files) is all of its `skeleton`.

    `sources` are the stored tensors by the parameter that they go into. No number is read.

    Raises what `check_report` raises.
    """
    try:
        with quiet_transformers():
            report = loading_report(skeleton, skeleton.config, stored)
    except Exception as error:
        if uneven := uneven_parts(sources, stored):
            what = "parameters cannot be put together: some of their parts are missing or of another shape"
            raise CheckpointError(f"model '{name}': {_named(uneven, what)}; download the model again") from error
        # What is computed while it is loaded cannot be done on the meta device: names are left.
        report = {"missing_keys": without_tensors(skeleton, sources)}
    check_report(name, report, skeleton, stored_twice(sources))


def check_report(name: str, report: Report, model: Any, twice: Mapping[str, Sequence[str]] = {}) -> None:
    """Check what transformers reports on loading model `name`, and that no parameter is stored `twice`.

    Raises `CheckpointError`, naming a few tensors, for parameters without a tensor, with one of another shape or with
    several, and for tensors beside those of a module of `model` that would not be used.
    """
    shapes = sorted(report.get("mismatched_keys") or (), key=lambda item: str(item[0]))
    wrong = [f"{key} {list(found)} instead of {list(expected)}" for key, found, expected in shapes]
    doubled = [f"{key} ({' and '.join(tensors[:3])})" for key, tensors in sorted(twice.items())]
    unused = _of_its_modules(model, report.get("unexpected_keys") or ())
    problems = (
        _named(sorted(report["missing_keys"]), "tensors that its configuration asks for are not in its files"),
        _named(wrong, "tensors have another shape than its configuration asks for"),
        _named(doubled, "parameters are stored more than once"),
        _named(unused, "tensors of its modules are unknown to its configuration and would be left out"),
    )
    if any(problems):
        raise CheckpointError(f"model '{name}': {'; '.join(filter(None, problems))}; download the model again")


def check_adapter(folder: str, report: Report) -> None:
    """Check what transformers reports on putting the adapter in `folder` on a model.

    Raises `CheckpointError` when some of it is not in its file, is of another shape, or fits nothing in the model.
    """
    wrong = sorted(str(key) for key, *_ in report.get("mismatched_keys") or ())
    problems = (
        _named(sorted(report["missing_keys"]), "tensors that its configuration asks for are not in its file"),
        _named(wrong, "tensors have another shape than the model asks for"),
        _named(sorted(report.get("unexpected_keys") or ()), "tensors fit nothing in the model"),
    )
    if any(problems):
        raise CheckpointError(f"adapter '{folder}': {'; '.join(filter(None, problems))}; give its own base")


def _named(names: Sequence[str], what: str) -> str:
    """How many, what is wrong with them, and the first few."""
    return f"{len(names)} {what}, {', '.join(names[:3])}{' …' if len(names) > 3 else ''}" if names else ""


def _of_its_modules(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Weights, biases and adapters beside parameters of the model: without them it is another function."""
    if not (names := sorted(unexpected)):
        return []
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    holders = {name.rpartition(".")[0] for name in parameters}
    buffers = {name for name, _ in model.named_buffers()}
    parts = [(name, *name.rpartition(".")[::2]) for name in names if name not in buffers]
    used = ("weight", "bias")
    beside = [name for name, module, last in parts if ".lora_" in name or (last in used and module in holders)]
    return [*beside, *_further_blocks(parameters, names)]


def _further_blocks(parameters: Iterable[str], unexpected: Sequence[str]) -> list[str]:
    """Tensors of blocks just like the model's own; those that predict further tokens hold other kinds too."""
    known = {_inside(name)[::2] for name in parameters}
    blocks: dict[tuple[str, str], list[tuple[str, bool]]] = {}
    for name in unexpected:
        where, number, what = _inside(name)
        if number:
            blocks.setdefault((where, number), []).append((name, (where, what) in known))
    return [name for block in blocks.values() if all(alike for _, alike in block) for name, _ in block]


def _inside(name: str) -> tuple[str, str, str]:
    """The list of blocks a tensor is in, the number of its block, and what it is there, whichever expert it is of."""
    found = _BLOCK.fullmatch(name)
    return (found[1], found[2], re.sub(r"(?<=\.)\d+(?=\.)", "*", found[3])) if found else (name, "", "")
