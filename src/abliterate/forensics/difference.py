"""A checkpoint next to the one it was made from: what changed in which tensor, and what that looks like.

A direction taken out of a writer changes it by −s r̂ r̂ᵀ W: rank one, with the same left singular vector in every
writer and on the right what the writer used to put along it. Nothing else that is done to models looks like that:
rounding spreads over the whole spectrum, fine-tunes and merges touch what reads the stream as much as what writes it,
and a low-rank adapter's right vectors have nothing to do with what the writer put along its left ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.errors import CheckpointError
from abliterate.files.checkpoint import Checkpoint, TensorInfo, open_tensor
from abliterate.files.formats import layout
from abliterate.files.integrity import same_layout
from abliterate.forensics.reading import InspectedModel, Place, numbers
from abliterate.model.anatomy import Kind

Relation = Literal["identical", "ablation", "re-quantisation", "low-rank update", "fine-tune or merge", "another model"]

#: Singular vectors looked for in each difference.
_RANK = 16
#: Common directions at most.
_MOST = 4
#: By how much another way must explain the changes better than a simpler one.
_CLOSER = 0.01
#: Relative size of the differences from which it is another model.
_ANOTHER = 0.7
#: Correlation of what was taken along the direction with what the writer put there, from which it is an ablation.
_READ = 0.7
#: Times an even spread that the change along a direction exceeds: a common one, and one of the writer's own, which was
#: taken because most of the change lies there.
_EXCESS, _OWN_EXCESS = 8.0, 20.0
#: Share of the changed writers that are ablated, from which the difference is called an ablation.
_ENOUGH = 0.2
#: Peak below which a change is spread over the whole spectrum.
_FLAT = 4.0
#: Part of the lengths' change that a plain edit makes, below which lengths count as kept.
_KEPT = 0.4
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class Changed:
    """A writer that differs. `size` is ‖Δ‖ / ‖W‖, `rank` how many singular values hold 90 % of ‖Δ‖² (None: more
    than were looked for), `peak` the first of them squared over what it would be if Δ were noise.

    Along the common direction: `strength` s of −s r̂ r̂ᵀ W, `read` how well what was taken follows what the writer put
    there (−1 … 1), `excess` how many times an even spread of Δ lies there. `columns_kept` and `rows_kept` say whether
    vectors kept their lengths, closer than the edit by itself would leave them; `rest` is the size of what the
    directions do not explain. `ablated` says whether the change along the direction is a projection.
    """

    tensor: str
    block: int | None
    kind: Kind
    size: float
    rank: int | None
    peak: float
    strength: float = 0.0
    read: float = 0.0
    excess: float = 0.0
    columns_kept: bool = False
    rows_kept: bool = False
    rest: float = 0.0
    ablated: bool = False


@dataclass(frozen=True, slots=True)
class Difference:
    """What tells a checkpoint from its base.

    `directions` [k, d] are common to the changes of the writers; where they differ, with `per_layer`, there is one for
    each of `writers`. `left` holds, by tensor, orthonormal rows along which an ablated writer changed. `others` are
    tensors that are no writers and differ, by ‖Δ‖ / ‖W‖; `missing` and `added` are by name.
    """

    verdict: Relation
    also: tuple[str, ...]
    variant: str | None
    directions: Float[Tensor, "k d"]
    per_layer: bool
    writers: tuple[Changed, ...]
    unchanged: int
    others: dict[str, float]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    left: dict[str, Float[Tensor, "k d"]]

    @property
    def strength(self) -> float | None:
        """The median strength of ablated writers."""
        found = [writer.strength for writer in self.writers if writer.ablated]
        return median(found) if found else None


@dataclass(frozen=True, slots=True)
class _Seen:
    """A changed writer with what is needed to look along the common directions: nothing of its size is kept."""

    place: Place
    old: Place
    size: float
    rank: int | None
    peak: float
    left: Float[Tensor, "k d"]
    lengths: Float[Tensor, " d"]


def compare(
    subject: InspectedModel, base: InspectedModel, *, progress: Callable[[int], None] | None = None
) -> Difference:
    """Compare tensor by tensor; writers that differ are read twice. Memory: a few copies of one tensor.

    Raises `CheckpointError` when a tensor has another shape, or when the two have no writer in common.
    """
    progress = progress or (lambda _: None)
    theirs = {place.info.name: place for place in base.places}
    shared = [place for place in subject.places if place.info.name in theirs]
    if not shared:
        raise CheckpointError(
            f"{subject.name} and {base.name}: expected the same names of tensors, found no writer in both; is "
            f"{base.name} the model that it was made from?"
        )
    looks = []
    for place in shared:
        looks.append(_look(subject, base, place, theirs[place.info.name]))
        progress(place.info.nbytes)
    seen = [look for look in looks if look is not None]
    others = _others(subject.checkpoint, base.checkpoint, {place.info.name for place in shared}, progress)
    common = {levelled: _common(seen, levelled) for levelled in (False, True)}
    taken = [_along(subject, base, one, common) for one in seen]
    way, kept = _best_way(taken, common)
    writers = tuple(_changed(one, found, way, kept) for one, found in zip(seen, taken, strict=True))
    verdict, also = _verdict(writers, others)
    ours, old = set(subject.checkpoint.tensors), set(base.checkpoint.tensors)
    ablated = verdict == "ablation"
    directions = torch.zeros(0, subject.d_model)
    if ablated:
        own = way.own
        directions = torch.stack([_own(x, way.levelled)[kept[0]] for x in seen]) if own else common[way.levelled][kept]
    return Difference(
        verdict,
        also,
        _variant(writers, shared, len(kept), way) if ablated else None,
        directions,
        ablated and way.own,
        writers,
        len(looks) - len(seen),
        others,
        tuple(sorted(old - ours)),
        tuple(sorted(ours - old)),
        _left(seen, writers, common, way, kept) if ablated else {},
    )


def _left(
    seen: Sequence[_Seen],
    writers: Sequence[Changed],
    common: dict[bool, Float[Tensor, "k d"]],
    way: _Way,
    kept: Sequence[int],
) -> dict[str, Float[Tensor, "k d"]]:
    """Where ablated writers changed, in coordinates of the stream."""
    found = {}
    for one, writer in zip(seen, writers, strict=True):
        if writer.ablated:
            rows = (_own(one, way.levelled) if way.own else common[way.levelled])[list(kept)]
            rows = rows * one.lengths if way.levelled else rows
            found[writer.tensor] = torch.linalg.qr(rows.T).Q.T.contiguous()
    return found


def _matrices(checkpoint: Checkpoint, place: Place) -> Float[Tensor, "d n"]:
    """A place as one matrix with the stream first: experts side by side."""
    values = numbers(checkpoint, place.info).float().movedim(place.axis, 0)
    return values.reshape(len(values), -1)


def _look(subject: InspectedModel, base: InspectedModel, place: Place, old: Place) -> _Seen | None:
    """The difference of one writer: how large, of what rank, and its left singular vectors by their share."""
    _same_numbers(place.info, old.info, subject.checkpoint, base.checkpoint)
    before = _matrices(base.checkpoint, old)
    change = _matrices(subject.checkpoint, place) - before
    energy = float(change.square().sum())
    if energy == 0:
        return None
    rank = min(_RANK, *change.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, _ = torch.svd_lowrank(change, q=rank, niter=2)
    shares = values.square() / energy
    held = shares.cumsum(0)
    enough = int((held < 0.9).sum()) + 1
    size = math.sqrt(energy) / max(float(before.norm()), 1e-30)
    rows, columns = change.shape
    peak = float(shares[0]) * rows * columns / (math.sqrt(rows) + math.sqrt(columns)) ** 2
    few = (left * shares.sqrt()).T[:_MOST].contiguous()
    lengths = before.norm(dim=1).clamp_min(1e-12)
    return _Seen(place, old, size, enough if enough <= rank else None, peak, few, lengths)


def _same_numbers(info: TensorInfo, old: TensorInfo, ours: Checkpoint, theirs: Checkpoint) -> None:
    found, expected = layout(ours, info).shape, layout(theirs, old).shape
    if found != expected:
        raise CheckpointError(
            f"tensor '{info.name}': expected shape {list(expected)} as in the base, found {list(found)}"
        )


@dataclass(frozen=True, slots=True)
class _Way:
    """How directions were taken out: out of rows of one length (`levelled`), each writer's own or common ones."""

    levelled: bool
    own: bool


@dataclass(frozen=True, slots=True)
class _Taken:
    """For each candidate direction of one way: `strength`, `read`, `excess`, and the share of ‖Δ‖² along it.

    A candidate passes from an excess of `least` on. `rest` is the size of what as many directions as pass do not
    explain.
    """

    strength: Float[Tensor, " k"]
    read: Float[Tensor, " k"]
    excess: Float[Tensor, " k"]
    share: Float[Tensor, " k"]
    least: float
    rest: float = 0.0

    @property
    def passes(self) -> Tensor:
        """Which of them the change is a projection along."""
        return (self.read.abs() >= _READ) & (self.excess >= self.least)


@dataclass(frozen=True, slots=True)
class _Along:
    """A changed writer along all candidates, and whether its columns and rows kept their lengths, by way."""

    ways: dict[_Way, _Taken]
    kept: dict[_Way, tuple[bool, bool]]


def _common(seen: Sequence[_Seen], levelled: bool) -> Float[Tensor, "k d"]:
    """Candidates for directions that all changes share.

    A tool that brings rows to one length first changes W by −s (D r̂)(D⁻¹ r̂)ᵀ W, with D the lengths of W's rows: it is
    D⁻¹ u that its writers share.
    """
    if not seen:
        return torch.zeros(0, 0)
    _, _, right = torch.linalg.svd(torch.cat([_own(one, levelled, weigh=True) for one in seen]), full_matrices=False)
    rows: Tensor = right[:_MOST]
    return rows.contiguous()


def _own(one: _Seen, levelled: bool, *, weigh: bool = False) -> Float[Tensor, "k d"]:
    """Left singular vectors of one change, those of rows brought to one length if `levelled`; weighed by share."""
    rows = torch.nn.functional.normalize(one.left / one.lengths if levelled else one.left, dim=1)
    return rows * one.left.norm(dim=1, keepdim=True) if weigh else rows


def _along(
    subject: InspectedModel, base: InspectedModel, one: _Seen, common: dict[bool, Float[Tensor, "k d"]]
) -> _Along:
    """Look at a changed writer along all candidates."""
    before = _matrices(base.checkpoint, one.old)
    after = _matrices(subject.checkpoint, one.place)
    ways, kept = {}, {}
    for levelled, shared in common.items():
        lengths = one.lengths[:, None] if levelled else torch.ones(1)
        old, change = before / lengths, (after - before) / lengths
        energy = float(change.square().sum())
        for own, basis in ((False, shared), (True, _own(one, levelled))):
            was, moved = basis @ old, basis @ change
            product, length = (was * moved).sum(1), was.norm(dim=1).clamp_min(1e-30)
            share = moved.square().sum(1) / max(energy, 1e-30)
            found = _Taken(
                strength=-product / length**2,
                read=-product / (length * moved.norm(dim=1)).clamp_min(1e-30),
                excess=share * len(old),
                share=share,
                least=_OWN_EXCESS if own else _EXCESS,
            )
            way = _Way(levelled, own)
            rows = basis[found.passes]
            ways[way] = replace(found, rest=_rest(before, after - before, one.left[: max(1, len(rows))]))
            plain = old - rows.T @ (found.strength[found.passes, None] * was[found.passes])
            kept[way] = _kept(before, after, plain * lengths) if len(rows) else (False, False)
    return _Along(ways, kept)


def _best_way(taken: Sequence[_Along], common: dict[bool, Float[Tensor, "k d"]]) -> tuple[_Way, list[int]]:
    """The way that explains most of the changes, common directions before own ones, and which candidates it has."""
    best, chosen, most = _Way(False, False), [0] * bool(len(common[False])), -1.0
    for way in (_Way(False, False), _Way(True, False), _Way(False, True), _Way(True, True)):
        if not taken:
            break
        passes = torch.stack([along.ways[way].passes for along in taken])
        enough = [int(index) for index in (passes.sum(0) >= _needed(len(taken))).nonzero()]
        if not enough:
            continue
        enough = enough[:1] if way.own else enough
        shares = torch.stack([(along.ways[way].share * along.ways[way].passes)[enough].sum() for along in taken])
        reads = torch.stack([along.ways[way].read.abs()[enough].max() for along in taken])
        score = float((shares * reads**2).median())
        if score > most + (_CLOSER if most >= 0 else 0.0):
            best, chosen, most = way, enough, score
    return best, chosen


def _needed(writers: int) -> int:
    """Ablated writers from which a difference is called an ablation."""
    return min(writers, max(2, math.ceil(_ENOUGH * writers)))


def _changed(one: _Seen, along: _Along, way: _Way, kept: Sequence[int]) -> Changed:
    """What is told of one writer: along the candidate that its change is clearest along."""
    changed = Changed(one.place.info.name, one.place.block, one.place.kind, one.size, one.rank, one.peak, rest=one.size)
    if not kept:
        return changed
    taken = along.ways[way]
    index = max(kept, key=lambda index: (bool(taken.passes[index]), float(taken.share[index])))
    columns, rows = along.kept[way]
    return replace(
        changed,
        strength=float(taken.strength[index]),
        read=float(taken.read[index]),
        excess=float(taken.excess[index]),
        ablated=bool(taken.passes[index]),
        columns_kept=columns,
        rows_kept=rows,
        rest=taken.rest,
    )


def _rest(before: Tensor, change: Tensor, left: Float[Tensor, "k d"]) -> float:
    """What as many directions of the writer's own leave of its change, in parts of the writer.

    Not the common ones: they are a mean over writers, which knows each one's to a few digits only.
    """
    rows = torch.linalg.qr(left.T).Q.T
    return float((change - rows.T @ (rows @ change)).norm() / before.norm().clamp_min(1e-30))


def _kept(before: Tensor, after: Tensor, plain: Tensor) -> tuple[bool, bool]:
    """Whether columns, and rows, kept their lengths much closer than the plain edit would have left them."""
    kept = []
    for axis in (0, 1):
        old, found, expected = (matrix.norm(dim=axis).clamp_min(1e-12) for matrix in (before, after, plain))
        kept.append(float((found / old - 1).abs().mean()) < _KEPT * float((expected / old - 1).abs().mean()))
    return kept[0], kept[1]


def _others(
    ours: Checkpoint, theirs: Checkpoint, writers: set[str], progress: Callable[[int], None]
) -> dict[str, float]:
    """Tensors that are no writers and differ, by ‖Δ‖ / ‖W‖ (infinite where the shape does)."""
    found = {}
    for name, info in ours.tensors.items():
        old = theirs.tensors.get(name)
        if name in writers or old is None or not info.shape or not info.nbytes or _same_bytes(info, old):
            continue
        try:
            new, was = numbers(ours, info), numbers(theirs, old)
        except CheckpointError:  # scales and packed codes have no numbers of their own
            found[name] = math.inf
            continue
        if new.shape != was.shape:
            found[name] = math.inf
        elif (size := float((new - was).norm()) / max(float(was.norm()), 1e-30)) > 0:
            found[name] = size
        progress(info.nbytes)
    return found


def _same_bytes(info: TensorInfo, old: TensorInfo) -> bool:
    if not same_layout(info, old):
        return False
    with open_tensor(info) as new, open_tensor(old) as was:
        return all(
            new.read(start, count) == was.read(start, count)
            for start in range(0, info.nbytes, _BLOCK)
            if (count := min(_BLOCK, info.nbytes - start))
        )


def _verdict(writers: Sequence[Changed], others: dict[str, float]) -> tuple[Relation, tuple[str, ...]]:
    """What it is, and what else was done."""
    if not writers and not others:
        return "identical", ()
    ablated = [writer for writer in writers if writer.ablated]
    if writers and median(writer.size for writer in writers) > _ANOTHER:
        return "another model", ()
    if ablated and len(ablated) >= _needed(len(writers)):
        left = [writer for writer in writers if not writer.ablated]
        also = []
        if left:
            also.append(f"{len(left)} other writers differ ({_broad(left)})")
        if others:
            also.append(f"{len(others)} tensors that write nothing to the stream differ")
        if not left and all(writer.rank is None for writer in ablated):
            also.append("every writer also differs in other ways (a re-quantisation or a fine-tune)")
        return "ablation", tuple(also)
    return (_broad(writers) if writers else "fine-tune or merge"), ()


def _broad(writers: Sequence[Changed]) -> Relation:
    ranks = [writer.rank for writer in writers if writer.rank is not None]
    if 2 * len(ranks) > len(writers):
        return "low-rank update"
    return "re-quantisation" if median(writer.peak for writer in writers) < _FLAT else "fine-tune or merge"


def _variant(writers: Sequence[Changed], known: Sequence[Place], count: int, way: _Way) -> str:
    """The kind of ablation in words."""
    ablated = [writer for writer in writers if writer.ablated]
    words = [
        "a direction of its own for each writer"
        if way.own
        else "one direction"
        if count == 1
        else f"{count} directions"
    ]
    if way.levelled:
        words.append("taken out of rows of one length")
    for name, kept in (("columns", "columns_kept"), ("rows", "rows_kept")):
        if 2 * sum(getattr(writer, kept) for writer in ablated) > len(ablated):
            words.append(f"{name} keep their lengths")
    kinds = sorted({writer.kind.value for writer in ablated})
    if len(kinds) < len({place.kind for place in known if place.block is not None}):
        words.append(f"in {' and '.join(kinds)} only")
    blocks = sorted({writer.block for writer in ablated if writer.block is not None})
    if blocks and len(blocks) < len({place.block for place in known if place.block is not None}):
        words.append(f"in blocks {blocks[0]} to {blocks[-1]}")
    strengths = sorted(writer.strength for writer in ablated)
    low, high = strengths[0], strengths[-1]
    words.append(f"strength {low:.2f}" if high - low < 0.03 else f"strengths {low:.2f} to {high:.2f}")
    return ", ".join(words)


__all__ = ["Changed", "Difference", "compare"]
