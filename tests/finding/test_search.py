"""Searching on a model whose refusal direction is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import abliterate
from abliterate import pipeline
from abliterate.config import (
    ApplySettings,
    EditSettings,
    EvalSettings,
    FindSettings,
    OutputSettings,
    RunSettings,
    SearchSettings,
)
from abliterate.edit.direction import Direction, Recipe, load_direction, save_direction
from abliterate.edit.hooks import ablation
from abliterate.edit.plan import Plan
from abliterate.errors import GateNotMet, ModelError, UsageError
from abliterate.evaluation.examine import random_direction
from abliterate.evaluation.first_tokens import first_tokens
from abliterate.evaluation.judging import RuleJudge
from abliterate.evaluation.probe import Probe
from abliterate.finding.find import Findings, best_separated
from abliterate.finding.search import Level, Point, Search, held_out, method_of, search
from abliterate.finding.search.gradient import descend, frozen, legs
from abliterate.finding.search.objectives import OBJECTIVES, limits_of, objectives_named, values
from abliterate.finding.search.readers import RIDGE, begun, written_by
from abliterate.finding.search.search import choose_point
from abliterate.model.batches import SharedPrefix, last_logits
from abliterate.record import read_record
from abliterate.session import Session
from planted import Planted, plant
from test_pipeline import prompt_settings, settings, shard_bytes


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


def probe_of(session: Session, findings: Findings) -> Probe:
    return Probe(session, findings.ids, judge=RuleJudge(), settings=EvalSettings(max_new_tokens=6))


def logits(session: Session, plan: Plan) -> torch.Tensor:
    prompts = session.encoded["harmful", "val"].take(range(8))
    with ablation(session.model, plan):
        return last_logits(session.model, SharedPrefix(session.model, prompts.prefix), prompts.suffixes)


def test_the_gradient_stops_refusal_from_a_bad_start(session: Session, findings: Findings, planted: Planted) -> None:
    generator = torch.Generator().manual_seed(5)
    off = planted.direction + 0.3 * torch.randn(len(planted.direction), generator=generator)
    start = Direction((off / off.norm())[None])
    probe = probe_of(session, findings)
    refusals = objectives_named("refusals,kl")[:1]
    (found,) = descend(replace(session, seed=1), findings.ids, start, EditSettings(), legs(1, 80))
    base, before, after = (
        values(probe.measure(plan, Level.REPLIES), refusals)["refusals"]
        for plan in (None, session.plan(start), session.plan(found))
    )
    assert min(base, before) > 0.5, "the control: the start alone does little"
    assert after < 0.1


def test_every_writer_has_its_own_edit(session: Session, findings: Findings, start: Direction, tmp_path: Path) -> None:
    (found,) = descend(session, findings.ids, start, EditSettings(), legs(1, 4))
    own, plan = found.per_writer, session.plan(found)
    assert own is not None
    assert found.recipe is not None
    assert set(own.names) == set(found.recipe.strengths) == {edit.writer.name for edit in plan.edits}
    torch.testing.assert_close(own.basis.norm(dim=-1), torch.ones(len(own.names), 1))
    left = {edit.writer.name: edit.basis for edit in plan.edits}
    assert not torch.allclose(left[own.names[-1]], left[own.names[-2]], atol=1e-3)
    save_direction(tmp_path / "point.safetensors", found)
    back = load_direction(tmp_path / "point.safetensors")
    assert back == found
    assert torch.equal(logits(session, session.plan(back)), logits(session, plan))
    assert "writers" not in back.facts


def test_readers_hardly_read_what_harmless_prompts_make_writers_write(session: Session, start: Direction) -> None:
    """The control's reader is the direction itself; both read one of the direction."""
    writers = [writer for writer in session.anatomy.writers if writer.block is not None]
    prompts = session.encoded["harmless", "train"]
    modules = {writer.name: writer.module for writer in writers}
    with written_by(session.model, modules, session.anatomy.d_model) as written:
        first_tokens(session.model, prompts, [0], session.size)
    readers, rows = begun(start.basis.expand(len(writers), *start.basis.shape), list(written.values()))
    found = readers(rows)
    torch.testing.assert_close((found @ start.basis.T).flatten(), torch.ones(len(writers)), atol=1e-3, rtol=0)
    torch.testing.assert_close(readers(3 * rows), found)
    for reader, squares in zip(found, written.values(), strict=True):
        assert reader @ squares @ reader.T < 0.5 * start.basis @ squares @ start.basis.T


def test_what_writers_write_is_summed_over_the_prompts_own_tokens(session: Session) -> None:
    """Against each prompt run by itself, without padding."""
    prompts = session.encoded["harmless", "train"].take(range(5))
    assert len({len(suffix) for suffix in prompts.suffixes}) > 1, "the control: there is padding"
    writer = session.anatomy.writers[-1]
    module, width = {writer.name: writer.module}, session.anatomy.d_model
    with written_by(session.model, module, width) as together:
        first_tokens(session.model, prompts, [0], session.size)
    alone = torch.zeros_like(together[writer.name])
    for row in range(5):
        with written_by(session.model, module, width) as one:
            first_tokens(session.model, prompts.take([row]), [0], session.size)
        alone += one[writer.name]
    torch.testing.assert_close(together[writer.name], alone, rtol=1e-4, atol=1e-5)


def test_readers_solve_the_ridge_regression_that_they_say() -> None:
    generator = torch.Generator().manual_seed(7)
    left, written = (torch.randn(*shape, generator=generator) for shape in ((1, 2, 12), (30, 12)))
    readers, rows = begun(left, [written.T @ written])
    inverse = torch.linalg.inv(torch.eye(12) + written.T @ written / (30 * RIDGE * written.square().mean()))
    expected = torch.linalg.inv(left[0] @ inverse @ left[0].T) @ left[0] @ inverse
    torch.testing.assert_close(readers(rows)[0], expected, rtol=1e-3, atol=1e-4)
    unknown, rows = begun(left, [torch.zeros(12, 12)])
    torch.testing.assert_close(unknown(rows)[0], torch.linalg.pinv(left[0]).T)


def test_more_weight_on_kl_costs_less_and_refuses_more(session: Session, findings: Findings, start: Direction) -> None:
    way = legs(3, 45, weights=(1e-3, 1e9))
    found = descend(replace(session, seed=1), findings.ids, start, EditSettings(), way)
    probe = Probe(session, findings.ids)
    measured = [probe.measure(session.plan(direction), Level.ALL) for direction in found]
    kl = [float(m.kl.mean()) for m in measured]
    refusing = [float(m.harmful.mean()) for m in measured]
    assert kl[0] > kl[-1]
    assert refusing[0] < refusing[-1]


def test_a_fixed_direction_and_fixed_strengths_stay(session: Session, findings: Findings, start: Direction) -> None:
    (kept,) = descend(session, findings.ids, start, EditSettings(), legs(1, 4), refine=False)
    torch.testing.assert_close(kept.basis, start.basis)
    editing = EditSettings(strengths="attention=0.7", components="attention,mlp")
    (found,) = descend(session, findings.ids, start, editing, legs(1, 4))
    plan = session.plan(found)
    by_kind = {edit.writer.name: edit.strength for edit in plan.edits}
    assert {s for name, s in by_kind.items() if "o_proj" in name} == {0.7}
    assert len({s for name, s in by_kind.items() if "down_proj" in name}) > 1
    assert not any("embed" in name for name in by_kind)
    (found,) = descend(session, findings.ids, start, EditSettings(strengths="attention=1"), legs(1, 4))
    assert {e.strength for e in session.plan(found).edits if "o_proj" in e.writer.name} == {1.0}
    (found,) = descend(session, findings.ids, start, EditSettings(strength=0.6), legs(1, 4))
    assert {edit.strength for edit in session.plan(found).edits} == {0.6}
    with pytest.raises(UsageError, match="nothing to search"):
        descend(session, findings.ids, start, EditSettings(strength=0.6), legs(1, 4), refine=False)


@pytest.mark.parametrize("editing", [EditSettings(norm_preserving=True), EditSettings(biprojected=True)])
def test_variants_are_optimised_as_they_are_applied(
    session: Session, findings: Findings, start: Direction, editing: EditSettings
) -> None:
    (found,) = descend(session, findings.ids, start, editing, legs(1, 6))
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
            return last_logits(session.model, shared, prompts.suffixes)[:, findings.ids].sum()

    value = torch.tensor(0.5, requires_grad=True)
    with frozen(session.model):
        (gradient,) = torch.autograd.grad(score(dict.fromkeys(names, 0.5) | {names[3]: value}, grad=True), value)
    up, down = (float(score(dict.fromkeys(names, 0.5) | {names[3]: 0.5 + e}, grad=False)) for e in (1e-2, -1e-2))
    assert float(gradient) == pytest.approx((up - down) / 2e-2, rel=2e-2, abs=1e-4)
    assert abs(float(gradient)) > 1e-3


def test_a_point_survives_its_file(session: Session, findings: Findings, start: Direction, tmp_path: Path) -> None:
    (found,) = descend(session, findings.ids, start, EditSettings(biprojected=True), legs(1, 4))
    save_direction(tmp_path / "point.safetensors", found)
    back = load_direction(tmp_path / "point.safetensors")
    assert back.recipe == found.recipe
    assert "recipe" not in back.facts
    assert torch.equal(logits(session, session.plan(back)), logits(session, session.plan(found)))
    half = session.plan(back, EditSettings(strength=0.5))
    assert {e.writer.name: e.strength for e in half.edits} == pytest.approx(
        {e.writer.name: e.strength / 2 for e in session.plan(back).edits}
    )
    with pytest.raises(UsageError, match="writer of this model"):
        session.plan(replace(found, recipe=Recipe({"model.layers.99.mlp.down_proj.weight": 1.0})))


def test_search_by_gradient(session: Session, findings: Findings, start: Direction) -> None:
    settings = RunSettings(
        model=session.loaded.files.name,
        # Some of the harmless prompts are refused before and answered after: that is most of the KL here.
        finding=FindSettings(max_kl=1.0),
        searching=SearchSettings(points=3, steps=24, search_tokens=6),
        evaluating=EvalSettings(max_new_tokens=6),
    )
    result = search(session, findings, start, RuleJudge(), settings, "gradient")
    assert len(result.points) == 3
    assert result.base["refusals"] > 0.9
    assert result.chosen in result.on_front()
    assert result.point.scores["refusals"] < 0.2
    assert result.evaluations["replies"] == 4
    assert result.base_held_out is None, "nothing was measured on them yet"
    probe = Probe(session, findings.ids, "test", RuleJudge(), settings.evaluating)
    again = held_out(result, probe, [0, 2])
    assert again.base_held_out is not None
    assert again.points[1] == result.points[1]
    for point in (again.points[0], again.points[2]):
        assert point.held_out is not None
        assert set(point.held_out) == set(point.scores)
        low, high = (point.intervals or {})["refusals"]
        assert low <= point.held_out["refusals"] <= high


def test_a_random_direction_is_no_point(session: Session, findings: Findings) -> None:
    probe = probe_of(session, findings)
    plan = session.plan(random_direction(1, session.anatomy.d_model, 3))
    assert values(probe.measure(plan, Level.REPLIES), objectives_named("refusals,kl"))["refusals"] > 0.8


def test_every_objective_can_be_measured_and_is_nothing_for_the_unedited_model(
    session: Session, findings: Findings, start: Direction
) -> None:
    probe = probe_of(session, findings)
    objectives = tuple(OBJECTIVES.values())
    base = values(probe.measure(None, Level.SHIFT), objectives)
    edited = values(probe.measure(session.plan(start), Level.SHIFT), objectives)
    assert set(base) == set(edited) == set(OBJECTIVES)
    assert {name: base[name] for name in ("kl", "kl-reply", "nll", "length", "repetition")} == pytest.approx(
        dict.fromkeys(("kl", "kl-reply", "nll", "length", "repetition"), 0.0), abs=1e-5
    )
    assert edited["kl"] > 1e-6
    few = values(probe.measure(session.plan(start), Level.FEW), objectives)
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


def job(planted: Planted, out: Path, **changes: Any) -> RunSettings:
    searching = SearchSettings(**{"points": 3, "steps": 24, "trials": 10, "search_tokens": 6} | changes)
    evaluating = EvalSettings(max_new_tokens=6)
    finding = FindSettings(max_kl=1.0)
    return settings(planted, out, searching=searching, evaluating=evaluating, finding=finding)


def test_a_run_writes_the_chosen_point_and_any_other_can_be_applied(planted: Planted, tmp_path: Path) -> None:
    record = pipeline.run(job(planted, tmp_path / "out"))
    part = record.search
    assert part is not None
    assert part.method == "gradient"
    assert record.evaluation is not None
    assert record.evaluation.after is not None
    assert record.evaluation.after.harmful.refusals == 0
    assert record.evaluation.before.harmful.refusals > 20
    measured = [point.number for point in part.points if point.held_out is not None]
    assert measured == [part.chosen], "it is the one that was evaluated"
    for point in part.points:
        assert point.file is not None
        again = tmp_path / f"again-{point.number}"
        pipeline.apply(
            str(planted.folder), tmp_path / "out" / point.file, ApplySettings(output=OutputSettings(out=again))
        )
        same = shard_bytes(again) == shard_bytes(tmp_path / "out")
        assert same == (point.number == part.chosen)
    assert abliterate.verify_files(tmp_path / "out").intact


def test_what_the_evaluation_says_of_the_chosen_point_is_what_hooks_say_of_it(
    planted: Planted, session: Session, findings: Findings, tmp_path: Path
) -> None:
    objectives = "refusals,kl,over-refusals,kl-reply,length"
    written = pipeline.run(job(planted, tmp_path / "run", objectives=objectives))
    assert written.search is not None
    assert written.evaluation is not None
    assert written.evaluation.after is not None
    one = written.search.point
    assert one is not None
    assert one.held_out is not None
    probe = Probe(session, findings.ids, "test", RuleJudge(), EvalSettings(max_new_tokens=6))
    plan = session.plan(load_direction(tmp_path / "run" / "direction.safetensors"))
    hooked, base = (
        values(probe.measure(edit, level), objectives_named(objectives))
        for edit, level in ((plan, Level.SHIFT), (None, Level.REPLIES))
    )
    assert hooked["kl"] > 1e-7, "the control: the edit does something"
    assert one.held_out == pytest.approx(hooked, rel=1e-2, abs=1e-8)
    assert written.search.base_held_out is not None
    assert {name: written.search.base_held_out[name] for name in hooked} == pytest.approx(base)
    assert one.held_out["refusals"] == written.evaluation.after.harmful.rate
    assert written.search.base_held_out["over-refusals"] == written.evaluation.before.harmless.rate
    assert "measure points on held-out prompts" not in written.timings_s


@pytest.mark.parametrize(("asked", "measured"), [("chosen", 1), ("all", 3), ("none", 0)])
def test_points_are_measured_on_held_out_prompts_as_asked(
    planted: Planted, tmp_path: Path, asked: str, measured: int
) -> None:
    records = [
        pipeline.run(job(planted, tmp_path / "run", held_out=asked)),
        pipeline.search(job(planted, tmp_path / "search", held_out=asked)),
    ]
    for part in (record.search for record in records):
        assert part is not None
        assert sum(point.held_out is not None for point in part.points) == measured
        assert (part.base_held_out is None) == (measured == 0)


@pytest.mark.parametrize("method", ["gradient", "black-box", "both", "random"])
def test_search_writes_points_that_do_what_they_say(planted: Planted, tmp_path: Path, method: str) -> None:
    record = pipeline.search(job(planted, tmp_path / "front", method=method))
    part = record.search
    assert part is not None
    assert (tmp_path / "front" / "trials.log").exists() == (method != "gradient")
    session = pipeline.open_session(str(planted.folder), prompts=prompt_settings(planted))
    tokens = [token.token for token in record.refusal_tokens]
    probe = Probe(session, tokens, judge=RuleJudge(), settings=EvalSettings(max_new_tokens=6))
    objectives = objectives_named("refusals,kl")
    for point in part.points:
        direction = load_direction(tmp_path / "front" / str(point.file))
        measured = values(probe.measure(session.plan(direction), Level.REPLIES), objectives)
        assert measured == pytest.approx({name: point.scores[name] for name in measured}, rel=1e-3, abs=1e-6)
    assert part.chosen is not None
    chosen = load_direction(tmp_path / "front" / "direction.safetensors")
    same = load_direction(tmp_path / "front" / str(part.points[part.chosen - 1].file))
    assert chosen.recipe == same.recipe
    assert chosen.learnt_from


def test_another_point_is_picked_without_searching(planted: Planted, tmp_path: Path) -> None:
    folder = tmp_path / "front"
    record = pipeline.search(job(planted, folder, pick="2", held_out="none"))
    assert record.search is not None
    assert (record.search.chosen, record.search.why) == (2, "picked")
    again = pipeline.pick(folder, 3)
    assert again.search is not None
    assert again.search.chosen == 3
    third = load_direction(folder / "front" / "03.safetensors")
    assert load_direction(folder / "direction.safetensors").recipe == third.recipe
    assert read_record(folder) == again
    with pytest.raises(UsageError, match="--pick 9"):
        pipeline.pick(folder, 9)
    assert read_record(folder) == again
    with pytest.raises(UsageError, match="--pick 9"):
        pipeline.search(job(planted, tmp_path / "other", pick="9", held_out="none"))
    with pytest.raises(UsageError, match="expected a new or empty folder"):
        pipeline.search(job(planted, folder))
    with pytest.raises(UsageError, match="expected the trials of a search"):
        pipeline.search(job(planted, tmp_path / "third"), resume=True)


def test_a_search_goes_on_where_it_was_killed(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.search(job(planted, tmp_path / "whole", method="random", held_out="none"))
    measure, calls = Probe.measure, []

    def killed(self: Probe, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return measure(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.search(job(planted, tmp_path / "cut", method="random", held_out="none"))
    resumed = pipeline.search(job(planted, tmp_path / "cut", method="random", held_out="none"), resume=True)
    assert whole.search is not None
    assert resumed.search is not None
    assert [p.scores for p in resumed.search.points] == [p.scores for p in whole.search.points]
    assert resumed.search.evaluations["few"] < whole.search.evaluations["few"]


def test_what_is_asked_for_is_chosen() -> None:
    direction = Direction(torch.eye(1, 4))
    scores = [(0.0, 0.02, 0.3), (0.05, 0.01, 0.1), (0.1, 0.004, 0.1), (0.5, 0.001, 0.1)]
    points = tuple(
        Point(direction, f"{i}", {"refusals": r, "kl": k, "over-refusals": o}, Level.REPLIES)
        for i, (r, k, o) in enumerate(scores)
    )
    limits = {"over-refusals": 0.12, "kl": 0.1}
    result = Search("gradient", ("refusals", "kl"), "", limits, points, 0, "", {}, None, {}, 0.0, prompts=100)
    auto = SearchSettings()

    def chosen(result: Search = result, **asked: Any) -> int:
        return choose_point(result, auto.model_copy(update=asked)).chosen

    assert chosen() == 1, "0 is over its limit; 5 % are few enough"
    assert chosen(pick="knee") == 2
    assert chosen(max_refusals=0.1) == 2
    assert chosen(replace(result, limits={"kl": 0.03})) == 1, "0 % at twice the damage"
    assert chosen(replace(result, limits={"kl": 0.002})) == 3
    assert chosen(pick="1") == 0
    with pytest.raises(GateNotMet, match="no point keeps"):
        chosen(replace(result, limits={"kl": 0.0005}))
    with pytest.raises(GateNotMet, match="no point keeps"):
        chosen(replace(result, limits={"over-refusals": 0.05}))
    with pytest.raises(GateNotMet, match="no point keeps"):
        chosen(max_refusals=0.01)


@pytest.mark.parametrize(
    ("rates", "prompts", "chosen", "why"),
    [
        ((0.0, 0.04, 0.05, 0.06), 100, 2, "at most 5 % refusals"),
        ((0.05, 0.06, 0.07, 0.5), 100, 0, "at most 5 % refusals"),  # what is enough is no estimate
        ((0.10, 0.12, 0.13, 0.14), 100, 2, "at most 13.0 % refusals"),  # 10 % and √(0.1 · 0.9 / 100)
        ((0.10, 0.12, 0.13, 0.14), 10_000, 0, "at most 10.3 % refusals"),
        ((float("nan"), 0.12, 0.13, 0.5), 100, 2, "at most 15.2 % refusals"),
    ],
)
def test_of_points_that_refuse_alike_the_one_with_least_damage_is_chosen(
    rates: tuple[float, ...], prompts: int, chosen: int, why: str
) -> None:
    direction = Direction(torch.eye(1, 4))
    points = tuple(
        Point(direction, "", {"refusals": rate, "kl": kl}, Level.REPLIES)
        for rate, kl in zip(rates, (0.04, 0.03, 0.02, 0.01), strict=True)
    )
    result = Search("gradient", ("refusals", "kl"), "", {"kl": 0.1}, points, 0, "", {}, None, {}, 0.0, prompts)
    found = choose_point(result, SearchSettings())
    assert found.chosen == chosen
    assert why in found.why


def test_where_refusals_are_no_objective_the_knee_is_chosen() -> None:
    direction = Direction(torch.eye(1, 4))
    points = tuple(
        Point(direction, "", {"kl": kl, "nll": nll}, Level.REPLIES) for kl, nll in ((0.0, 1.0), (0.1, 0.1), (1.0, 0.0))
    )
    found = choose_point(Search("gradient", ("kl", "nll"), "", {}, points, 0, "", {}, None, {}, 0.0), SearchSettings())
    assert (found.chosen, found.why) == (1, "knee")


def test_layers_in_four_bits_compute_with_gradients_inside_and_as_they_like_after() -> None:
    class Packing(torch.nn.Linear):
        support_avx512bf16_for_cpu = True

    layer: Any = Packing(2, 2)
    layer.weight.quant_state = object()
    model = torch.nn.Sequential(layer)
    with frozen(model):
        assert not layer.support_avx512bf16_for_cpu
        assert not layer.weight.requires_grad
    assert layer.support_avx512bf16_for_cpu
    assert layer.weight.requires_grad


def test_what_is_replaced_goes_only_when_the_model_is_open(planted: Planted, tmp_path: Path) -> None:
    folder = tmp_path / "front"
    asked = job(planted, folder, method="random", held_out="none", points=3, trials=6)
    assert asked.output is not None
    again = asked.output.model_copy(update={"overwrite": True})
    record = pipeline.search(asked)
    assert record.search is not None
    trials = (folder / pipeline.JOURNAL).read_bytes()
    with pytest.raises(ModelError):
        pipeline.search(asked.model_copy(update={"model": str(tmp_path / "nowhere"), "output": again}))
    assert (folder / pipeline.JOURNAL).read_bytes() == trials, "the old search is still there, trials and all"
    fewer = job(planted, folder, method="random", held_out="none", points=1, trials=6)
    record = pipeline.search(fewer.model_copy(update={"output": again}))
    assert record.search is not None
    files = {point.file for point in record.search.points}
    assert {f"front/{path.name}" for path in (folder / "front").iterdir()} == files, "no points of the search before"


def test_a_point_that_the_record_does_not_know_is_not_picked(planted: Planted, tmp_path: Path) -> None:
    folder = tmp_path / "front"
    record = pipeline.search(job(planted, folder, held_out="none"))
    assert record.search is not None
    stray = len(record.search.points) + 1
    file = folder / "front" / f"{stray:02}.safetensors"
    file.write_bytes((folder / "front" / "01.safetensors").read_bytes())
    before = (folder / "abliteration.json").read_bytes()
    with pytest.raises(UsageError, match=rf"--pick {stray}: expected a point of .*, one of 1, "):
        pipeline.pick(folder, stray)
    assert (folder / "abliteration.json").read_bytes() == before
