"""A lone checkpoint: has a direction been taken out of its writers, which, where, and how much of it?

Every tensor is read once, and once more along what was found. Two families of tests look for directions that hardly
anything is written along. *Windows* pool all writers, or those of one component, over a range of depth: an edit with
one direction shows there however large the model is, since what is natural to single layers averages out. *Layers*
look at every unit with clearly more inputs than the stream is wide (others are singular by nature): edits with a
direction of their own for each layer show only there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.forensics.power import Power, power
from abliterate.forensics.reading import InspectedModel, Place, maps
from abliterate.forensics.spectra import Dip, dips, gram, levelled, lowest
from abliterate.forensics.verdict import Conclusion, Evidence, judge
from abliterate.model.anatomy import Kind

#: Parts of the depth whose sums are kept, for the writers of each component: windows are runs of them.
_PARTS = 4
#: Units that a window has at least.
_FEWEST = 3
#: Inputs per coordinate of the stream from which the spectrum of one unit says something.
_WIDE = 1.5
#: Depth from which the dip of one unit counts as the trace of an edit, once the verdict says that there is one.
_CLEAR = 1.0
#: How much deeper layers by themselves must be than pooled ones, for each to have had a direction of its own.
_DEEPER = 1.3
#: Share of what is natural (1) below which a unit counts as edited.
_LITTLE = 0.36
#: Mean cosine of neighbours from which the vectors of all layers are one direction.
_SAME = 0.99

Unit = tuple[int | None, Kind]


@dataclass(frozen=True, slots=True)
class Window:
    """One pooled test: which components, blocks `first` to `last`, whether rows were levelled, the dip, and `basis`.

    `basis` [rank, d] is the dip in coordinates of the stream, orthonormal.
    """

    components: str
    first: int
    last: int
    levelled: bool
    dip: Dip
    basis: Float[Tensor, "rank d"]


@dataclass(frozen=True, slots=True)
class Written:
    """How much a unit writes along the recovered direction.

    `share` is 1 where as much is written as rows of such lengths would by chance, `strength` ≈ 1 − √share, and
    `direction` the row of `Trace.directions` that it was measured along.
    """

    block: int | None
    kind: Kind
    share: float
    strength: float
    direction: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What a lone checkpoint shows. `directions` [m, d] are unit rows; `per_layer` says that they belong to layers.

    `power` says which edits would have shown in this checkpoint, where that was asked for and none was found.
    """

    evidence: Evidence
    verdict: Conclusion
    window: Window | None
    directions: Float[Tensor, "m d"]
    per_layer: bool
    row_levelled: bool
    written: tuple[Written, ...]
    variant: str | None
    power: Power | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks with an edited writer."""
        return tuple(sorted({unit.block for unit in self.edited if unit.block is not None}))

    @property
    def edited(self) -> tuple[Written, ...]:
        """Units that write clearly too little along the direction."""
        return tuple(unit for unit in self.written if unit.share < _LITTLE)


@dataclass(frozen=True, slots=True)
class _Lone:
    """A unit's own dips: along raw rows, and with rows levelled (`lengths` are those of its rows)."""

    unit: Unit
    raw: Dip
    level: Dip
    lengths: Float[Tensor, " d"]

    @property
    def depth(self) -> float:
        return max(self.raw.depth, self.level.depth)


def inspect(
    subject: InspectedModel,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    with_power: bool = False,
) -> Trace:
    """Look for directions that have been taken out (see this module's docstring).

    `with_power` also measures what would have been seen, unless the verdict is "altered" (see `forensics.power`).

    Memory: one tensor and about a dozen matrices [d, d]. Raises `CheckpointError` for tensors that cannot be read.
    """
    progress = progress or (lambda _: None)
    sums, counts, lone = _scan(subject, device, progress)
    windows = _windows(sums, counts, subject.layers)
    best = max(windows, key=lambda window: window.dip.depth, default=None)
    evidence = Evidence(
        pooled=0.0 if best is None else best.dip.depth,
        layers=_mean_of_best([one.depth for one in lone]),
    )
    verdict = judge(evidence)
    trace = _read_off(subject, best, lone, evidence, progress)
    if with_power and verdict.word != "altered":
        return replace(trace, power=_power(sums, counts, evidence))
    return trace


def _power(sums: dict[tuple[str, int], Tensor], counts: dict[tuple[str, int], int], evidence: Evidence) -> Power:
    """What planted edits of all writers would have given, single layers being what they are."""
    if sum(counts.values()) < _FEWEST:
        return Power(None, 0, {})
    square = functools.reduce(torch.add, sums.values()) / sum(counts.values())
    return power(square, lambda depth: judge(Evidence(depth, evidence.layers)).word == "altered")


def _read_off(
    subject: InspectedModel,
    best: Window | None,
    lone: Sequence[_Lone],
    evidence: Evidence,
    progress: Callable[[int], None],
) -> Trace:
    """The directions that are not written, where, and how little they are."""
    verdict = judge(evidence)
    empty = Trace(evidence, verdict, best, torch.zeros(0, subject.d_model), False, False, (), None)
    if verdict.word == "no trace":
        return empty
    by_pool = best is not None and judge(Evidence(best.dip.depth, 0.0)).probability >= 0.5
    clear = [one for one in lone if one.depth >= _CLEAR]
    own_ones = bool(clear) and evidence.layers > _DEEPER * evidence.pooled
    if by_pool and best is not None and not own_ones:
        basis = best.basis.float()
        written = _measure(subject, [(place, 0) for place in subject.places], basis[None], False, progress)
        return _named(Trace(evidence, verdict, best, basis, False, False, written, None))
    if not clear:
        return empty
    directions, by_rows = _own_directions(clear)
    nearest = [(place, _nearest(place, clear)) for place in subject.places]
    written = _measure(subject, nearest, directions[:, None], by_rows, progress)
    return _named(Trace(evidence, verdict, best, directions, True, by_rows, written, None))


def _scan(
    subject: InspectedModel, device: str, progress: Callable[[int], None]
) -> tuple[dict[tuple[str, int], Tensor], dict[tuple[str, int], int], list[_Lone]]:
    """Sums of G by component and part of the depth, how many units are in each, and the dips of single units."""
    sums: dict[tuple[str, int], Tensor] = {}
    counts: dict[tuple[str, int], int] = {}
    lone: list[_Lone] = []
    for unit, places in subject.units.items():
        block, kind = unit
        if block is None:  # an embedding is in no window, and no layer
            continue
        total = torch.zeros(subject.d_model, subject.d_model, device=device)
        columns = 0
        for place in places:
            for matrix in maps(subject.checkpoint, place):
                total += gram(matrix.to(device))
                columns += matrix.shape[1]
            progress(place.info.nbytes)
        total *= subject.d_model / total.trace().clamp_min(1e-30)
        if columns >= _WIDE * subject.d_model:
            level, lengths = levelled(total)
            lone.append(_Lone(unit, dips(lowest(total)), dips(lowest(level)), lengths.cpu()))
        part = (_component(kind), _PARTS * block // subject.layers)
        sums[part] = sums[part].add_(total) if part in sums else total
        counts[part] = counts.get(part, 0) + 1
    return sums, counts, lone


def _component(kind: Kind) -> str:
    return "mlp" if kind in (Kind.MLP, Kind.EXPERTS) else "attention"


def _windows(sums: dict[tuple[str, int], Tensor], counts: dict[tuple[str, int], int], layers: int) -> list[Window]:
    """All runs of parts of the depth, for all writers and for each component, raw and levelled."""
    found = []
    names = sorted({name for name, _ in sums})
    groups = [("all", names)] * (len(names) > 1) + [(name, [name]) for name in names]
    for name, group in groups:
        for first, last in combinations(range(_PARTS + 1), 2):
            keys = [(part, at) for part in group for at in range(first, last) if (part, at) in sums]
            units = sum(counts[key] for key in keys)
            if units < _FEWEST:
                continue
            square = sums[keys[0]].clone()
            for key in keys[1:]:
                square += sums[key]
            square /= units
            ends = -(-first * layers // _PARTS), -(-last * layers // _PARTS) - 1
            raw = dips(lowest(square))
            level, lengths = levelled(square)
            even = dips(lowest(level))
            found.append(Window(name, *ends, False, raw, raw.basis.cpu()))
            found.append(Window(name, *ends, True, even, _unlevelled(even.basis, lengths).cpu()))
    return found


def _unlevelled(basis: Float[Tensor, "k d"], lengths: Float[Tensor, " d"]) -> Float[Tensor, "k d"]:
    """What is not written, in coordinates of the stream: where D^-½ G D^-½ v = 0, G takes D^-½ v to zero."""
    rows: Tensor = torch.linalg.qr((basis / lengths.to(basis).clamp_min(1e-12)).T).Q.T
    return rows.contiguous()


def _mean_of_best(depths: Sequence[float], most: int = 3) -> float:
    best = sorted(depths, reverse=True)[:most]
    return sum(best) / most if best else 0.0


def _own_directions(clear: Sequence[_Lone]) -> tuple[Float[Tensor, "m d"], bool]:
    """One direction per unit, and whether rows were levelled by what edited them.

    What takes a direction out of rows brought to one length and gives them their lengths back leaves nothing along
    D^-½ r̂: then the levelled vectors of neighbours agree, where raw ones differ as the lengths of rows do. In that
    case they are what is told, since they are what the tool that edited the model took for the direction.
    """
    raw = torch.stack([one.raw.basis[0] for one in clear]).float().cpu()
    even = torch.stack([one.level.basis[0] for one in clear]).float().cpu()
    plain = torch.stack([_unlevelled(one.level.basis[:1], one.lengths)[0] for one in clear]).float().cpu()
    deeper = torch.tensor([one.raw.depth >= one.level.depth for one in clear])
    plain = torch.where(deeper[:, None], raw, plain)
    by_rows = len(clear) > 1 and _agreement(even) > _agreement(plain) + 0.02
    return (even if by_rows else plain), by_rows


def _agreement(vectors: Float[Tensor, "m d"]) -> float:
    """Mean |cos| of neighbours."""
    return float((vectors[1:] * vectors[:-1]).sum(1).abs().mean())


def _nearest(place: Place, clear: Sequence[_Lone]) -> int:
    block = -1 if place.block is None else place.block
    return min(range(len(clear)), key=lambda index: abs((clear[index].unit[0] or 0) - block))


def _measure(
    subject: InspectedModel,
    along: Sequence[tuple[Place, int]],
    directions: Float[Tensor, "m k d"],
    row_levelled: bool,
    progress: Callable[[int], None],
) -> tuple[Written, ...]:
    """Read every tensor again: what it puts along directions, in parts of what rows of such lengths naturally would."""
    shares: dict[tuple[Unit, int], list[float]] = {}
    for place, number in along:
        for matrix in maps(subject.checkpoint, place):
            wide = matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-30) if row_levelled else matrix
            rows = directions[number]
            natural = (rows.square() @ wide.square().sum(1)).sum().clamp_min(1e-30)
            share = float((rows @ wide).square().sum() / natural)
            shares.setdefault(((place.block, place.kind), number), []).append(share)
        progress(place.info.nbytes)
    return tuple(
        Written(block, kind, share := sum(values) / len(values), max(0.0, 1 - share**0.5), number)
        for ((block, kind), number), values in shares.items()
    )


def _named(trace: Trace) -> Trace:
    """The same with what kind of edit it looks like, in words."""
    edited = trace.edited
    if not edited:
        return trace
    kinds = {_component(unit.kind) for unit in edited if unit.block is not None}
    known = {_component(unit.kind) for unit in trace.written if unit.block is not None}
    blocks = trace.layers
    everywhere = {unit.block for unit in trace.written if unit.block is not None}
    strength = sorted(unit.strength for unit in edited)[len(edited) // 2]
    words = []
    if trace.per_layer and not _all_same(trace.directions):
        words.append("a direction of its own for each layer")
    elif len(trace.directions) > 1 and not trace.per_layer:
        words.append(f"{len(trace.directions)} directions")
    else:
        words.append("one direction")
    if trace.row_levelled:
        words.append("taken out of rows of one length (as tools that renormalise rows do)")
    if kinds < known:
        words.append(f"in {' and '.join(sorted(kinds))} only")
    if len(blocks) < 0.9 * len(everywhere):
        words.append(f"in blocks {blocks[0]} to {blocks[-1]}" if blocks else "outside the blocks")
    words.append(
        "at full strength" if strength > 0.95 else f"at a strength of about {strength:.2f} (or {2 - strength:.2f})"
    )
    return replace(trace, variant=", ".join(words))


def _all_same(directions: Float[Tensor, "m d"]) -> bool:
    return len(directions) < 2 or _agreement(directions) > _SAME
