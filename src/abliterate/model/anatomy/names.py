"""Names in the model ↔ tensors on disk.

transformers renames, stacks and transposes on loading: its own tables are asked what each stored tensor becomes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from abliterate.errors import CheckpointError
from abliterate.model._compat import loading_table, natural_key, tied_names

#: Endings of stored tensors that hold the numbers of a parameter packed: the stream is on the first of the two axes
#: of each expert, whatever the order in memory (transformers transposes when it unpacks).
_PACKED = "_blocks"


class _HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor on disk that holds a parameter, or one expert of it.

    `axis` of the stored tensor runs over the stream. `expert` is the entry along the parameter's first axis when
    experts are stacked in memory and stored one by one.
    """

    parameter: str
    tensor: str
    axis: int
    expert: int | None = None


def names_on_disk(
    model: Any, axes: Mapping[str, int], stored: Mapping[str, _HasShape]
) -> dict[str, tuple[Stored, ...]]:
    """Where each parameter of `axes` (name → axis of the stream in memory, −1 the last) lies among `stored` tensors.

    Parameters that share memory share their tensors.

    Raises `CheckpointError` when a parameter has no tensor, or tensors that do not fit it.
    """
    found_sources = sources(model, stored)
    aliases = _aliases(model)
    mapping: dict[str, tuple[Stored, ...]] = {}
    for name, axis in axes.items():
        shape = tuple(model.get_parameter(name).shape)
        found = [group for alias in aliases[name] for group in found_sources.get(alias, [])]
        if len(own := found_sources.get(name, [])) == 1:  # tied in memory, and stored for each all the same
            found = own
        mapping[name] = _layout(name, axis % len(shape), shape, found, stored)
    _refuse_shared(mapping, aliases)
    return mapping


def unclaimed(model: Any, stored: Mapping[str, _HasShape]) -> list[str]:
    """Stored matrices that become no part of the model: layers that transformers does not load (token prediction …)."""
    known = {*model.state_dict()}
    packed = ("_scale", "_scale_inv", "_scales", "_blocks", "_zero_point", "_packed")
    return [
        source.tensor
        for name, group in sources(model, stored).items()
        if name not in known
        for source in group
        if len(stored[source.tensor].shape) > 1 and not source.tensor.endswith(packed)
    ]


def stored_twice(found: Mapping[str, Sequence[Source]]) -> dict[str, list[str]]:
    """Parameters that several tensors of `sources` would be loaded into, one over the other, and those tensors."""
    whole = {name: [source.tensor for source in group if source.whole] for name, group in found.items()}
    return {name: tensors for name, tensors in whole.items() if len(tensors) > 1}


def without_tensors(model: Any, found: Mapping[str, Sequence[Source]]) -> list[str]:
    """Parameters of the model that no tensor of `sources` goes into, under none of their names."""
    return [name for name, aliases in _aliases(model).items() if not any(found.get(alias) for alias in aliases)]


def uneven_parts(found: Mapping[str, Sequence[Source]], stored: Mapping[str, _HasShape]) -> list[str]:
    """Parameters stacked of several kinds of tensors of `sources`, of which one has fewer or other shapes."""
    uneven = []
    for name, group in found.items():
        kinds: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        for source in group:
            if source.merged:
                kinds[re.sub(r"(?<=\.)\d+(?=\.)", "*", source.tensor)].append(tuple(stored[source.tensor].shape))
        if len({len(parts) for parts in kinds.values()}) > 1 or any(len(set(parts)) > 1 for parts in kinds.values()):
            uneven.append(f"{name} from {len(group)} tensors")
    return uneven


def tied_and_stored(model: Any, found: Mapping[str, Sequence[Source]]) -> list[tuple[str, str]]:
    """Pairs of tensors of `sources` for parameters that the model ties and that are stored each for itself.

    Empty unless that is so of all that are tied.
    """
    pairs = []
    for target, origin in tied_names(model).items():
        mine, theirs = found.get(target, ()), found.get(origin, ())
        if len(mine) != 1 or len(theirs) != 1:
            return []
        pairs.append((theirs[0].tensor, mine[0].tensor))
    return pairs


@dataclass(frozen=True, slots=True)
class Source:
    """A stored tensor that goes into a parameter; `merged` when many become one, `transposed` when always turned,
    `whole` when it is the parameter as it is.
    """

    tensor: str
    merged: bool
    transposed: bool
    whole: bool


def sources(model: Any, stored: Iterable[str]) -> dict[str, list[Source]]:
    """Stored tensors by the parameter they are loaded into, in the order in which experts are stacked."""
    table = loading_table(model)
    known: dict[str, Any] = dict(model.state_dict())
    known |= {name + _PACKED: value for name, value in known.items()}
    found: dict[str, list[Source]] = defaultdict(list)
    for tensor in sorted(stored, key=natural_key):
        name, operations = table.parameter(tensor, known)
        turned = "Transpose" in operations and not getattr(operations["Transpose"], "check_dims", False)
        merged = "MergeModulelist" in operations
        found[name.removesuffix(_PACKED)].append(Source(tensor, merged, turned, whole=not operations))
    return found


def _aliases(model: Any) -> dict[str, list[str]]:
    """All names of each parameter, by each of its names."""
    same: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(name)
    return {name: names for names in same.values() for name in names}


def _layout(
    name: str, axis: int, shape: tuple[int, ...], found: Sequence[Source], stored: Mapping[str, _HasShape]
) -> tuple[Stored, ...]:
    """The stream's axis in every stored tensor of one parameter."""
    if len(found) == 1 and found[0].tensor.endswith(_PACKED) and not name.endswith(_PACKED):
        return (Stored(name, found[0].tensor, len(shape) - 2),)
    experts = bool(found) and found[0].merged and len(found) == shape[0]
    if len(found) != 1 and not experts:
        raise CheckpointError(
            f"parameter '{name}': expected exactly one tensor in the checkpoint, found "
            f"{', '.join(source.tensor for source in found[:4]) or 'none'}"
        )
    inner, inner_axis = (shape[1:], axis - 1) if experts else (shape, axis)
    return tuple(
        Stored(
            name,
            source.tensor,
            _stored_axis(source, inner, inner_axis, tuple(stored[source.tensor].shape)),
            index if experts else None,
        )
        for index, source in enumerate(found)
    )


def _stored_axis(source: Source, shape: tuple[int, ...], axis: int, on_disk: tuple[int, ...]) -> int:
    swapped = (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else shape
    if len(shape) > 1 and on_disk == swapped and (source.transposed or on_disk != shape):
        return {len(shape) - 1: len(shape) - 2, len(shape) - 2: len(shape) - 1}.get(axis, axis)
    if on_disk != shape:
        raise CheckpointError(
            f"tensor '{source.tensor}': expected shape {list(shape)} as the configuration says, found {list(on_disk)}"
        )
    return axis


def _refuse_shared(mapping: Mapping[str, tuple[Stored, ...]], aliases: Mapping[str, list[str]]) -> None:
    holder: dict[str, str] = {}
    for name, places in mapping.items():
        for place in places:
            other = holder.setdefault(place.tensor, name)
            if other not in aliases[name]:
                raise CheckpointError(f"tensor '{place.tensor}': expected one parameter to hold it, found several")
