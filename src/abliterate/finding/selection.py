"""Selection by intervention: which site's direction, taken out, stops refusal, and put in, causes it.

For every site: *bypass* (mean refusal score on harmful prompts with the direction ablated), *induce* (the same on
harmless prompts with r added at its own layer) and *KL* (how much ablation changes the first token of answers to
harmless prompts). The rule is that of Arditi et al. 2024 (§2.4 and appendix C): least bypass among sites with
induce > 0, KL ≤ 0.1 and layer < 0.8 L. Sites are screened in stages: few prompts for all, all prompts for the best.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.algebra import ZERO_NORM
from abliterate.edit.direction import Candidates
from abliterate.edit.hooks import ablation, addition
from abliterate.edit.plan import Plan, make_plan
from abliterate.errors import GateNotMet
from abliterate.evaluation.first_tokens import first_tokens, for_each_first_token
from abliterate.evaluation.scores import kl_divergence, refusal_score
from abliterate.finding.estimate import Separation
from abliterate.model.anatomy import Anatomy
from abliterate.model.batches import BatchSize, Encoded

#: Prompts per class in each stage (None: all), and how many sites go on to the next.
STAGES: tuple[tuple[int | None, int], ...] = ((4, 8), (16, 3), (None, 1))

#: Sites scored on all prompts when those before them fail the rule.
_MOST_FINALISTS = 8

#: Fewer validation prompts than this in a class, and scores would say nothing.
MIN_PROMPTS = 4

#: (layer, position)
Site = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a direction must do to be chosen (`--max-kl`, `--min-induce`, `--max-depth`)."""

    max_kl: float = 0.1
    min_induce: float = 0.0
    max_depth: float = 0.8

    def passes(self, score: SiteScore) -> bool:
        """Whether a site meets the rule."""
        return score.kl <= self.max_kl and score.induce > self.min_induce


@dataclass(frozen=True, slots=True)
class SiteScore:
    """One site's scores on at most `prompts` validation prompts per class.

    `bypass` and `induce` are mean refusal scores (log-odds), `kl` is in nats.
    """

    layer: int
    position: int
    bypass: float
    induce: float
    kl: float
    prompts: int
    norm: float
    dprime: float
    auroc: float


@dataclass(frozen=True, slots=True)
class Control:
    """The same scores for a random direction of the given norm."""

    bypass: float
    induce: float
    kl: float
    norm: float


@dataclass(frozen=True, slots=True)
class Selection:
    """The choice and all that led to it. `harmful` and `harmless` are mean refusal scores without intervention.

    `best` is the least bad site; `chosen` is the same one if it meets the rule, else None.
    """

    chosen: SiteScore | None
    best: SiteScore
    candidates: tuple[SiteScore, ...]
    control: Control
    harmful: float
    harmless: float
    rule: Rule


class Scorer:
    """Scores directions on one model and one set of validation prompts."""

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        tokens: Sequence[int],
        harmful: Encoded,
        harmless: Encoded,
        size: BatchSize,
        *,
        behaving: bool = True,
        plan: Callable[[Float[Tensor, "k d"]], Plan] | None = None,
    ) -> None:
        """Measure the untouched model. With `behaving`, only harmful prompts that it refuses and harmless ones that
        it answers are used (by the sign of the refusal score), as in the paper; the most refused come first. `plan`
        makes the plan of a direction; default: out of every writer. `refused` says it of every prompt.

        Raises `GateNotMet` when too few are left.
        """
        self.model, self.anatomy, self.tokens, self.size = model, anatomy, list(tokens), size
        self._plan = plan or functools.partial(make_plan, anatomy)
        self.blocks: list[nn.Module] = [model.get_submodule(name) for name in anatomy.blocks]
        refusing, _ = first_tokens(model, harmful, self.tokens, size)
        answering, logits = first_tokens(model, harmless, self.tokens, size, keep=torch.float32)
        self.refused = {"harmful": (refusing > 0).tolist(), "harmless": (answering > 0).tolist()}
        order = torch.argsort(refusing, descending=True)
        self.harmful_rows = [row for row in order.tolist() if not behaving or refusing[row] > 0]
        self.harmless_rows = [row for row in range(len(harmless)) if not behaving or answering[row] < 0]
        for name, rows, whole in (
            ("harmful validation prompts that the model refuses", self.harmful_rows, len(harmful)),
            ("harmless validation prompts that the model answers", self.harmless_rows, len(harmless)),
        ):
            if len(rows) < MIN_PROMPTS:
                raise GateNotMet(f"{name}: expected at least {MIN_PROMPTS}, found {len(rows)} of {whole}")
        self.harmful, self.harmless = harmful.take(self.harmful_rows), harmless.take(self.harmless_rows)
        self.base_logits = logits[self.harmless_rows]
        self.harmful_score = float(refusing[self.harmful_rows].mean())
        self.harmless_score = float(answering[self.harmless_rows].mean())
        self.together = min(16, size.rows)

    def score(self, raw: Float[Tensor, "g d"], layer: int, prompts: int | None) -> list[tuple[float, float, float]]:
        """Bypass, induce and KL of g differences of means at one layer, on that many prompts per class."""
        results: list[tuple[float, float, float]] = []
        for start in range(0, len(raw), self.together):
            part = raw[start : start + self.together]
            plans = [self._plan(r[None] / r.norm()) for r in part]
            bypass, kl = self._ablate(plans, prompts)
            results += zip(bypass, self._induce(part, layer, prompts), kl, strict=True)
        return results

    def ablate(self, plan: Plan) -> tuple[float, float]:
        """Bypass and KL of one plan on all prompts."""
        (bypass,), (kl,) = self._ablate([plan], None)
        return bypass, kl

    def induce(self, raw: Float[Tensor, " d"], layer: int) -> float:
        """Induce score of one difference of means on all prompts."""
        return self._induce(raw[None], layer, None)[0]

    def _ablate(self, plans: Sequence[Plan], prompts: int | None) -> tuple[list[float], list[float]]:
        harmful, harmless = _first(self.harmful, prompts), _first(self.harmless, prompts)
        bypass = torch.zeros(len(plans), len(harmful), dtype=torch.float64)
        kl = torch.zeros(len(plans), len(harmless), dtype=torch.float64)

        def look(rows: list[int], logits: Tensor) -> None:
            scores = refusal_score(logits, self.tokens).cpu()
            for i, row in enumerate(rows):
                if row < len(harmful):
                    bypass[:, row] = scores[:, i]
                else:
                    base = self.base_logits[row - len(harmful)].to(logits.device)
                    kl[:, row - len(harmful)] = kl_divergence(base.expand_as(logits[:, i]), logits[:, i]).cpu()

        with ablation(self.model, *plans):
            for_each_first_token(self.model, harmful + harmless, self.size, look, copies=len(plans))
        return bypass.mean(1).tolist(), kl.mean(1).tolist()

    def _induce(self, raw: Float[Tensor, "g d"], layer: int, prompts: int | None) -> list[float]:
        harmless = _first(self.harmless, prompts)
        scores = torch.zeros(len(raw), len(harmless), dtype=torch.float64)

        def look(rows: list[int], logits: Tensor) -> None:
            scores[:, rows] = refusal_score(logits, self.tokens).cpu()

        with addition(self.blocks[layer], raw):
            for_each_first_token(self.model, harmless, self.size, look, copies=len(raw))
        means: list[float] = scores.mean(1).tolist()
        return means


def _first(prompts: Encoded, count: int | None) -> Encoded:
    return prompts.take(range(len(prompts))[:count])


def select(
    scorer: Scorer,
    candidates: Candidates,
    separation: Separation,
    rule: Rule,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Selection:
    """Screen all sites in stages and choose by `rule`; `chosen` is None when no site passes.

    A random direction with the best site's norm, added at the same layer, is scored beside as a control.

    Raises `GateNotMet` when no site has a difference between the classes.
    """
    sites = candidate_sites(candidates, scorer.anatomy.layers, rule)
    if not sites:
        raise GateNotMet("sites: both prompt sets have the same mean activations everywhere; check the prompt sets")
    scores: dict[Site, SiteScore] = {}
    waiting: list[Site] = []
    for prompts, keep in STAGES:
        for layer, group in itertools.groupby(sorted(sites), key=lambda site: site[0]):
            for score in _score_layer(scorer, candidates, separation, layer, list(group), prompts):
                scores[score.layer, score.position] = score
                if progress is not None:
                    progress(1)
        last = prompts is None or prompts >= max(len(scorer.harmful), len(scorer.harmless))
        ranked = sorted(sites, key=lambda site: _order(scores[site], rule, screening=not last))
        if last:
            break
        sites, waiting = ranked[:keep], ranked[keep:]
    # Screening lets sites pass that the rule then refuses: go on down its ranking until one holds.
    while not rule.passes(scores[ranked[0]]) and waiting and len(ranked) < _MOST_FINALISTS:
        site = waiting.pop(0)
        (scores[site],) = _score_layer(scorer, candidates, separation, site[0], [site], None)
        ranked = sorted([*ranked, site], key=lambda site: _order(scores[site], rule, screening=False))
    best = scores[ranked[0]]
    return Selection(
        chosen=best if rule.passes(best) else None,
        best=best,
        candidates=tuple(sorted(scores.values(), key=lambda s: (-s.prompts, s.bypass))),
        control=_control(scorer, best, seed),
        harmful=scorer.harmful_score,
        harmless=scorer.harmless_score,
        rule=rule,
    )


def candidate_sites(candidates: Candidates, layers: int, rule: Rule) -> list[Site]:
    """(layer, position) of every site shallow enough that has a difference at all."""
    return [
        (layer, position)
        for layer in range(layers)
        for position in candidates.positions
        if layer < rule.max_depth * layers and float(candidates.at(layer, position).norm()) > ZERO_NORM
    ]


def stage_costs(sites: int) -> int:
    """How many sites are scored in all stages together, for a progress bar."""
    total, waiting = 0, sites
    for _, keep in STAGES:
        total += waiting
        waiting = min(waiting, keep)
    return total


def _score_layer(
    scorer: Scorer,
    candidates: Candidates,
    separation: Separation,
    layer: int,
    sites: Sequence[Site],
    prompts: int | None,
) -> Iterator[SiteScore]:
    raw = torch.stack([candidates.at(*site) for site in sites])
    for (_, position), r, (bypass, induce, kl) in zip(sites, raw, scorer.score(raw, layer, prompts), strict=True):
        yield SiteScore(
            layer=layer,
            position=position,
            bypass=bypass,
            induce=induce,
            kl=kl,
            prompts=len(range(max(len(scorer.harmful), len(scorer.harmless)))[:prompts]),
            norm=float(r.norm()),
            dprime=float(separation.dprime[-1 - position, layer]),
            auroc=float(separation.auroc[-1 - position, layer]),
        )


def _order(score: SiteScore, rule: Rule, *, screening: bool) -> tuple[bool, float]:
    """Sites that meet the rule first, each by bypass; few prompts are noisy, so screening is lenient."""
    kl, induce = (3 * rule.max_kl, rule.min_induce - 1) if screening else (rule.max_kl, rule.min_induce)
    return not (score.kl <= kl and score.induce > induce), score.bypass


def _control(scorer: Scorer, best: SiteScore, seed: int) -> Control:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(1, scorer.anatomy.d_model, generator=generator)
    ((bypass, induce, kl),) = scorer.score(raw * (best.norm / raw.norm()), best.layer, None)
    return Control(bypass, induce, kl, best.norm)
