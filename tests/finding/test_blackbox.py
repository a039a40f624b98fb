"""The black box on measures with a known optimum: what it searches, what it spends, and what survives a kill."""

from __future__ import annotations

import builtins
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FixedTrial
from torch import Tensor

from abliterate.algebra import orthonormal, project_out
from abliterate.config import EditSettings, FindSettings, SearchSettings
from abliterate.edit.direction import Candidates, Direction, Recipe, Site
from abliterate.edit.options import plan_for
from abliterate.errors import CheckpointError, NumericalError, UsageError
from abliterate.evaluation.probe import Level
from abliterate.finding.search.blackbox import WARM_UP, Journal, Seen, first_token_objectives, hopeless, optimise
from abliterate.finding.search.pareto import hypervolume, nondominated
from abliterate.finding.search.points import Point
from abliterate.finding.search.space import STRONGEST, WEAKEST, Shape, Space, fitted
from abliterate.model.anatomy import Anatomy, Kind, Writer, study
from families import BY_NAME
from zoo import ENTRIES

LAYERS, WIDTH = 16, 32
OBJECTIVES = ("refusal-score", "kl")
#: Dominated by every point that is worth anything.
WORST = (8.0, 4.0)


class Dice:
    """A trial that draws at random, and keeps what it drew."""

    def __init__(self, seed: int) -> None:
        self.random, self.params = random.Random(seed), dict[str, Any]()

    def _kept(self, name: str, value: Any) -> Any:
        assert name not in self.params, f"{name} is asked for twice"
        self.params[name] = value
        return value

    def suggest_float(self, name: str, low: float, high: float) -> float:
        assert low <= high
        return float(self._kept(name, self.random.uniform(low, high)))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._kept(name, self.random.randint(low, high)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._kept(name, self.random.choice(list(choices)))


def writer(kind: Kind, block: int | None) -> Writer:
    module = "embed" if block is None else f"layers.{block}.{kind.value}"
    return Writer(module, kind, block, f"{module}.weight", 0, None)


@cache
def anatomy() -> Anatomy:
    inside = [writer(kind, block) for block in range(LAYERS) for kind in (Kind.ATTENTION, Kind.MLP)]
    blocks = tuple(f"layers.{block}" for block in range(LAYERS))
    return Anatomy(WIDTH, blocks, (writer(Kind.EMBEDDING, None), *inside), (0.0,) * (LAYERS + 1))


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def candidates(sites: int = LAYERS + 1, width: int = WIDTH) -> Candidates:
    """The direction turns slowly from layer to layer, another way at each of two positions."""
    axes = orthonormal(noise(4, width, seed=5))
    angle = torch.linspace(0, 1.5, sites)[:, None]
    raw = torch.stack([3 * (angle.cos() * axes[0] + angle.sin() * axes[1 + position]) for position in (0, 1)])
    return Candidates(raw, raw.roll(1, 0) * 0.3 + axes[3] + 0.1 * noise(2, sites, width, seed=6))


def space(editing: EditSettings = EditSettings(), finding: FindSettings = FindSettings(), **options: Any) -> Space:
    return Space(anatomy(), candidates(), finding, editing, **options)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=0))


@dataclass
class Bench:
    """Refusal falls with the share of the right direction that attention of the middle takes out, damage rises with
    all that is taken out. `offset` and `jitter` set few prompts apart from all.
    """

    offset: float = 0.0
    jitter: float = 0.0
    calls: Counter[Level] = field(default_factory=Counter)

    def __call__(self, direction: Direction, level: Level) -> dict[str, float]:
        self.calls[level] += 1
        assert direction.recipe is not None
        right = candidates().at(9, -1)
        strengths = {w.name: direction.recipe.strengths.get(w.name, 0.0) for w in anatomy().writers}
        useful = {w.name for w in anatomy().writers if w.kind is Kind.ATTENTION and 6 <= (w.block or 0) <= 11}
        gained = sum(1 - (1 - strengths[name]) ** 2 for name in useful) / len(useful)
        score = 4 - 8 * gained * cosine(direction.basis[0], right) ** 8
        kl = sum(s * s * (0.05 if name in useful else 0.15) for name, s in strengths.items())
        if level == Level.FEW:
            draw = random.Random(repr(sorted(strengths.items())))
            score += self.offset + self.jitter * draw.gauss(0, 1)
            kl *= 1 + 0.1 * self.jitter * draw.gauss(0, 1)
        return {"refusal-score": score, "kl": kl}


def settings(**changes: Any) -> SearchSettings:
    return SearchSettings(**{"trials": 24, "method": "black-box", **changes})


def rows(points: Sequence[Point]) -> list[tuple[float, ...]]:
    return [tuple(point.scores[name] for name in OBJECTIVES) for point in points if point.level == Level.ALL]


def volume(points: Sequence[Point]) -> float:
    return hypervolume(rows(points), WORST)


def told(points: Sequence[Point]) -> list[Any]:
    """All that one search can be told from another by."""
    return [(p.origin, p.level, p.scores, p.direction.recipe, p.direction.site, p.direction.facts) for p in points]


# --- the space


def asked(where: Space) -> set[str]:
    trial = Dice(0)
    where.suggest(trial)
    return set(trial.params)


FLAGS = {"projected", "biprojected", "norm_preserving"}


@pytest.mark.parametrize("layer", [3, 7.0, 12])
@pytest.mark.parametrize("position", [-1, -2])
def test_at_whole_layers_the_direction_is_that_of_the_site(layer: float, position: int) -> None:
    found, at = space().direction_at(layer, position), candidates()
    assert torch.equal(found, at.at(int(layer), position))
    taken = space().direction_at(layer, position, projected=True)
    expected = project_out(at.at(int(layer), position), at.harmless_mean[-1 - position, int(layer)])
    assert torch.allclose(taken, expected, atol=1e-6)


def test_between_layers_the_direction_lies_between() -> None:
    low, between, high = (space().direction_at(layer, -1) for layer in (7, 7.25, 8))
    assert torch.allclose(between, 0.75 * low + 0.25 * high, atol=1e-6)
    assert cosine(low, between) > cosine(low, high)
    mean = 0.75 * candidates().harmless_mean[0, 7] + 0.25 * candidates().harmless_mean[0, 8]
    assert abs(cosine(space().direction_at(7.25, -1, projected=True), mean)) < 1e-6
    assert abs(cosine(between, mean)) > 1e-2


@pytest.mark.parametrize("seed", range(20))
def test_every_suggestion_is_a_direction_that_makes_a_plan(seed: int) -> None:
    trial = Dice(seed)
    found = space().suggest(trial)
    assert found.recipe is not None
    assert torch.allclose(found.basis @ found.basis.T, torch.eye(1), atol=1e-5)
    layer = trial.params["layer"]
    assert 0.15 * LAYERS <= layer <= 0.8 * LAYERS
    assert found.site == Site(round(layer), trial.params["position"])
    assert all(WEAKEST <= strength <= STRONGEST for strength in found.recipe.strengths.values())
    plan = plan_for(anatomy(), found)
    assert {edit.writer.name: edit.strength for edit in plan.edits} == found.recipe.strengths
    assert all(edit.norm_preserving == found.recipe.norm_preserving for edit in plan.edits)


def test_the_profile_is_what_its_parameters_say() -> None:
    params = {
        **dict.fromkeys(FLAGS, False),
        **dict.fromkeys(asked(space()) - FLAGS, 0.0),
        "layer": 8.0,
        "position": -1,
        "mlp.centre": 3.0,
        "mlp.width": 4.0,
        "mlp.floor": 1.0,
        "attention.peak": 1.2,
        "attention.centre": 6.0,
        "attention.width": 4.0,
    }
    recipe = space().suggest(FixedTrial(params)).recipe
    assert recipe is not None
    expected = {3: 0.3, 4: 0.6, 5: 0.9, 6: 1.2, 7: 0.9, 8: 0.6, 9: 0.3}
    assert recipe.strengths == pytest.approx({f"layers.{at}.attention.weight": s for at, s in expected.items()})
    half = space().suggest(FixedTrial({**params, "attention.floor": 0.5})).recipe
    assert half is not None
    assert half.strengths["layers.6.attention.weight"] == pytest.approx(1.2)
    assert half.strengths["layers.15.attention.weight"] == pytest.approx(0.6)


def test_an_edit_of_nothing_keeps_its_strongest_writer() -> None:
    class Zero(Dice):
        def suggest_float(self, name: str, low: float, high: float) -> float:
            return float(self._kept(name, low))

    found = space().suggest(Zero(0))
    assert found.recipe is not None
    assert list(found.recipe.strengths.values()) == [WEAKEST]
    assert len(plan_for(anatomy(), found).edits) == 1


def test_what_is_asked_for_by_default() -> None:
    shapes = {f"{kind}.{name}" for kind in ("attention", "mlp") for name in ("peak", "centre", "width", "floor")}
    assert asked(space()) == {"layer", "position", "embedding.strength", *FLAGS, *shapes}


@pytest.mark.parametrize(
    ("editing", "finding", "options", "gone"),
    [
        ({}, {}, {"site": Site(7, -2)}, {"layer", "position"}),
        ({}, {"projected": True}, {}, {"projected"}),
        ({"biprojected": True}, {}, {}, {"biprojected"}),
        ({"norm_preserving": True}, {}, {}, {"norm_preserving"}),
        ({}, {}, {"variants": False}, {"norm_preserving"}),
        ({"components": "mlp,embedding"}, {}, {}, {f"attention.{n}" for n in ("peak", "centre", "width", "floor")}),
        ({"strengths": "mlp=0.9,mlp@3=0"}, {}, {}, {f"mlp.{n}" for n in ("peak", "centre", "width", "floor")}),
        ({"layers": "2-5"}, {}, {}, {"embedding.strength"}),
    ],
    ids=lambda value: ",".join(sorted(value)) or "-",
)
def test_what_the_user_fixes_is_not_asked_for(
    editing: dict[str, Any], finding: dict[str, Any], options: dict[str, Any], gone: set[str]
) -> None:
    where = space(EditSettings(**editing), FindSettings(**finding), **options)
    assert asked(where) == asked(space()) - gone
    trial = Dice(3)
    found = where.suggest(trial)
    assert found.recipe is not None
    if "site" in options:
        assert found.site == Site(7, -2)
        expected = where.direction_at(7, -2, projected=trial.params["projected"])
        assert cosine(found.basis[0], expected) == pytest.approx(1, abs=1e-6)
    if "biprojected" in editing:
        assert found.recipe.biprojected
    if "norm_preserving" in editing:
        assert found.recipe.norm_preserving
    if "layers" in editing:
        assert {name.split(".")[1] for name in found.recipe.strengths} <= set("2345")
        assert 2 <= trial.params["mlp.centre"] <= 5
    plan = plan_for(anatomy(), found)
    if "strengths" in editing:
        assert {edit.strength for edit in plan.edits if edit.writer.kind is Kind.MLP} == {0.9, 0.0}
    if "components" in editing:
        assert {edit.writer.kind for edit in plan.edits} <= {Kind.MLP, Kind.EMBEDDING}


def test_with_a_strength_of_the_user_only_directions_and_variants_are_left() -> None:
    editing = EditSettings(strength=0.7)
    assert asked(space(editing)) == {"layer", "position", *FLAGS}
    plan = plan_for(anatomy(), space(editing).suggest(Dice(1)))
    assert len(plan.edits) == len(anatomy().writers)
    assert {edit.strength for edit in plan.edits} == {0.7}


def test_rank_adds_neighbouring_sites() -> None:
    where = space(finding=FindSettings(subspace="svd", rank=3))
    params = Dice(0)
    where.suggest(params)
    assert 1 <= params.params["rank"] <= 3
    assert "biprojected" not in params.params  # it is defined for one direction
    fixed = {**params.params, "layer": 6.5, "position": -1, "projected": False, "rank": 3}
    found = where.suggest(FixedTrial(fixed)).basis
    around = orthonormal(torch.stack([where.direction_at(layer, -1) for layer in (6.5, 7.5, 5.5)]))
    assert torch.allclose(found.T @ found, around.T @ around, atol=1e-4)
    assert cosine(found[0], where.direction_at(6.5, -1)) == pytest.approx(1, abs=1e-6)


def test_what_no_recipe_holds_cannot_be_searched() -> None:
    with pytest.raises(UsageError, match=r"^--affine: .*$"):
        space(EditSettings(affine=True))
    with pytest.raises(UsageError, match=r"^--subspace leace: .*svd or clusters.*$"):
        space(finding=FindSettings(subspace="leace"))


def refined(seed: int = 0, chosen: bool = True) -> Direction:
    site = Site(5, -1) if chosen else None
    strengths = {w.name: 0.5 for w in anatomy().writers}
    return Direction(orthonormal(noise(1, WIDTH, seed=70 + seed)), recipe=Recipe(strengths), site=site)


def test_refined_directions_are_sources_beside_the_site() -> None:
    extra = (refined(0), refined(1, chosen=False))
    where = space(extra=extra)
    assert where.sources == ("site", "refined 1", "refined 2")
    trial = Dice(0)
    where.suggest(trial)
    assert {"source", "layer", "position"} <= set(trial.params)
    for source, one in zip(where.sources[1:], extra, strict=True):
        found = where.suggest(FixedTrial({**trial.params, "source": source, "biprojected": True}))
        assert torch.equal(found.basis, one.basis)
        assert found.recipe is not None
        assert found.recipe != one.recipe
        assert found.recipe.biprojected == (one.site is not None)  # it needs the means of a position
        plan_for(anatomy(), found)
    site = where.suggest(FixedTrial({**trial.params, "source": "site"}))
    assert cosine(site.basis[0], extra[0].basis[0]) < 0.9


def test_norm_preserving_is_offered_where_hooks_hold_it() -> None:
    plain = study(BY_NAME["llama"].model())
    experts = study(next(entry for entry in ENTRIES if str(entry) == "mixtral").model())
    for one, offered in ((plain, True), (experts, False)):
        sites = candidates(one.layers + 1, one.d_model)
        found = Space(one, sites, FindSettings(), EditSettings())
        assert ("norm_preserving" in asked(found)) == offered
        for seed in range(5):
            plan_for(one, found.suggest(Dice(seed)))
    dense = Space(experts, sites, FindSettings(), EditSettings(components="attention"))
    assert "norm_preserving" in asked(dense)


def test_a_tied_embedding_is_no_writer_of_the_space() -> None:
    one = study(BY_NAME[next(name for name, family in BY_NAME.items() if family.tied)].model())
    sites = candidates(one.layers + 1, one.d_model)
    assert "embedding.strength" not in asked(Space(one, sites, FindSettings(), EditSettings()))
    untied = Space(one, sites, FindSettings(), EditSettings(untie=True))
    assert "embedding.strength" in asked(untied)
    plan = plan_for(one, untied.suggest(Dice(0)))
    assert plan.untie
    assert any(edit.writer.tied for edit in plan.edits)


# --- from a direction back to parameters


@pytest.mark.parametrize("seed", range(12))
def test_encoding_a_suggestion_gives_about_the_same_edit(seed: int) -> None:
    where = space(extra=(refined(),)) if seed % 2 else space()
    trial = Dice(100 + seed)
    found = where.suggest(trial)
    params = where.encode(found)
    assert params is not None
    if trial.params.get("source") == "refined 1":
        assert params["source"] == "refined 1"
        params = {**{name: trial.params[name] for name in ("layer", "position", "projected")}, **params}
    again = where.suggest(FixedTrial(params))
    assert cosine(again.basis[0], found.basis[0]) > 0.9999
    assert found.recipe is not None
    assert again.recipe is not None
    for one in anatomy().writers:
        before, after = (recipe.strengths.get(one.name, 0.0) for recipe in (found.recipe, again.recipe))
        assert after == pytest.approx(before, abs=0.03), one.name
    assert again.recipe.norm_preserving == found.recipe.norm_preserving
    assert again.recipe.biprojected == found.recipe.biprojected


def test_encoding_stays_within_the_space() -> None:
    where = space(EditSettings(components="mlp"), site=Site(7, -1), variants=False)
    row = candidates().at(7, -1) + 0.5 * noise(WIDTH, seed=9)
    recipe = Recipe({w.name: 3.0 if (w.block or 0) > 5 else -1.0 for w in anatomy().writers}, norm_preserving=True)
    params = where.encode(Direction(orthonormal(row[None]), recipe=recipe))
    assert params is not None
    assert set(params) == asked(where)
    assert params["mlp.peak"] == STRONGEST
    with_options = optuna.create_study()
    with_options.enqueue_trial(params)
    where.suggest(with_options.ask())  # out of range would be a warning, and warnings are errors


def test_what_cannot_be_encoded_is_none() -> None:
    where, known = space(), space().suggest(Dice(0))
    assert where.encode(known) is not None
    assert where.encode(replace(known, recipe=None)) is None
    assert where.encode(replace(known, reader=known.basis)) is None
    away = orthonormal(torch.cat([candidates().raw[0, [0, -1]], noise(1, WIDTH, seed=1)]))[2:]
    assert where.encode(replace(known, basis=away)) is None


@pytest.mark.parametrize("seed", range(8))
def test_a_fitted_shape_is_the_one_the_strengths_are_of(seed: int) -> None:
    draw = random.Random(seed)
    shape = Shape(draw.uniform(0.1, 1.5), draw.uniform(0, LAYERS - 1), draw.uniform(2, 16), draw.random())
    found = fitted({layer: shape.at(layer) for layer in range(LAYERS)}, LAYERS)
    assert max(abs(found.at(layer) - shape.at(layer)) for layer in range(LAYERS)) < 0.01


def test_a_fitted_shape_of_noise_is_better_than_a_constant_and_holds_its_bounds() -> None:
    draw = random.Random(0)
    strengths = {layer: draw.uniform(0, 1.2) for layer in range(LAYERS)}
    found, mean = fitted(strengths, LAYERS), sum(strengths.values()) / LAYERS
    errors = [sum((value(at) - s) ** 2 for at, s in strengths.items()) for value in (found.at, lambda _: mean)]
    assert errors[0] < errors[1]
    assert 0 <= found.floor <= 1
    assert LAYERS / 8 <= found.width <= LAYERS
    assert fitted({4: 0.6}, LAYERS).at(4) == pytest.approx(0.6)
    assert fitted(dict.fromkeys(range(LAYERS), 0.0), LAYERS).peak == 0


# --- the search


def test_objectives_that_need_replies_have_stand_ins() -> None:
    assert first_token_objectives("refusals, kl") == ["refusal-score", "kl"]
    assert first_token_objectives("refusals,nll,kl-reply,over-refusals") == [
        "refusal-score",
        "kl",
        "over-refusal-score",
    ]


def test_tpe_beats_chance_at_equal_trials() -> None:
    """Both with the same seeds and budget: the sum over seeds, and in most of them."""
    found: dict[str, list[float]] = {}
    for method in ("black-box", "random"):
        runs = [optimise(Bench(), space(), settings(method=method, trials=60), seed=seed) for seed in range(4)]
        assert all(len(points) == 60 for points in runs)
        found[method] = [volume(points) for points in runs]
    better = [one > other for one, other in zip(found["black-box"], found["random"], strict=True)]
    assert sum(found["black-box"]) > 1.03 * sum(found["random"])
    assert sum(better) >= 3


def test_nsga2_makes_progress_over_its_generations() -> None:
    points = optimise(Bench(), space(), settings(sampler="nsga2", trials=100), seed=0)
    first, last = rows(points[:20]), rows(points[-20:])
    assert len(points) == 100
    assert hypervolume([*first, *last], WORST) > hypervolume(first, WORST)
    assert sum(row[1] for row in last) / max(len(last), 1) < sum(row[1] for row in first) / len(first)


@pytest.mark.parametrize("changes", [{}, {"sampler": "nsga2"}, {"method": "random"}], ids=str)
def test_a_seed_decides_everything(changes: dict[str, Any]) -> None:
    one, again, other = (optimise(Bench(), space(), settings(**changes), seed=seed) for seed in (1, 1, 2))
    assert told(one) == told(again)
    assert told(one) != told(other)
    assert [point.origin for point in one] == [f"trial {number}" for number in range(1, 25)]


def good() -> dict[str, Any]:
    strengths = {f"layers.{at}.attention.weight": 1.0 for at in range(6, 12)}
    found = space().encode(Direction(orthonormal(candidates().at(9, -1)[None]), recipe=Recipe(strengths)))
    assert found is not None
    return found


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_given_parameters_come_first_and_lead_on(sampler: str) -> None:
    options = settings(sampler=sampler, trials=40)
    seeded = optimise(Bench(), space(), options, seed=3, seeds=[good()])
    assert space().suggest(FixedTrial(good())).recipe == seeded[0].direction.recipe
    alone = optimise(Bench(), space(), options, seed=3)
    assert volume(seeded) > volume(alone)
    later = [point.scores["refusal-score"] for point in seeded[len(seeded) // 2 :] if point.level == Level.ALL]
    before = [point.scores["refusal-score"] for point in alone[len(alone) // 2 :] if point.level == Level.ALL]
    assert sum(later) / len(later) < sum(before) / len(before)


def test_given_parameters_belong_to_the_first_generation(tmp_path: Path) -> None:
    journal = tmp_path / "search.jsonl"
    optimise(
        Bench(), space(), settings(sampler="nsga2", trials=3), seed=0, seeds=[good()] * 2, journal=Journal(journal)
    )
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    generations = {e["trial_id"]: key for e in entries for key in e.get("system_attr", {}) if "generation" in key}
    assert set(generations) == {0, 1, 2}


def test_hopeless_trials_cost_few_prompts_only() -> None:
    bench = Bench(offset=0.5)
    points = optimise(bench, space(), settings(trials=60), seed=0, seeds=[good()])
    levels = Counter(point.level for point in points)
    assert bench.calls[Level.FEW] == 60
    assert bench.calls[Level.ALL] == levels[Level.ALL] < 50
    assert all(point.level == Level.ALL for point in points[:WARM_UP])
    exact = [tuple(Bench()(point.direction, Level.ALL).values()) for point in points]
    front = nondominated(exact)
    assert all(points[i].level == Level.ALL for i in front), "a trial of the front was given up"
    for point, values in zip(points, exact, strict=True):
        offset = 0.5 if point.level == Level.FEW else 0.0
        assert point.scores["refusal-score"] == pytest.approx(values[0] + offset)


def test_noise_of_few_prompts_makes_it_careful() -> None:
    counts = []
    for jitter in (0.0, 4.0):
        bench = Bench(jitter=jitter)
        optimise(bench, space(), settings(trials=60, method="random"), seed=0, seeds=[good()])
        counts.append(bench.calls[Level.ALL])
    assert counts[0] < counts[1]


def seen(*few: tuple[float, float], spread: float = 0.0) -> list[Seen]:
    return [Seen(row, (row[0] + spread * (i % 2), row[1])) for i, row in enumerate(few)]


FRONT = ((-4.0, 0.4), (0.0, 0.1)) * (WARM_UP // 2)


@pytest.mark.parametrize(
    ("few", "expected"),
    [
        ((1.0, 0.2), True),  # worse than the second in both
        ((-3.0, 0.3), False),  # between them
        ((1.0, 0.11), False),  # worse in both, one of them by a tenth only
        ((-2.9, 0.6), True),
        ((-3.1, 0.6), False),  # the first is less than a quarter better
        ((-9.0, 9.0), False),  # best in one
    ],
)
def test_hopeless_is_clearly_worse_in_everything(few: tuple[float, float], expected: bool) -> None:
    assert hopeless(few, seen(*FRONT)) is expected


def test_hopeless_needs_experience_a_feasible_rival_and_more_than_noise() -> None:
    few = (1.0, 0.9)
    assert hopeless(few, seen(*FRONT))
    assert not hopeless(few, seen(*FRONT[1:]))
    assert not hopeless(few, [replace(one, feasible=False) for one in seen(*FRONT)])
    assert not hopeless(few, seen(*FRONT, spread=20.0))
    shifted = [Seen(row, (row[0] + 20, row[1])) for row in FRONT]
    assert hopeless(few, shifted), "what moves all alike is no noise"


def test_constraints_lead_away_from_what_breaks_them() -> None:
    free = optimise(Bench(), space(), settings(trials=60), seed=0)
    bound = optimise(Bench(), space(), settings(trials=60), seed=0, constraints={"kl": 0.4})
    shares = [sum(point.scores["kl"] <= 0.4 for point in points[20:]) / 40 for points in (free, bound)]
    assert shares[1] > shares[0]


def test_broken_trials_do_not_end_a_search() -> None:
    bench, count = Bench(), 0

    def measure(direction: Direction, level: Level) -> Mapping[str, float]:
        nonlocal count
        count += 1
        if count == 5:
            raise NumericalError("logits: expected finite numbers, found NaN")
        return {**bench(direction, level), "kl": math.nan} if count == 9 else bench(direction, level)

    points = optimise(measure, space(), settings(), seed=0)
    assert len(points) == 22
    assert all(math.isfinite(value) for point in points for value in point.scores.values())


def test_an_objective_that_first_tokens_do_not_tell_is_named() -> None:
    with pytest.raises(UsageError, match=r"^--objectives over-refusal-score: .*$"):
        optimise(Bench(), space(), settings(objectives="refusals,over-refusals"), seed=0)


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def refuse(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "optuna":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"^--method black-box: .* pip install 'abliterate\[search\]'$"):
        optimise(Bench(), space(), settings(), seed=0)


def test_optuna_says_nothing_and_keeps_its_own_level(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    level = optuna.logging.get_verbosity()
    optimise(Bench(), space(), settings(trials=3), seed=0)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert optuna.logging.get_verbosity() == level


# --- the journal


class Killed(BaseException):
    """Like a kill: nothing catches it."""


def killed_at(call: int, journal: Journal, **options: Any) -> None:
    bench, count = Bench(), 0

    def measure(direction: Direction, level: Level) -> Mapping[str, float]:
        nonlocal count
        count += 1
        if count == call:
            raise Killed
        return bench(direction, level)

    with pytest.raises(Killed):
        optimise(measure, space(), journal=journal, **options)


@pytest.mark.parametrize("changes", [{}, {"sampler": "nsga2"}, {"method": "random"}], ids=str)
@pytest.mark.parametrize("call", [2, 21])
def test_a_killed_search_goes_on_as_if_undisturbed(tmp_path: Path, changes: dict[str, Any], call: int) -> None:
    journal = tmp_path / "out" / "search.jsonl"
    whole = optimise(Bench(), space(), settings(**changes), seed=5, seeds=[good()])
    killed_at(call, Journal(journal), settings=settings(**changes), seed=5, seeds=[good()])
    killed_at(7, Journal(journal, True), settings=settings(**changes), seed=5, seeds=[good()])
    bench, steps = Bench(), list[int]()
    points = optimise(
        bench,
        space(),
        settings(**changes),
        seed=5,
        seeds=[good()],
        journal=Journal(journal, True),
        progress=steps.append,
    )
    assert told(points) == told(whole)
    assert sum(steps) == 24
    assert bench.calls[Level.FEW] == 24 - steps[0] < 24


def test_a_finished_search_is_read_back_without_measuring_and_may_go_on(tmp_path: Path) -> None:
    journal = tmp_path / "search.jsonl"
    first = optimise(Bench(), space(), settings(), seed=0, journal=Journal(journal))
    bench = Bench()
    again = optimise(bench, space(), settings(), seed=0, journal=Journal(journal, True))
    assert told(again) == told(first)
    assert not bench.calls
    more = optimise(bench, space(), settings(trials=30), seed=0, journal=Journal(journal, True))
    assert told(more)[:24] == told(first)
    assert len(more) == 30
    assert bench.calls[Level.FEW] == 6


def test_a_torn_last_line_is_that_of_a_kill(tmp_path: Path) -> None:
    journal = tmp_path / "search.jsonl"
    whole = optimise(Bench(), space(), settings(), seed=0)
    killed_at(18, Journal(journal), settings=settings(), seed=0)
    data = journal.read_bytes()
    journal.write_bytes(data[: len(data) * 2 // 3])
    points = optimise(Bench(), space(), settings(), seed=0, journal=Journal(journal, True))
    assert len(points) == 24
    assert all(json.loads(line)["op_code"] >= 0 for line in journal.read_text().splitlines())
    assert told(points)[:5] == told(whole)[:5]


def test_every_prefix_of_a_journal_can_be_gone_on_with(tmp_path: Path) -> None:
    journal = tmp_path / "search.jsonl"
    optimise(Bench(), space(), settings(trials=3), seed=0, journal=Journal(journal), seeds=[good()])
    whole = told(optimise(Bench(), space(), settings(trials=3), seed=0, seeds=[good()]))
    lines = journal.read_bytes().splitlines(keepends=True)
    for end in range(len(lines) + 1):
        journal.write_bytes(b"".join(lines[:end]))
        found = optimise(Bench(), space(), settings(trials=3), seed=0, journal=Journal(journal, True), seeds=[good()])
        assert told(found) == whole, f"cut after line {end}"


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    journal = tmp_path / "search.jsonl"
    optimise(Bench(), space(), settings(trials=3), seed=0, journal=Journal(journal, facts={"model": "one"}))
    return journal


def test_a_journal_is_not_overwritten(begun: Path) -> None:
    data = begun.read_bytes()
    with pytest.raises(UsageError, match=r"^'.*search.jsonl': a search was begun here.*--resume.*$"):
        optimise(Bench(), space(), settings(), seed=0, journal=Journal(begun))
    assert begun.read_bytes() == data


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 1}, "seed 1 instead of 0"),
        ({"settings": settings(sampler="nsga2")}, "sampler nsga2 instead of tpe"),
        ({"settings": settings(objectives="nll,refusals")}, "objectives .*"),
        ({"space": space(EditSettings(layers="2-5"))}, "attention.centre .*"),
        ({"space": space(finding=FindSettings(all_prompts=True))}, "finding {'all_prompts': True} instead of {}"),
        ({"space": space(site=Site(7, -1))}, "site .* instead of None"),
        ({"constraints": {"kl": 0.1}}, "constraints .*"),
        ({"facts": {"model": "two"}}, "model two instead of one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_journal_of_another_search_is_refused(begun: Path, changes: dict[str, Any], what: str) -> None:
    options = {"space": space(), "settings": settings(), "seed": 0, "facts": {"model": "one"}, **changes}
    facts = options.pop("facts")
    data = begun.read_bytes()
    with pytest.raises(UsageError, match=rf"^--resume: .*{what}.*$"):
        optimise(Bench(), journal=Journal(begun, True, facts), **options)
    assert Bench().calls == Counter()
    assert begun.read_bytes().startswith(data)


@pytest.mark.parametrize("damage", [b"\x00\xff\n", b"[]\n", b'{"op_code": 99}\n', b'{"op_code": 4}\n'])
def test_a_damaged_journal_is_one_clear_line(begun: Path, damage: bytes) -> None:
    lines = begun.read_bytes().splitlines(keepends=True)
    begun.write_bytes(b"".join([*lines[:4], damage, *lines[4:]]))
    with pytest.raises(CheckpointError, match=r"^'.*search.jsonl': damaged.*$") as caught:
        optimise(Bench(), space(), settings(), seed=0, journal=Journal(begun, True, {"model": "one"}))
    assert "\n" not in str(caught.value)


def test_two_searches_do_not_share_a_journal(begun: Path) -> None:
    bench = Bench()
    options: dict[str, Any] = {"seed": 0, "journal": Journal(begun, True, {"model": "one"})}

    def measure(direction: Direction, level: Level) -> Mapping[str, float]:
        with pytest.raises(UsageError, match=r"^'.*search.jsonl': another search is writing it.*$"):
            optimise(bench, space(), settings(), **options)
        return bench(direction, level)

    assert len(optimise(measure, space(), settings(trials=4), **options)) == 4
    assert not list(begun.parent.glob("*.lock*")), "locks that outlive a kill"
