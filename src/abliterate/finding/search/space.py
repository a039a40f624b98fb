"""What a black-box search may choose, and how its numbers become a direction with a recipe.

A trial is anything that suggests numbers under names, as Optuna's does. Every parameter is asked for in every trial,
also where another makes it idle (the layer beside a refined direction): samplers learn from parameters that all trials
have in common.

==========================================  =======================================================================
``layer``, ``position``                     the site; between two layers the raw differences are interpolated
``projected``                               the harmless mean of that site is taken out of the direction
``rank``                                    how many directions, see `Space.suggest`
``source``                                  that site, or one of the refined directions
``biprojected``, ``norm_preserving``        as in `variants`
``KIND.peak .centre .width .floor``         strengths of all writers of a kind, see `Shape`
``embedding.strength``                      that of the embedding, which stands in no layer
==========================================  =======================================================================
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.algebra import orthonormal, project_out
from abliterate.config import DEFAULT_STRENGTH, EditSettings, FindSettings
from abliterate.edit.direction import Candidates, Direction, Recipe, Site
from abliterate.edit.hooks import refuse_hooks
from abliterate.edit.options import plan_for
from abliterate.edit.plan import Plan
from abliterate.errors import UsageError
from abliterate.model.anatomy import Anatomy, Writer

#: Strengths above 1 reflect, which sometimes removes more than removal does.
STRONGEST = 1.5
#: Weaker edits are not worth touching a tensor for.
WEAKEST = 0.02
#: Above the embedding and the first blocks, where nothing is decided yet.
SHALLOWEST = 0.15
#: Directions less alike than this (cosine) are not the same one with other numbers.
ALIKE = 0.7

_SITE = "site"


class Trial(Protocol):
    """Who chooses."""

    def suggest_float(self, name: str, low: float, high: float) -> float:
        """A number between the two."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number, both ends included."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of these."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Strengths over the layers l: peak · (floor + (1 − floor) · max(0, 1 − |l − centre| / width))."""

    peak: float
    centre: float
    width: float
    floor: float

    def at(self, layer: int) -> float:
        """The strength at one layer."""
        return self.peak * (self.floor + (1 - self.floor) * max(0.0, 1 - abs(layer - self.centre) / self.width))


class Space:
    """All that is left to choose once the user has chosen."""

    def __init__(
        self,
        anatomy: Anatomy,
        candidates: Candidates,
        settings: FindSettings,
        editing: EditSettings,
        site: Site | None = None,
        *,
        variants: bool = True,
        extra: Sequence[Direction] = (),
    ) -> None:
        """A site given, `--projected`, `--biprojected` and `--norm-preserving` stay as they are; `--layers` and
        `--components` say which writers there are; those of `--strengths` keep theirs. With `--strength` all others
        have that and only directions and variants are left. `variants` says whether what is written at the end can
        hold a norm-preserving edit, `extra` are directions refined elsewhere.

        Raises `UsageError` for settings that choose no writer, and for LEACE and affine edits, which no recipe holds.
        """
        if settings.subspace == "leace":
            raise UsageError("--subspace leace: expected mean, svd or clusters, whose directions can be searched")
        if editing.affine:
            raise UsageError(
                "--affine: expected an edit whose strengths can be searched, found one that adds a constant"
            )
        self.anatomy, self.candidates, self.site, self.extra = anatomy, candidates, site, tuple(extra)
        self._finding, self._editing = settings, editing
        self._rank = 1 if settings.subspace == "mean" or editing.biprojected else settings.rank
        deepest = settings.max_depth * anatomy.layers
        self._depths = (min(SHALLOWEST * anatomy.layers, deepest), deepest)
        self._biprojects = self._rank == 1
        self._norms_offered = variants and _keeps_norms(anatomy, editing)
        self._writers, self._fixed = free_and_fixed(anatomy, editing)

    @property
    def sources(self) -> tuple[str, ...]:
        """Where a direction can come from."""
        return (_SITE, *(f"refined {number}" for number in range(1, len(self.extra) + 1)))

    def suggest(self, trial: Trial) -> Direction:
        """The direction of a trial, with its recipe, the candidates it was made of, and the site nearest to it.

        With a rank k above 1 the basis is made of the direction itself and those of the k − 1 nearest sites around it:
        one layer up, one down, one position on, one back, two layers up, and so on.

        Raises `NumericalError` where the classes do not differ, or neighbours are the same direction.
        """
        layer, position = self._site(trial)
        projected = self._flag(trial, "projected", self._finding.projected, offered=True)
        rank = trial.suggest_int("rank", 1, self._rank) if self._rank > 1 else 1
        source = trial.suggest_categorical("source", self.sources) if self.extra else _SITE
        biprojected = self._flag(trial, "biprojected", self._editing.biprojected, offered=self._biprojects)
        norms = self._flag(trial, "norm_preserving", self._editing.norm_preserving, offered=self._norms_offered)
        strengths = self._strengths(trial)
        if source == _SITE:
            basis = self._basis(layer, position, rank, projected=projected)
            said = {"layer": layer, "position": position, "projected": projected}
            found = Direction(basis, self.candidates, site=Site(round(layer), position), facts={"searched": said})
        else:
            found = self.extra[self.sources.index(source) - 1]
            found = replace(found, candidates=found.candidates or self.candidates)
            alike = found.per_site is None and found.per_writer is None
            biprojected &= len(found.basis) == 1 and found.site is not None and alike
        return replace(found, recipe=Recipe(strengths, norms, biprojected, self._editing.untie))

    def direction_at(self, layer: float, position: int, *, projected: bool = False) -> Float[Tensor, " d"]:
        """The difference of means at a layer, which between two is (1 − t) of the lower one's and t of the upper's.

        Harmless means are interpolated in the same way before they are taken out.
        """
        raw, mean = (
            torch.lerp(sites[-1 - position, math.floor(layer)], sites[-1 - position, math.ceil(layer)], layer % 1)
            for sites in (self.candidates.raw, self.candidates.harmless_mean)
        )
        return project_out(raw, mean) if projected else raw

    def describe(self) -> dict[str, Any]:
        """Every parameter with its least and most, or its choices; and what the user fixed."""
        found = _Ranges()
        self.suggest(found)
        fixed = {"finding": self._finding, "editing": self._editing}
        said = {name: settings.model_dump(mode="json", exclude_defaults=True) for name, settings in fixed.items()}
        return {**found.ranges, "site": self.site, **said}

    def encode(self, direction: Direction) -> dict[str, Any] | None:
        """Parameters that give about this direction and these strengths; None for another kind of direction.

        The site is the one whose direction is nearest by cosine, unless it is one of the refined directions itself.
        Strengths are those of the shape that fits them best (least squares).
        """
        recipe = direction.recipe
        if recipe is None or direction.reader is not None or direction.basis.shape[1] != self.anatomy.d_model:
            return None
        sites = self._refined(direction) or self._nearest(direction)
        if sites is None:
            return None
        found = {
            **sites,
            "rank": len(direction.basis),
            "biprojected": recipe.biprojected,
            "norm_preserving": recipe.norm_preserving,
            **self._shapes(recipe.strengths),
        }
        ranges = _Ranges()
        self.suggest(ranges)
        return {name: ranges.nearest(name, value) for name, value in found.items() if name in ranges.ranges}

    def _site(self, trial: Trial) -> tuple[float, int]:
        if self.site is not None:
            return self.site
        layer = trial.suggest_float("layer", *self._depths)
        return layer, trial.suggest_categorical("position", self.candidates.positions)

    def _flag(self, trial: Trial, name: str, fixed: bool, *, offered: bool) -> bool:
        return fixed or (offered and bool(trial.suggest_categorical(name, [False, True])))

    def _basis(self, layer: float, position: int, rank: int, *, projected: bool) -> Float[Tensor, "k d"]:
        sites = itertools.islice(self._around(layer, position), rank)
        return orthonormal(torch.stack([self.direction_at(*site, projected=projected) for site in sites]))

    def _around(self, layer: float, position: int) -> list[tuple[float, int]]:
        """The site and all others at whole steps from it, nearest first."""
        layers, positions = self.anatomy.layers, self.candidates.positions
        steps = ((up, on) for up in range(-layers, layers + 1) for on in range(-len(positions), len(positions) + 1))
        nearest = sorted(steps, key=lambda step: (abs(step[0]) + abs(step[1]), abs(step[1]), -step[0], -step[1]))
        sites = ((layer + up, position + on) for up, on in nearest)
        return [site for site in sites if 0 <= site[0] <= layers and site[1] in positions]

    def _strengths(self, trial: Trial) -> dict[str, float]:
        """Strength of every writer that is edited at all. An edit of nothing is no plan: the strongest stays."""
        found: dict[str, float] = {}
        for kind, writers in self._writers.items():
            shape = self._shape(trial, kind)
            found |= {w.name: shape.peak if w.block is None else shape.at(w.block) for w in writers}
        kept = {name: strength for name, strength in found.items() if strength >= WEAKEST}
        if not kept and not self._fixed:
            kept = {max(found, key=found.__getitem__): WEAKEST}
        return {**kept, **self._fixed}

    def _shape(self, trial: Trial, kind: str) -> Shape:
        blocks = _blocks(self._writers[kind])
        if not blocks:
            return Shape(trial.suggest_float(f"{kind}.strength", 0, STRONGEST), 0, 1, 1)
        return Shape(
            trial.suggest_float(f"{kind}.peak", 0, STRONGEST),
            trial.suggest_float(f"{kind}.centre", min(blocks), max(blocks)),
            trial.suggest_float(f"{kind}.width", self.anatomy.layers / 8, self.anatomy.layers),
            trial.suggest_float(f"{kind}.floor", 0, 1),
        )

    def _shapes(self, strengths: Mapping[str, float]) -> dict[str, float]:
        """The parameters of strengths by writer."""
        found: dict[str, float] = {}
        for kind, writers in self._writers.items():
            own = [(writer.block, strengths.get(writer.name, 0.0)) for writer in writers]
            if not (blocks := _blocks(writers)):
                found[f"{kind}.strength"] = fmean(strength for _, strength in own)
                continue
            shape = fitted({b: fmean(s for at, s in own if at == b) for b in blocks}, self.anatomy.layers)
            found |= {f"{kind}.{name}": getattr(shape, name) for name in ("peak", "centre", "width", "floor")}
        return found

    def _refined(self, direction: Direction) -> dict[str, Any] | None:
        for name, other in zip(self.sources[1:], self.extra, strict=True):
            same = len(other.basis) == len(direction.basis) and other.reader is None
            if same and float((other.basis @ direction.basis.T).square().sum()) > len(other.basis) * 0.9999:
                return {"source": name}
        return None

    def _nearest(self, direction: Direction) -> dict[str, Any] | None:
        """The site: the best whole layer first, then finer and finer steps around it."""
        row = direction.basis[0]
        flags = [True] if self._finding.projected else [False, True]

        def cosine(site: tuple[float, int, bool]) -> float:
            found = self.direction_at(site[0], site[1], projected=site[2])
            return abs(float(torch.cosine_similarity(found, row.to(found), dim=0)))

        low, high = self._depths
        whole = range(math.ceil(low), math.floor(high) + 1) or [low]
        sites = [(float(at), position) for at in whole for position in self.candidates.positions]
        best = max(itertools.product([self.site] if self.site else sites, flags), key=lambda s: cosine((*s[0], s[1])))
        layer, position, projected = *best[0], best[1]
        for reach in (1.0, 1 / 8, 1 / 64) if self.site is None else ():
            steps = [min(max(layer + reach * step / 16, low), high) for step in range(-16, 17)]
            layer = max(steps, key=lambda at: cosine((at, position, projected)))
        if cosine((layer, position, projected)) < ALIKE:
            return None
        found = {"layer": layer, "position": position, "projected": projected}
        return {**found, "source": _SITE}


class _Ranges:
    """A trial that writes down what it is asked for."""

    def __init__(self) -> None:
        self.ranges: dict[str, list[Any]] = {}
        self._choices: set[str] = set()

    def suggest_float(self, name: str, low: float, high: float) -> float:
        self.ranges[name] = [low, high]
        return high

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.ranges[name] = [low, high]
        return low

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.ranges[name] = list(choices)
        self._choices.add(name)
        return choices[0]

    def nearest(self, name: str, value: Any) -> Any:
        """The value, or the end of the range that it lies beyond."""
        if name in self._choices:
            return value if value in self.ranges[name] else self.ranges[name][0]
        low, high = self.ranges[name]
        return min(max(value, low), high)


def fitted(strengths: Mapping[int, float], layers: int) -> Shape:
    """The shape that is nearest to strengths by layer (least squares), with a peak of at most `STRONGEST`.

    For a centre and a width given, the strengths are linear in base = peak · floor and rise = peak − base, both
    positive: these are solved for, the other two are tried on grids that become finer.
    """
    at = torch.tensor(list(strengths), dtype=torch.float64)
    wanted = torch.tensor(list(strengths.values()), dtype=torch.float64)
    lows, highs = (float(at.min()), layers / 8), (float(at.max()), float(layers))
    best = Shape(0, lows[0], lows[1], 0)
    steps = [(high - low) / 2 for low, high in zip(lows, highs, strict=True)]
    middle = [low + step for low, step in zip(lows, steps, strict=True)]
    for _ in range(6):
        axes = [
            torch.linspace(max(low, m - step), min(high, m + step), 49, dtype=torch.float64)
            for low, high, m, step in zip(lows, highs, middle, steps, strict=True)
        ]
        centres, widths = torch.cartesian_prod(*axes).T
        hats = (1 - (at - centres[:, None]).abs() / widths[:, None]).clamp_min(0)
        base, rise = _base_and_rise(hats, wanted)
        row = int((base[:, None] + rise[:, None] * hats - wanted).square().sum(1).argmin())
        middle, steps = [float(centres[row]), float(widths[row])], [step / 6 for step in steps]
        peak = float(base[row] + rise[row])
        floor = float(base[row]) / peak if peak > 0 else 0.0
        best = Shape(min(peak, STRONGEST), middle[0], middle[1], floor)
    return best


def _base_and_rise(
    hats: Float[Tensor, "n l"], wanted: Float[Tensor, " l"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Non-negative base and rise that bring base + rise · hat nearest to what is wanted, for each hat."""
    mean = wanted.mean()
    centred = hats - hats.mean(1, keepdim=True)
    spread = centred.square().sum(1)
    rise = torch.where(spread > 1e-12, centred @ wanted / spread.clamp_min(1e-12), 0.0).clamp_min(0)
    base = mean - rise * hats.mean(1)
    alone = ((hats @ wanted) / hats.square().sum(1).clamp_min(1e-12)).clamp_min(0)
    return base.clamp_min(0), torch.where(base < 0, alone, rise)


def _blocks(writers: Sequence[Writer]) -> list[int]:
    return sorted({writer.block for writer in writers if writer.block is not None})


def _plan(anatomy: Anatomy, editing: EditSettings, **changes: Any) -> Plan:
    """The plan of any direction: which writers it has says what can be edited."""
    plain = {"biprojected": False, "affine": False, "norm_preserving": False, **changes}
    row = torch.randn(1, anatomy.d_model, generator=torch.Generator().manual_seed(0))
    return plan_for(anatomy, Direction(orthonormal(row)), editing.model_copy(update=plain))


def free_and_fixed(anatomy: Anatomy, editing: EditSettings) -> tuple[dict[str, list[Writer]], dict[str, float]]:
    """Writers by kind whose strength may be chosen, and strengths that the user chose.

    What does not change with `--strength` comes from `--strengths`.
    """
    free: dict[str, list[Writer]] = defaultdict(list)
    fixed: dict[str, float] = {}
    once, twice = (_plan(anatomy, editing, strength=factor * editing.strength) for factor in (1.0, 2.0))
    for one, other in zip(once.edits, twice.edits, strict=True):
        if one.strength == other.strength or editing.strength != DEFAULT_STRENGTH:
            fixed[one.writer.name] = one.strength
        else:
            free[one.writer.kind.value].append(one.writer)
    return dict(free), fixed


def _keeps_norms(anatomy: Anatomy, editing: EditSettings) -> bool:
    """Whether hooks can hold a norm-preserving edit of what is edited."""
    try:
        refuse_hooks(_plan(anatomy, editing, norm_preserving=True))
    except UsageError:
        return False
    return True
