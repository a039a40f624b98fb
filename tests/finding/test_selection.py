"""Selection by intervention, on a model whose refusal direction is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from abliterate import pipeline
from abliterate.config import EditSettings, FindSettings, ModelSettings, PromptSettings
from abliterate.edit.direction import Candidates, Direction, Site
from abliterate.edit.plan import make_plan
from abliterate.errors import GateNotMet, UsageError
from abliterate.evaluation.first_tokens import first_tokens
from abliterate.evaluation.probe import MIN_PROMPTS, Probe
from abliterate.finding.estimate import Separation
from abliterate.finding.find import scorer_of, trial_plans
from abliterate.finding.selection import STAGES, START_SITES, Rule, SiteScorer, candidate_sites, select, stage_costs
from abliterate.model.batches import BatchSize, Encoded
from abliterate.record import ControlPart, SelectionPart, SitePart
from planted import BLOCKS, D_MODEL, POSITIONS, WRITES, plant


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Session:
    planted = plant(tmp_path_factory.mktemp("planted"))
    prompts = PromptSettings(harmful=str(planted.harmful), harmless=str(planted.harmless), limit=16)
    return pipeline.open_session(
        str(planted.folder), prompts=prompts, loading=ModelSettings(device="cpu", batch_size="64")
    )


@pytest.fixture(scope="module")
def findings(session: pipeline.Session) -> pipeline.Findings:
    return pipeline.find(session, FindSettings())


@pytest.fixture(scope="module")
def scorer(session: pipeline.Session, findings: pipeline.Findings) -> SiteScorer:
    found = scorer_of(session, findings)
    assert isinstance(found, SiteScorer)
    return found


def validated_on(session: pipeline.Session, harmful: Encoded, harmless: Encoded) -> pipeline.Session:
    """The session with other validation prompts, on which nothing has been measured yet."""
    encoded = {**session.encoded, ("harmful", "val"): harmful, ("harmless", "val"): harmless}
    return replace(session, encoded=encoded, kept={})


def choose(scorer: SiteScorer, findings: pipeline.Findings, rule: Rule) -> SelectionPart:
    return select(scorer, findings.candidates, findings.separation, rule)


# --- scores


def test_true_direction_bypasses_and_induces_at_no_cost(scorer: SiteScorer, findings: pipeline.Findings) -> None:
    raw = findings.candidates.at(WRITES + 1, -1)
    ((bypass, induce, kl),) = scorer.score(raw[None], [WRITES + 1], None)
    assert bypass < -5 < 0 < scorer.rows.harmful_score
    assert scorer.rows.harmless_score < -5 < 0 < induce
    assert kl < 1e-3


def test_scores_of_several_directions_at_once_are_those_of_each(
    scorer: SiteScorer, findings: pipeline.Findings
) -> None:
    raw = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(0))
    raw[7] = findings.candidates.at(WRITES + 1, -1)
    together = scorer.score(raw, [WRITES + 1] * len(raw), 4)
    alone = [scorer.score(row[None], [WRITES + 1], 4)[0] for row in raw]
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-4)
    assert min(range(20), key=lambda i: together[i][0]) == 7


def test_scores_do_not_depend_on_the_batch_size(
    session: pipeline.Session, scorer: SiteScorer, findings: pipeline.Findings
) -> None:
    raw = findings.candidates.raw[:, WRITES + 1]
    small = scorer_of(replace(session, size=BatchSize(3, 64), kept={}), findings)
    assert small.rows.harmful == scorer.rows.harmful
    assert small.rows.harmful_score == pytest.approx(scorer.rows.harmful_score, abs=1e-5)
    expected = torch.tensor(scorer.score(raw, [WRITES + 1] * len(raw), None))
    assert torch.allclose(torch.tensor(small.score(raw, [WRITES + 1] * len(raw), None)), expected, atol=1e-4)


def test_bypass_and_kl_of_doing_nothing_are_those_of_the_model(session: pipeline.Session, scorer: SiteScorer) -> None:
    plan = make_plan(session.anatomy, torch.eye(1, D_MODEL), strength=0.0)
    ((bypass, kl),) = scorer.probe.ablated([plan], scorer.rows)
    assert bypass == pytest.approx(scorer.rows.harmful_score, abs=1e-6)
    assert kl == pytest.approx(0, abs=1e-6)


def test_adding_nothing_induces_nothing(scorer: SiteScorer) -> None:
    (induce,) = scorer.probe.induced(torch.zeros(1, D_MODEL), [2], scorer.rows)
    assert induce == pytest.approx(scorer.rows.harmless_score, abs=1e-6)


def test_scoring_leaves_no_hook_behind(session: pipeline.Session, scorer: SiteScorer) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in session.model.modules())

    scorer.score(torch.ones(3, D_MODEL), [1, 1, 1], 4)
    assert hooks() == 0


def test_only_prompts_that_the_model_treats_as_labelled_are_used(session: pipeline.Session, scorer: SiteScorer) -> None:
    """One site's score must not be diluted by harmful prompts that were never refused."""
    everything = session.encoded["harmful", "val"] + session.encoded["harmless", "val"]
    probe = Probe(validated_on(session, everything, everything), scorer.probe.tokens)
    filtered = probe.behaving()
    assert sorted([*filtered.harmful, *filtered.harmless]) == list(range(len(everything)))
    assert filtered.harmful_score > 0 > filtered.harmless_score
    whole = probe.behaving(all_prompts=True)
    assert len(whole.harmful) == len(whole.harmless) == len(everything)
    assert whole.harmful_score == pytest.approx(whole.harmless_score)


def test_most_refused_prompts_are_screened_first(session: pipeline.Session, scorer: SiteScorer) -> None:
    scores = first_tokens(session.model, session.encoded["harmful", "val"], scorer.probe.tokens, session.size).scores
    ordered = [float(scores[row]) for row in scorer.rows.harmful]
    assert ordered == sorted(ordered, reverse=True)


def test_too_few_prompts_that_are_refused_is_a_gate(session: pipeline.Session, scorer: SiteScorer) -> None:
    harmful, harmless = session.encoded["harmful", "val"], session.encoded["harmless", "val"]
    few = harmful.take(range(MIN_PROMPTS - 1))
    with pytest.raises(GateNotMet, match="harmful validation prompts that the model refuses: expected at least 4"):
        Probe(validated_on(session, few, harmless), scorer.probe.tokens).behaving()
    with pytest.raises(GateNotMet, match="harmless validation prompts that the model answers"):
        Probe(validated_on(session, harmful, harmful), scorer.probe.tokens).behaving()


# --- choice


def test_choice_is_the_least_bypass_among_sites_that_meet_the_rule(
    scorer: SiteScorer, findings: pipeline.Findings
) -> None:
    selection = choose(scorer, findings, Rule())
    assert selection.met_rule
    final = [site for site in selection.candidates if site.prompts == selection.chosen.prompts]
    assert selection.chosen.bypass == min(site.bypass for site in final)
    assert WRITES < selection.chosen.layer < 0.8 * BLOCKS
    assert selection.control.bypass > 0 > selection.chosen.bypass
    assert selection.control.norm == pytest.approx(selection.chosen.norm)


def test_every_site_is_screened_and_the_best_are_measured_on_all_prompts(
    scorer: SiteScorer, findings: pipeline.Findings
) -> None:
    progress: list[int] = []
    sites = candidate_sites(findings.candidates, BLOCKS, Rule())
    selection = select(scorer, findings.candidates, findings.separation, Rule(), progress=progress.append)
    assert {(site.layer, site.position) for site in selection.candidates} == set(sites)
    assert sum(progress) <= stage_costs(len(sites))
    assert selection.chosen.prompts == max(len(scorer.rows.harmful), len(scorer.rows.harmless))
    assert min(site.prompts for site in selection.candidates) == STAGES[0][0]


@pytest.mark.parametrize("depth", [0.5, 0.6, 0.8, 1.0])
def test_sites_deeper_than_the_rule_allows_are_not_looked_at(findings: pipeline.Findings, depth: float) -> None:
    layers = {layer for layer, _ in candidate_sites(findings.candidates, BLOCKS, Rule(max_depth=depth))}
    assert max(layers) == max(layer for layer in range(BLOCKS) if layer < depth * BLOCKS)


def test_sites_where_the_classes_do_not_differ_are_left_out(findings: pipeline.Findings) -> None:
    sites = candidate_sites(findings.candidates, BLOCKS, Rule())
    assert not [site for site in sites if site.layer == 0], "template tokens have one embedding"
    assert {position for _, position in sites} == {-1, -2, -3}


@pytest.mark.parametrize("rule", [Rule(max_kl=0.0), Rule(min_induce=99.0)], ids=["KL", "induce"])
def test_the_best_site_is_named_when_no_site_meets_the_rule_and_it_is_said(
    scorer: SiteScorer, findings: pipeline.Findings, rule: Rule
) -> None:
    selection = choose(scorer, findings, rule)
    assert not selection.met_rule
    assert not rule.passes(selection.chosen)
    assert selection.chosen.bypass < 0


def site(**changes: float) -> SitePart:
    values = {"layer": 1, "position": -1, "prompts": 9, "norm": 1.0, "dprime": 1.0, "auroc": 1.0}
    return SitePart(**{**values, "bypass": -1.0, "induce": 1.0, "kl": 0.01, **changes})


def test_rule_has_the_limits_of_the_paper() -> None:
    rule = Rule()
    assert (rule.max_kl, rule.min_induce, rule.max_depth) == (0.1, 0.0, 0.8)
    assert rule.passes(site())
    assert rule.passes(site(kl=0.1))
    assert not rule.passes(site(kl=0.11))
    assert not rule.passes(site(induce=0.0))
    assert rule.passes(site(bypass=5.0)), "bypass ranks, it does not decide"


def test_not_a_number_never_meets_the_rule() -> None:
    assert not Rule().passes(site(kl=float("nan")))
    assert not Rule().passes(site(induce=float("nan")))


def test_prompt_sets_with_equal_means_are_a_gate(scorer: SiteScorer, findings: pipeline.Findings) -> None:
    zero = torch.zeros_like(findings.candidates.raw)
    with pytest.raises(GateNotMet, match="same mean activations everywhere"):
        select(scorer, Candidates(zero, zero), findings.separation, Rule())


def test_sign_of_a_direction_matters_to_induce_and_not_to_bypass(
    scorer: SiteScorer, findings: pipeline.Findings
) -> None:
    raw = findings.candidates.at(WRITES + 1, -1)
    (plus, minus) = scorer.score(torch.stack([raw, -raw]), [WRITES + 1] * 2, None)
    assert plus[0] == pytest.approx(minus[0], abs=1e-4)
    assert plus[1] > 0 > minus[1]


def test_control_depends_on_the_seed_alone(session: pipeline.Session, findings: pipeline.Findings) -> None:
    scorers = [scorer_of(replace(session, seed=seed), findings) for seed in (0, 0, 1)]
    first, again, other = (choose(cast(SiteScorer, scorer), findings, Rule()) for scorer in scorers)
    assert first == again
    assert first.control != other.control
    assert first.chosen == other.chosen


def test_direction_planted_at_one_site_among_noise_is_the_one_chosen(
    scorer: SiteScorer, findings: pipeline.Findings
) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = 2 * torch.nn.functional.normalize(torch.randn(findings.candidates.raw.shape, generator=generator), dim=-1)
    raw[1, 3] = findings.candidates.at(3, -2)
    chance = torch.full(raw.shape[:2], 0.5, dtype=torch.float64)
    noise = replace(findings.candidates, raw=raw)
    selection = select(scorer, noise, Separation(chance, chance), Rule())
    assert (selection.chosen.layer, selection.chosen.position) == (3, -2)
    assert selection.met_rule
    others = [score for score in selection.candidates if score != selection.chosen]
    assert min(score.bypass for score in others) > 0


def test_stage_costs_count_every_score() -> None:
    (_, first), (_, second), _ = STAGES
    assert stage_costs(100) == 100 + first + second
    assert stage_costs(second) == 3 * second
    assert stage_costs(0) == 0
    assert stage_costs(100, start=True) == START_SITES + 1


def test_a_start_is_sought_among_the_sites_that_separate_best(scorer: SiteScorer, findings: pipeline.Findings) -> None:
    shape = findings.candidates.raw.shape[:2]
    dprime = torch.arange(shape.numel(), dtype=torch.float64).reshape(shape)
    auroc = torch.full(shape, 0.9, dtype=torch.float64)
    auroc[1, 2] = 1.0
    separated = Separation(dprime, auroc)
    selection = select(scorer, findings.candidates, separated, Rule(), start=True)
    sites = candidate_sites(findings.candidates, BLOCKS, Rule())
    best = sorted(sites, key=lambda at: (at == (2, -2), float(dprime[-1 - at.position, at.layer])))[-START_SITES:]
    assert {(one.layer, one.position) for one in selection.candidates} == set(best)
    assert Site(2, -2) in best
    assert len(sites) > START_SITES
    assert selection.chosen.prompts == scorer.rows.most
    assert sum(one.prompts == scorer.rows.most for one in selection.candidates) == 1, "the best alone on all prompts"


def test_positions_of_the_template_are_looked_at_unless_told_otherwise(
    session: pipeline.Session, tmp_path: Path
) -> None:
    assert session.positions == POSITIONS
    planted = plant(tmp_path)
    prompts = PromptSettings(harmful=str(planted.harmful), harmless=str(planted.harmless), limit=16)
    assert pipeline.open_session(str(planted.folder), prompts=prompts, positions=1).positions == 1


def test_sites_crowded_out_by_ones_that_only_screening_let_pass_are_still_tried(
    scorer: SiteScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Site(2, -1)

    def score(*arguments: Any) -> Iterator[SitePart]:
        *_, sites, prompts = arguments[:5]
        for at in sites:  # every site but one costs twice the KL allowed, and bypasses better
            kl, bypass = (0.05, -1.0) if at == good else (0.2, -5.0)
            yield site(layer=at.layer, position=at.position, bypass=bypass, kl=kl, prompts=prompts or 99)

    control = ControlPart(bypass=0.0, induce=0.0, kl=0.0, norm=1.0)
    monkeypatch.setattr("abliterate.finding.selection._score", score)
    monkeypatch.setattr("abliterate.finding.selection._control", lambda *_: control)
    monkeypatch.setattr("abliterate.finding.selection.STAGES", ((1, 8), (2, 3), (None, 1)))
    everywhere = torch.ones(2, BLOCKS + 1, D_MODEL)
    flat = torch.ones(2, BLOCKS + 1)
    selection = select(scorer, Candidates(everywhere, everywhere), Separation(flat, flat), Rule())
    assert selection.met_rule
    assert (selection.chosen.layer, selection.chosen.position) == good


# --- directions are tried out on the writers that will be edited


@pytest.mark.parametrize(
    ("editing", "bypasses"),
    [
        (EditSettings(layers=f"{WRITES}"), True),
        (EditSettings(components="attention"), True),
        (EditSettings(layers=f"{WRITES + 1}-"), False),
        (EditSettings(components="mlp"), False),
        (EditSettings(strengths=f"attention@{WRITES}=0"), False),
    ],
    ids=str,
)
def test_scores_are_those_of_the_chosen_writers(
    session: pipeline.Session, findings: pipeline.Findings, editing: EditSettings, bypasses: bool
) -> None:
    raw = findings.candidates.at(WRITES + 1, -1)
    chosen = scorer_of(session, replace(findings, writers=editing))
    ((bypass, induce, _),) = chosen.score(raw[None], [WRITES + 1], None)
    assert (bypass < 0) is bypasses
    assert induce > 0, "adding is not editing"
    ((plain, _),) = chosen.probe.ablated([session.plan(Direction(raw[None] / raw.norm()), editing)], chosen.rows)
    assert bypass == pytest.approx(plain, abs=1e-4)


def test_strength_of_the_edit_does_not_change_the_search(session: pipeline.Session) -> None:
    """Directions are compared at full strength, whatever will be done with the one that is chosen."""
    weak = trial_plans(session, EditSettings(strength=-0.5, norm_preserving=True, affine=True, biprojected=True))
    plan = weak(torch.eye(1, D_MODEL))
    assert {edit.strength for edit in plan.edits} == {1.0}
    assert not any(edit.norm_preserving or edit.offset is not None for edit in plan.edits)


def test_edit_that_chooses_nothing_is_refused_before_anything_is_run(
    session: pipeline.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abliterate.finding.find.refusal_tokens", lambda *_: pytest.fail("it was run"))
    for editing in (EditSettings(components="experts"), EditSettings(layers="9"), EditSettings(strengths="mlp")):
        with pytest.raises(UsageError, match=r"writer|--layers|--strengths"):
            pipeline.find(session, FindSettings(), editing)
    for finding in (FindSettings(rank=2), FindSettings(rank=2, subspace="leace")):
        with pytest.raises(UsageError, match="--rank 2"):
            pipeline.find(session, finding)


def test_missing_extra_for_leace_is_said_before_anything_is_run(
    session: pipeline.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("abliterate.finding.find.refusal_tokens", lambda *_: pytest.fail("it was run"))
    with pytest.raises(UsageError, match=r"pip install 'abliterate\[leace\]'"):
        pipeline.find(session, FindSettings(subspace="leace"))
