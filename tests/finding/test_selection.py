"""Selection by intervention, on a model whose refusal direction is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from abliterate import pipeline
from abliterate.config import EditSettings, FindSettings, ModelSettings, PromptSettings
from abliterate.edit.direction import Candidates, Direction
from abliterate.edit.plan import make_plan
from abliterate.errors import GateNotMet, UsageError
from abliterate.evaluation.first_tokens import first_tokens
from abliterate.finding.estimate import Separation
from abliterate.finding.find import trial_plans
from abliterate.finding.selection import (
    MIN_PROMPTS,
    STAGES,
    Rule,
    Scorer,
    Selection,
    SiteScore,
    candidate_sites,
    select,
    stage_costs,
)
from abliterate.model.batches import BatchSize
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
def scorer(findings: pipeline.Findings) -> Scorer:
    return findings.scorer


def choose(findings: pipeline.Findings, rule: Rule, seed: int = 0) -> Selection:
    return select(findings.scorer, findings.candidates, findings.separation, rule, seed=seed)


# --- scores


def test_true_direction_bypasses_and_induces_at_no_cost(scorer: Scorer, findings: pipeline.Findings) -> None:
    raw = findings.candidates.at(WRITES + 1, -1)
    ((bypass, induce, kl),) = scorer.score(raw[None], WRITES + 1, None)
    assert bypass < -5 < 0 < scorer.harmful_score
    assert scorer.harmless_score < -5 < 0 < induce
    assert kl < 1e-3


def test_scores_of_several_directions_at_once_are_those_of_each(scorer: Scorer, findings: pipeline.Findings) -> None:
    raw = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(0))
    raw[7] = findings.candidates.at(WRITES + 1, -1)
    together = scorer.score(raw, WRITES + 1, 4)
    alone = [scorer.score(row[None], WRITES + 1, 4)[0] for row in raw]
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-4)
    assert min(range(20), key=lambda i: together[i][0]) == 7


def test_scores_do_not_depend_on_the_batch_size(
    session: pipeline.Session, scorer: Scorer, findings: pipeline.Findings
) -> None:
    raw = findings.candidates.raw[:, WRITES + 1]
    val = session.encoded["harmful", "val"], session.encoded["harmless", "val"]
    small = Scorer(session.model, session.anatomy, scorer.tokens, *val, BatchSize(3, 64))
    assert small.harmful_rows == scorer.harmful_rows
    assert small.harmful_score == pytest.approx(scorer.harmful_score, abs=1e-5)
    expected = torch.tensor(scorer.score(raw, WRITES + 1, None))
    assert torch.allclose(torch.tensor(small.score(raw, WRITES + 1, None)), expected, atol=1e-4)


def test_bypass_and_kl_of_doing_nothing_are_those_of_the_model(session: pipeline.Session, scorer: Scorer) -> None:
    plan = make_plan(session.anatomy, torch.eye(1, D_MODEL), strength=0.0)
    bypass, kl = scorer.ablate(plan)
    assert bypass == pytest.approx(scorer.harmful_score, abs=1e-6)
    assert kl == pytest.approx(0, abs=1e-6)


def test_adding_nothing_induces_nothing(scorer: Scorer) -> None:
    assert scorer.induce(torch.zeros(D_MODEL), 2) == pytest.approx(scorer.harmless_score, abs=1e-6)


def test_scoring_leaves_no_hook_behind(session: pipeline.Session, scorer: Scorer) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in session.model.modules())

    scorer.score(torch.ones(3, D_MODEL), 1, 4)
    assert hooks() == 0


def test_only_prompts_that_the_model_treats_as_labelled_are_used(session: pipeline.Session, scorer: Scorer) -> None:
    """One site's score must not be diluted by harmful prompts that were never refused."""
    everything = session.encoded["harmful", "val"] + session.encoded["harmless", "val"]
    filtered = Scorer(session.model, session.anatomy, scorer.tokens, everything, everything, session.size)
    assert sorted([*filtered.harmful_rows, *filtered.harmless_rows]) == list(range(len(everything)))
    assert filtered.harmful_score > 0 > filtered.harmless_score
    whole = Scorer(session.model, session.anatomy, scorer.tokens, everything, everything, session.size, behaving=False)
    assert len(whole.harmful_rows) == len(whole.harmless_rows) == len(everything)
    assert whole.harmful_score == pytest.approx(whole.harmless_score)


def test_most_refused_prompts_are_screened_first(session: pipeline.Session, scorer: Scorer) -> None:
    scores, _ = first_tokens(scorer.model, session.encoded["harmful", "val"], scorer.tokens, scorer.size)
    ordered = [float(scores[row]) for row in scorer.harmful_rows]
    assert ordered == sorted(ordered, reverse=True)


def test_too_few_prompts_that_are_refused_is_a_gate(session: pipeline.Session, scorer: Scorer) -> None:
    harmful, harmless = session.encoded["harmful", "val"], session.encoded["harmless", "val"]
    few = harmful.take(range(MIN_PROMPTS - 1))
    with pytest.raises(GateNotMet, match="harmful validation prompts that the model refuses: expected at least 4"):
        Scorer(session.model, session.anatomy, scorer.tokens, few, harmless, session.size)
    with pytest.raises(GateNotMet, match="harmless validation prompts that the model answers"):
        Scorer(session.model, session.anatomy, scorer.tokens, harmful, harmful, session.size)


# --- choice


def test_choice_is_the_least_bypass_among_sites_that_meet_the_rule(findings: pipeline.Findings) -> None:
    selection = choose(findings, Rule())
    assert selection.chosen == selection.best
    final = [site for site in selection.candidates if site.prompts == selection.best.prompts]
    assert selection.best.bypass == min(site.bypass for site in final)
    assert WRITES < selection.best.layer < 0.8 * BLOCKS
    assert selection.control.bypass > 0 > selection.best.bypass
    assert selection.control.norm == pytest.approx(selection.best.norm)


def test_every_site_is_screened_and_the_best_are_measured_on_all_prompts(findings: pipeline.Findings) -> None:
    progress: list[int] = []
    sites = candidate_sites(findings.candidates, BLOCKS, Rule())
    selection = select(findings.scorer, findings.candidates, findings.separation, Rule(), progress=progress.append)
    assert {(site.layer, site.position) for site in selection.candidates} == set(sites)
    assert sum(progress) <= stage_costs(len(sites))
    assert selection.best.prompts == max(len(findings.scorer.harmful), len(findings.scorer.harmless))
    assert min(site.prompts for site in selection.candidates) == STAGES[0][0]


@pytest.mark.parametrize("depth", [0.5, 0.6, 0.8, 1.0])
def test_sites_deeper_than_the_rule_allows_are_not_looked_at(findings: pipeline.Findings, depth: float) -> None:
    layers = {layer for layer, _ in candidate_sites(findings.candidates, BLOCKS, Rule(max_depth=depth))}
    assert max(layers) == max(layer for layer in range(BLOCKS) if layer < depth * BLOCKS)


def test_sites_where_the_classes_do_not_differ_are_left_out(findings: pipeline.Findings) -> None:
    sites = candidate_sites(findings.candidates, BLOCKS, Rule())
    assert not [site for site in sites if site[0] == 0], "template tokens have one embedding"
    assert {position for _, position in sites} == {-1, -2, -3}


@pytest.mark.parametrize("rule", [Rule(max_kl=0.0), Rule(min_induce=99.0)], ids=["KL", "induce"])
def test_nothing_is_chosen_when_no_site_meets_the_rule_but_the_best_is_named(
    findings: pipeline.Findings, rule: Rule
) -> None:
    selection = choose(findings, rule)
    assert selection.chosen is None
    assert selection.best.bypass < 0


def site(**changes: float) -> SiteScore:
    values = {"layer": 1, "position": -1, "prompts": 9, "norm": 1.0, "dprime": 1.0, "auroc": 1.0}
    return SiteScore(**{**values, "bypass": -1.0, "induce": 1.0, "kl": 0.01, **changes})  # type: ignore[arg-type]


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


def test_prompt_sets_with_equal_means_are_a_gate(findings: pipeline.Findings) -> None:
    zero = torch.zeros_like(findings.candidates.raw)
    with pytest.raises(GateNotMet, match="same mean activations everywhere"):
        select(findings.scorer, Candidates(zero, zero), findings.separation, Rule())


def test_sign_of_a_direction_matters_to_induce_and_not_to_bypass(findings: pipeline.Findings) -> None:
    raw = findings.candidates.at(WRITES + 1, -1)
    (plus, minus) = findings.scorer.score(torch.stack([raw, -raw]), WRITES + 1, None)
    assert plus[0] == pytest.approx(minus[0], abs=1e-4)
    assert plus[1] > 0 > minus[1]


def test_control_depends_on_the_seed_alone(findings: pipeline.Findings) -> None:
    first, again, other = (choose(findings, Rule(), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.control != other.control
    assert first.best == other.best


def test_direction_planted_at_one_site_among_noise_is_the_one_chosen(findings: pipeline.Findings) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = 2 * torch.nn.functional.normalize(torch.randn(findings.candidates.raw.shape, generator=generator), dim=-1)
    raw[1, 3] = findings.candidates.at(3, -2)
    chance = torch.full(raw.shape[:2], 0.5, dtype=torch.float64)
    noise = replace(findings.candidates, raw=raw)
    selection = select(findings.scorer, noise, Separation(chance, chance), Rule())
    assert (selection.best.layer, selection.best.position) == (3, -2)
    assert selection.chosen is not None
    others = [score for score in selection.candidates if score != selection.best]
    assert min(score.bypass for score in others) > 0


def test_stage_costs_count_every_score() -> None:
    (_, first), (_, second), _ = STAGES
    assert stage_costs(100) == 100 + first + second
    assert stage_costs(second) == 3 * second
    assert stage_costs(0) == 0


def test_positions_of_the_template_are_looked_at_unless_told_otherwise(
    session: pipeline.Session, tmp_path: Path
) -> None:
    assert session.positions == POSITIONS
    planted = plant(tmp_path)
    prompts = PromptSettings(harmful=str(planted.harmful), harmless=str(planted.harmless), limit=16)
    assert pipeline.open_session(str(planted.folder), prompts=prompts, positions=1).positions == 1


def test_sites_crowded_out_by_ones_that_only_screening_let_pass_are_still_tried(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = (2, -1)

    def score(*arguments: Any) -> Iterator[SiteScore]:
        *_, sites, prompts = arguments
        for site in sites:  # every site but one costs twice the KL allowed, and bypasses better
            kl, bypass = (0.05, -1.0) if site == good else (0.2, -5.0)
            yield SiteScore(site[0], site[1], bypass, 1.0, kl, prompts or 99, 1.0, 1.0, 1.0)

    monkeypatch.setattr("abliterate.finding.selection._score_layer", score)
    monkeypatch.setattr("abliterate.finding.selection._control", lambda *_: None)
    monkeypatch.setattr("abliterate.finding.selection.STAGES", ((1, 8), (2, 3), (None, 1)))
    everywhere = torch.ones(2, BLOCKS + 1, D_MODEL)
    flat = torch.ones(2, BLOCKS + 1)
    chosen = select(scorer, Candidates(everywhere, everywhere), Separation(flat, flat), Rule()).chosen
    assert chosen is not None
    assert (chosen.layer, chosen.position) == good


# --- directions are tried out on the writers that will be edited


def scorer_for(session: pipeline.Session, scorer: Scorer, editing: EditSettings) -> Scorer:
    val = session.encoded["harmful", "val"], session.encoded["harmless", "val"]
    plan = trial_plans(session, editing)
    return Scorer(session.model, session.anatomy, scorer.tokens, *val, session.size, plan=plan)


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
    session: pipeline.Session,
    scorer: Scorer,
    findings: pipeline.Findings,
    editing: EditSettings,
    bypasses: bool,
) -> None:
    raw = findings.candidates.at(WRITES + 1, -1)
    chosen = scorer_for(session, scorer, editing)
    ((bypass, induce, _),) = chosen.score(raw[None], WRITES + 1, None)
    assert (bypass < 0) is bypasses
    assert induce > 0, "adding is not editing"
    plain, _ = chosen.ablate(session.plan(Direction(raw[None] / raw.norm()), editing))
    assert bypass == pytest.approx(plain, abs=1e-4)


def test_strength_of_the_edit_does_not_change_the_search(session: pipeline.Session) -> None:
    """Directions are compared at full strength, whatever will be done with the one that is chosen."""
    weak = trial_plans(session, EditSettings(strength=-0.5, norm_preserving=True, affine=True, biprojected=True))
    plan = weak(torch.eye(1, D_MODEL))
    assert {edit.strength for edit in plan.edits} == {1.0}
    assert not any(edit.keep_norms or edit.offset is not None for edit in plan.edits)


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
