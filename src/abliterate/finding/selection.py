"""Selection by intervention: which site's direction, taken out, stops refusal, and put in, causes it.

For every site: *bypass* (mean refusal score on harmful prompts with the direction ablated), *induce* (the same on
harmless prompts with r added at its own layer) and *KL* (how much ablation changes the first token of answers to
harmless prompts). The rule is that of Arditi et al. 2024 (§2.4 and appendix C): least bypass among sites with
induce > 0, KL ≤ 0.1 and layer < 0.8 L. Sites are screened in stages: few prompts for all, all prompts for the best. A
start for a search need not be the best: only the sites that separate the classes best are tried for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.algebra import ZERO_NORM
from abliterate.edit.direction import Candidates, Site
from abliterate.edit.plan import Plan
from abliterate.errors import GateNotMet
from abliterate.evaluation.probe import Behaving, Probe
from abliterate.finding.estimate import Separation
from abliterate.finding.replies import ReplyScorer, cosmic
from abliterate.monitor import ranks
from abliterate.record import ControlPart, SelectionPart, SitePart

#: Prompts per class in each stage (None: all), and how many sites go on to the next.
Stages = tuple[tuple[int | None, int], ...]
STAGES: Stages = ((4, 8), (16, 3), (None, 1))

#: Sites that are tried for the start of a search, those that separate the classes best; and their stages.
START_SITES = 6
START_STAGES: Stages = ((8, 1), (None, 1))

#: Where replies are read: how many sites COSMIC screens (those that separate best), how many it leaves, and the stages.
COSMIC_SITES, REPLY_SITES = 24, 4
REPLY_STAGES: Stages = ((12, 2), (None, 1))

#: Sites scored on all prompts when those before them fail the rule.
_MOST_FINALISTS = 8


@dataclass(frozen=True, slots=True)
class Rule:
    """What a direction must do to be chosen (`--max-kl`, `--min-induce`, `--max-depth`)."""

    max_kl: float = 0.1
    min_induce: float = 0.0
    max_depth: float = 0.8

    def passes(self, score: SitePart) -> bool:
        """Whether a site meets the rule."""
        return score.kl <= self.max_kl and score.induce > self.min_induce


@dataclass(frozen=True, slots=True)
class SiteScorer:
    """Scores directions by a probe on the prompts that behave; `plan` makes the plan of a direction [1, d]."""

    probe: Probe
    rows: Behaving
    plan: Callable[[Float[Tensor, "1 d"]], Plan]

    def score(
        self,
        raw: Float[Tensor, "g d"],
        layers: Sequence[int],
        prompts: int | None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[tuple[float, float, float]]:
        """Bypass, induce and KL of g differences of means at their layers, on that many prompts per class."""
        results: list[tuple[float, float, float]] = []
        together = self.probe.together(self.rows, prompts)
        for start in range(0, len(raw), together):
            part = raw[start : start + together]
            plans = [self.plan(r[None] / r.norm()) for r in part]
            ablated = self.probe.ablated(plans, self.rows, prompts)
            induced = self.probe.induced(part, layers[start : start + together], self.rows, prompts)
            results += [(bypass, induce, kl) for (bypass, kl), induce in zip(ablated, induced, strict=True)]
            progress(len(part))
        return results


def select(
    scorer: SiteScorer | ReplyScorer,
    candidates: Candidates,
    separation: Separation,
    rule: Rule,
    *,
    trained_on: Mapping[str, int] | None = None,
    start: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> SelectionPart:
    """Screen all sites in stages and choose by `rule`; `met_rule` is false when no site passes.

    For the `start` of a search only the `START_SITES` that separate the classes best are screened. Where replies are
    read, COSMIC screens sites first, and for a start its best one is taken.

    A random direction with the best site's norm, added at the same layer, is scored beside as a control.

    Raises `GateNotMet` when no site has a difference between the classes.
    """
    sites = candidate_sites(candidates, scorer.probe.session.anatomy.layers, rule)
    if not sites:
        raise GateNotMet("sites: both prompt sets have the same mean activations everywhere; check the prompt sets")
    stages = STAGES
    if isinstance(scorer, ReplyScorer):
        tried = best_separating(sites, separation)[:COSMIC_SITES]
        likeness = cosmic(scorer, candidates, tried, progress)
        likely = _agreed(sorted(tried, key=lambda site: -likeness[site]))
        sites, stages = (likely[:1], START_STAGES[-1:]) if start else (likely[:REPLY_SITES], REPLY_STAGES)
    elif start:
        sites, stages = _agreed(best_separating(sites, separation))[:START_SITES], START_STAGES
    scores, best = _screened(scorer, candidates, separation, rule, sites, progress, stages)
    return SelectionPart(
        chosen=best,
        met_rule=rule.passes(best),
        control=_control(scorer, best),
        harmful=scorer.rows.harmful_score,
        harmless=scorer.rows.harmless_score,
        max_kl=rule.max_kl,
        min_induce=rule.min_induce,
        max_depth=rule.max_depth,
        trained_on=dict(trained_on or {}),
        candidates=sorted(scores.values(), key=lambda s: (-s.prompts, s.bypass)),
        by="replies" if isinstance(scorer, ReplyScorer) else "first tokens",
    )


def _screened(
    scorer: SiteScorer | ReplyScorer,
    candidates: Candidates,
    separation: Separation,
    rule: Rule,
    sites: list[Site],
    progress: Callable[[int], None],
    stages: Stages,
) -> tuple[dict[Site, SitePart], SitePart]:
    """Scores of all sites, each on as many prompts as it came through stages, and the best one's."""
    scores: dict[Site, SitePart] = {}
    waiting: list[Site] = []
    for prompts, keep in stages:
        for score in _score(scorer, candidates, separation, sorted(sites), prompts, progress):
            scores[Site(score.layer, score.position)] = score
        last = prompts is None or prompts >= scorer.rows.most
        ranked = _agreed(sorted(sites, key=lambda site: _order(scores[site], rule, screening=not last)))
        if last:
            break
        sites, waiting = ranked[:keep], ranked[keep:]
    # Screening lets sites pass that the rule then refuses: go on down its ranking until one holds.
    while not rule.passes(scores[ranked[0]]) and waiting and len(ranked) < _MOST_FINALISTS:
        site = waiting.pop(0)
        (scores[site],) = _score(scorer, candidates, separation, [site], None)
        ranked = _agreed(sorted([*ranked, site], key=lambda site: _order(scores[site], rule, screening=False)))
    return scores, scores[ranked[0]]


def _agreed(sites: list[Site]) -> list[Site]:
    """The same order in all of several processes."""
    return [Site(*site) for site in ranks.agreed(sites)]


def candidate_sites(candidates: Candidates, layers: int, rule: Rule) -> list[Site]:
    """Every site shallow enough that has a difference at all."""
    return [
        Site(layer, position)
        for layer in range(layers)
        for position in candidates.positions
        if layer < rule.max_depth * layers and float(candidates.at(layer, position).norm()) > ZERO_NORM
    ]


def best_separating(sites: Sequence[Site], separation: Separation) -> list[Site]:
    """Sites by AUROC, largest first; those alike by d′."""

    def key(site: Site) -> tuple[float, float]:
        where = -1 - site.position, site.layer
        return float(separation.auroc[where]), float(separation.dprime[where])

    return sorted(sites, key=key, reverse=True)


def stage_costs(sites: int, *, start: bool = False, replies: bool = False) -> int:
    """How many sites are scored in all stages together, for a progress bar; with `replies`, what COSMIC screens too."""
    if replies:
        screened = min(sites, COSMIC_SITES)
        return screened + (1 if start else min(screened, REPLY_SITES) + min(screened, REPLY_STAGES[0][1]))
    total, waiting = 0, min(sites, START_SITES) if start else sites
    for _, keep in START_STAGES if start else STAGES:
        total += waiting
        waiting = min(waiting, keep)
    return total


def _score(
    scorer: SiteScorer | ReplyScorer,
    candidates: Candidates,
    separation: Separation,
    sites: Sequence[Site],
    prompts: int | None,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[SitePart]:
    raw = torch.stack([candidates.at(*site) for site in sites])
    scores = scorer.score(raw, [site.layer for site in sites], prompts, progress)
    for (layer, position), r, (bypass, induce, kl) in zip(sites, raw, scores, strict=True):
        yield SitePart(
            layer=layer,
            position=position,
            bypass=bypass,
            induce=induce,
            kl=kl,
            prompts=len(range(scorer.rows.most)[:prompts]),
            norm=float(r.norm()),
            dprime=float(separation.dprime[-1 - position, layer]),
            auroc=float(separation.auroc[-1 - position, layer]),
        )


def _order(score: SitePart, rule: Rule, *, screening: bool) -> tuple[bool, float]:
    """Sites that meet the rule first, each by bypass; few prompts are noisy, so screening is lenient."""
    kl, induce = (3 * rule.max_kl, rule.min_induce - 1) if screening else (rule.max_kl, rule.min_induce)
    return not (score.kl <= kl and score.induce > induce), score.bypass


def _control(scorer: SiteScorer | ReplyScorer, best: SitePart) -> ControlPart:
    session = scorer.probe.session
    generator = torch.Generator().manual_seed(session.seed)
    raw = torch.randn(1, session.anatomy.d_model, generator=generator)
    ((bypass, induce, kl),) = scorer.score(raw * (best.norm / raw.norm()), [best.layer], None)
    return ControlPart(bypass=bypass, induce=induce, kl=kl, norm=best.norm)
