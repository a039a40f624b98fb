"""Searching on a model whose refusal direction is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from abliterate import pipeline
from abliterate.config import EditSettings, EvalSettings, FindSettings, SearchSettings
from abliterate.directions import Direction, Recipe, load_direction, save_direction
from abliterate.errors import UsageError
from abliterate.finding import best_separated
from abliterate.inference import SharedPrefix, last_logits
from abliterate.interventions import ablation
from abliterate.judging import RuleJudge
from abliterate.measuring import random_direction
from abliterate.plan import Plan
from abliterate.search import Meter, Stage, method_of, search
from abliterate.search.gradient import descend, frozen, legs
from abliterate.search.objectives import OBJECTIVES, limits_of, objectives_named, values
from abliterate.session import Findings, Session
from planted import Planted, plant
from test_pipeline import prompt_settings


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def session(planted: Planted) -> Session:
    return pipeline.open_session(str(planted.folder), prompts=prompt_settings(planted))


@pytest.fixture(scope="module")
def findings(session: Session) -> Findings:
    return pipeline.find(session, FindSettings())


@pytest.fixture
def start(session: Session, findings: Findings) -> Direction:
    return best_separated(session, findings, FindSettings())


def ids(findings: Findings) -> list[int]:
    return [token.token for token in findings.tokens]


def logits(session: Session, plan: Plan) -> torch.Tensor:
    prompts = session.encoded["harmful", "val"].take(range(8))
    with ablation(session.model, plan):
        return last_logits(session.model, SharedPrefix(session.model, prompts.prefix), prompts.suffixes)


def test_the_gradient_stops_refusal_from_a_bad_start(session: Session, findings: Findings, planted: Planted) -> None:
    generator = torch.Generator().manual_seed(5)
    off = planted.direction + 0.3 * torch.randn(len(planted.direction), generator=generator)
    start = Direction((off / off.norm())[None], {})
    meter = Meter(session, ids(findings), RuleJudge(), EvalSettings(max_new_tokens=6))
    refusals = objectives_named("refusals,kl")[:1]
    (found,) = descend(session, ids(findings), start, EditSettings(), legs(1, 80), seed=1)
    base, before, after = (
        values(meter.measure(plan, Stage.REPLIES), refusals)["refusals"]
        for plan in (None, session.plan(start), session.plan(found))
    )
    assert min(base, before) > 0.5, "the control: the start alone does little"
    assert after < 0.1


def test_every_site_has_its_own_direction(session: Session, findings: Findings, start: Direction) -> None:
    (found,) = descend(session, ids(findings), start, EditSettings(), legs(1, 4))
    assert found.per_site is not None
    assert found.per_site.shape == (session.anatomy.layers + 1, 1, session.anatomy.d_model)
    torch.testing.assert_close(found.per_site.norm(dim=-1), torch.ones(session.anatomy.layers + 1, 1))
    bases = {edit.writer.block: edit.basis for edit in session.plan(found).edits}
    assert not torch.allclose(bases[2], bases[4], atol=1e-3)


def test_more_weight_on_kl_costs_less_and_refuses_more(session: Session, findings: Findings, start: Direction) -> None:
    found = descend(session, ids(findings), start, EditSettings(), legs(3, 45, lightest=1e-3, heaviest=1e9), seed=1)
    meter = Meter(session, ids(findings), RuleJudge(), EvalSettings())
    measured = [meter.measure(session.plan(direction), Stage.ALL) for direction in found]
    kl = [float(m.kl.mean()) for m in measured]
    refusing = [float(m.harmful.mean()) for m in measured]
    assert kl[0] > kl[-1]
    assert refusing[0] < refusing[-1]


def test_a_fixed_direction_and_fixed_strengths_stay(session: Session, findings: Findings, start: Direction) -> None:
    (kept,) = descend(session, ids(findings), start, EditSettings(), legs(1, 4), refine=False)
    torch.testing.assert_close(kept.basis, start.basis)
    editing = EditSettings(strengths="attention=0.7", components="attention,mlp")
    (found,) = descend(session, ids(findings), start, editing, legs(1, 4))
    plan = session.plan(found)
    by_kind = {edit.writer.name: edit.strength for edit in plan.edits}
    assert {s for name, s in by_kind.items() if "o_proj" in name} == {0.7}
    assert len({s for name, s in by_kind.items() if "down_proj" in name}) > 1
    assert not any("embed" in name for name in by_kind)
    (found,) = descend(session, ids(findings), start, EditSettings(strength=0.6), legs(1, 4))
    assert {edit.strength for edit in session.plan(found).edits} == {0.6}
    with pytest.raises(UsageError, match="nothing to search"):
        descend(session, ids(findings), start, EditSettings(strength=0.6), legs(1, 4), refine=False)


@pytest.mark.parametrize("editing", [EditSettings(norm_preserving=True), EditSettings(biprojected=True)])
def test_variants_are_optimised_as_they_are_applied(
    session: Session, findings: Findings, start: Direction, editing: EditSettings
) -> None:
    (found,) = descend(session, ids(findings), start, editing, legs(1, 6))
    assert found.recipe is not None
    # The recipe alone says it, so that a point's file needs no option.
    torch.testing.assert_close(logits(session, session.plan(found)), logits(session, session.plan(found, editing)))


def test_gradients_are_those_of_the_hooks(session: Session, findings: Findings, start: Direction) -> None:
    """Against differences: strength of one writer, everything in float32."""
    prompts = session.encoded["harmful", "train"].take(range(4))
    names = [writer.name for writer in session.anatomy.writers]

    def score(strengths: Mapping[str, object], *, grad: bool) -> torch.Tensor:
        plan = session.plan(replace(start, recipe=Recipe(strengths)))  # type: ignore[arg-type]
        with ablation(session.model, plan):
            shared = SharedPrefix(session.model, prompts.prefix, grad=grad)
            return last_logits(session.model, shared, prompts.suffixes)[:, ids(findings)].sum()

    value = torch.tensor(0.5, requires_grad=True)
    with frozen(session.model):
        (gradient,) = torch.autograd.grad(score(dict.fromkeys(names, 0.5) | {names[3]: value}, grad=True), value)
    up, down = (float(score(dict.fromkeys(names, 0.5) | {names[3]: 0.5 + e}, grad=False)) for e in (1e-2, -1e-2))
    assert float(gradient) == pytest.approx((up - down) / 2e-2, rel=2e-2, abs=1e-4)
    assert abs(float(gradient)) > 1e-3


def test_a_point_survives_its_file(session: Session, findings: Findings, start: Direction, tmp_path: Path) -> None:
    (found,) = descend(session, ids(findings), start, EditSettings(biprojected=True), legs(1, 4))
    save_direction(tmp_path / "point.safetensors", found)
    back = load_direction(tmp_path / "point.safetensors")
    assert back.recipe == found.recipe
    assert "recipe" not in back.metadata
    assert torch.equal(logits(session, session.plan(back)), logits(session, session.plan(found)))
    half = session.plan(back, EditSettings(strength=0.5))
    assert {e.writer.name: e.strength for e in half.edits} == pytest.approx(
        {e.writer.name: e.strength / 2 for e in session.plan(back).edits}
    )
    with pytest.raises(UsageError, match="writer of this model"):
        session.plan(replace(found, recipe=Recipe({"model.layers.99.mlp.down_proj.weight": 1.0})))


def test_search_by_gradient(session: Session, findings: Findings, start: Direction) -> None:
    settings = SearchSettings(points=3, steps=24, search_tokens=6)
    evaluating = EvalSettings(max_new_tokens=6)
    # Some of the harmless prompts are refused before and answered after: that is most of the KL here.
    finding = FindSettings(max_kl=1.0)
    result = search(session, findings, start, settings, "gradient", RuleJudge(), evaluating=evaluating, finding=finding)
    assert len(result.points) == 3
    assert result.base["refusals"] > 0.9
    assert result.chosen in result.on_front()
    assert result.point.scores["refusals"] < 0.2
    assert result.base_held_out is not None
    for point in result.points:
        assert point.held_out is not None
        assert set(point.held_out) == set(point.scores)
        low, high = (point.intervals or {})["refusals"]
        assert low <= point.held_out["refusals"] <= high
    assert result.evaluations["replies"] == 4


def test_a_random_direction_is_no_point(session: Session, findings: Findings) -> None:
    meter = Meter(session, ids(findings), RuleJudge(), EvalSettings(max_new_tokens=6))
    plan = session.plan(random_direction(1, session.anatomy.d_model, 3))
    assert values(meter.measure(plan, Stage.REPLIES), objectives_named("refusals,kl"))["refusals"] > 0.8


def test_every_objective_can_be_measured_and_is_nothing_for_the_unedited_model(
    session: Session, findings: Findings, start: Direction
) -> None:
    meter = Meter(session, ids(findings), RuleJudge(), EvalSettings(max_new_tokens=6))
    objectives = tuple(OBJECTIVES.values())
    base = values(meter.measure(None, Stage.SHIFT), objectives)
    edited = values(meter.measure(session.plan(start), Stage.SHIFT), objectives)
    assert set(base) == set(edited) == set(OBJECTIVES)
    assert {name: base[name] for name in ("kl", "kl-reply", "nll", "length", "repetition")} == pytest.approx(
        dict.fromkeys(("kl", "kl-reply", "nll", "length", "repetition"), 0.0), abs=1e-5
    )
    assert edited["kl"] > 1e-6
    few = values(meter.measure(session.plan(start), Stage.FEW), objectives)
    assert set(few) == {"kl", "refusal-score", "over-refusal-score"}


def test_limits_are_absolute_or_above_the_unedited_model() -> None:
    base = {"refusals": 0.5, "over-refusals": 0.1}
    assert limits_of("over-refusals<=+0.02, refusals<=0.3", base) == pytest.approx(
        {"over-refusals": 0.12, "refusals": 0.3}
    )
    for wrong in ("kl", "kl<=", "kl<=x", "speed<=1", "kl<=nan"):
        with pytest.raises(UsageError, match="--constraints"):
            limits_of(wrong, base)


@pytest.mark.parametrize("wrong", ["refusals", "refusals,refusals", "refusals,speed", ""])
def test_objectives_that_cannot_be_read(wrong: str) -> None:
    with pytest.raises(UsageError, match="--objectives"):
        objectives_named(wrong)


def test_auto_is_the_gradient_unless_the_edit_is_fixed() -> None:
    auto, finding = SearchSettings(), FindSettings()
    assert method_of(auto, finding, EditSettings()) == "gradient"
    for editing in (EditSettings(strength=-1), EditSettings(affine=True), EditSettings(strengths="mlp=0.3")):
        assert method_of(auto, finding, editing) == "closed-form"
    assert method_of(auto, FindSettings(subspace="leace"), EditSettings()) == "closed-form"
    assert method_of(SearchSettings(method="random"), finding, EditSettings(strength=2)) == "random"
