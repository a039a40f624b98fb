"""Selection by intervention: which site's direction, taken out, stops refusal, and put in, causes it.

For every site: *bypass* (mean refusal score on harmful prompts with the direction ablated), *induce* (the same on
harmless prompts with r added at its own layer) and *KL* (how much ablation changes the first token of answers to
harmless prompts). The rule is that of Arditi et al. 2024 (§2.4 and appendix C): least bypass among sites with
induce > 0, KL ≤ 0.1 and layer < 0.8 L. Sites are screened in stages: few prompts for all, all prompts for the best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.anatomy import Anatomy
from abliterate.directions import ZERO_NORM, Candidates, Separation
from abliterate.errors import GateNotMet
from abliterate.inference import BatchSize, Encoded, SharedPrefix, in_batches, last_logits
from abliterate.interventions import ablation, addition
from abliterate.plan import make_plan
from abliterate.scoring import kl_divergence, refusal_score

#: Prompts per class in each stage (None: all), and how many sites go on to the next.
STAGES: tuple[tuple[int | None, int], ...] = ((4, 12), (16, 4), (None, 1))

#: With few prompts a KL is noisy: a site is only screened out for it beyond this many times the limit.
SCREENING_SLACK = 3.0


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
    """One site's scores on `prompts` validation prompts per class. `layer` is -1 for a control direction.

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
class Selection:
    """The choice and all that led to it. `harmful` and `harmless` are mean refusal scores without intervention."""

    chosen: SiteScore | None
    candidates: tuple[SiteScore, ...]
    control: SiteScore
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
    ) -> None:
        """Measure the untouched model on all prompts; the most refused harmful prompts are used first."""
        self.model, self.anatomy, self.tokens, self.size = model, anatomy, list(tokens), size
        self.blocks: list[nn.Module] = [model.get_submodule(name) for name in anatomy.blocks]
        base = self._scores(harmful)
        self.harmful = harmful.take(torch.argsort(base, descending=True).tolist())
        self.harmless = harmless
        self.harmful_score = float(base.mean())
        logits: dict[int, Tensor] = {}

        def keep(rows: list[int], batch: Tensor) -> None:
            logits.update(zip(rows, batch.cpu(), strict=True))

        for_each_first_token(model, harmless, size, keep)
        self.base_logits = torch.stack([logits[row] for row in range(len(harmless))])
        self.harmless_score = float(refusal_score(self.base_logits, self.tokens).mean())

    def score(self, raw: Float[Tensor, " d"], layer: int, prompts: int | None) -> tuple[float, float, float]:
        """Bypass, induce and KL of the difference `raw` added at `layer`, on that many prompts per class."""
        harmful = self.harmful.take(range(len(self.harmful))[:prompts])
        harmless = self.harmless.take(range(len(self.harmless))[:prompts])
        plan = make_plan(self.anatomy, (raw / raw.norm())[None])
        both = harmful + harmless
        bypass = torch.zeros(len(harmful), dtype=torch.float64)
        kl = torch.zeros(len(harmless), dtype=torch.float64)

        def look(rows: list[int], logits: Tensor) -> None:
            scores = refusal_score(logits, self.tokens).cpu()
            for i, row in enumerate(rows):
                if row < len(harmful):
                    bypass[row] = scores[i]
                else:
                    base = self.base_logits[row - len(harmful)].to(logits.device)
                    kl[row - len(harmful)] = kl_divergence(base, logits[i]).cpu()

        with ablation(self.model, plan):
            for_each_first_token(self.model, both, self.size, look)
        with addition(self.blocks[layer], raw):
            induce = self._scores(harmless)
        return float(bypass.mean()), float(induce.mean()), float(kl.mean())

    def _scores(self, prompts: Encoded) -> Float[Tensor, " n"]:
        scores = torch.zeros(len(prompts), dtype=torch.float64)

        def look(rows: list[int], logits: Tensor) -> None:
            scores[rows] = refusal_score(logits, self.tokens).cpu()

        for_each_first_token(self.model, prompts, self.size, look)
        return scores


def for_each_first_token(
    model: Any, prompts: Encoded, size: BatchSize, look: Callable[[list[int], Tensor], None]
) -> None:
    """Call `look(rows, logits [b, vocab])` with the distribution of the answer's first token, batch by batch."""
    shared = SharedPrefix(model, prompts.prefix)

    def work(rows: list[int]) -> None:
        look(rows, last_logits(model, shared, prompts.take(rows).suffixes))

    in_batches([len(s) for s in prompts.suffixes], size, work)


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

    A random direction with the chosen direction's norm, added at the same layer, is scored beside as a control.

    Raises `GateNotMet` when no site has a difference between the classes.
    """
    sites = candidate_sites(candidates, scorer.anatomy.layers, rule)
    if not sites:
        raise GateNotMet("sites: the two prompt sets have the same mean activations everywhere; check the prompt sets")
    scores: dict[tuple[int, int], SiteScore] = {}
    for prompts, keep in STAGES:
        for site in sites:
            scores[site] = _score_site(scorer, candidates, separation, site, prompts)
            if progress is not None:
                progress(1)
        last = prompts is None or prompts >= len(scorer.harmful)
        sites = sorted(sites, key=lambda site: _order(scores[site], rule, 1.0 if last else SCREENING_SLACK))[:keep]
        if last:
            break
    best = scores[sites[0]]
    return Selection(
        chosen=best if rule.passes(best) else None,
        candidates=tuple(sorted(scores.values(), key=lambda s: (-s.prompts, s.bypass))),
        control=_control(scorer, best, seed),
        harmful=scorer.harmful_score,
        harmless=scorer.harmless_score,
        rule=rule,
    )


def candidate_sites(candidates: Candidates, layers: int, rule: Rule) -> list[tuple[int, int]]:
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


def _score_site(
    scorer: Scorer, candidates: Candidates, separation: Separation, site: tuple[int, int], prompts: int | None
) -> SiteScore:
    layer, position = site
    raw = candidates.at(layer, position)
    bypass, induce, kl = scorer.score(raw, layer, prompts)
    return SiteScore(
        layer=layer,
        position=position,
        bypass=bypass,
        induce=induce,
        kl=kl,
        prompts=min(len(scorer.harmful), prompts or len(scorer.harmful)),
        norm=float(raw.norm()),
        dprime=float(separation.dprime[-1 - position, layer]),
        auroc=float(separation.auroc[-1 - position, layer]),
    )


def _order(score: SiteScore, rule: Rule, slack: float) -> tuple[bool, bool, float]:
    """Sites that meet the rule first, then those whose only fault is weak induction, each by bypass."""
    return score.kl > slack * rule.max_kl, slack == 1.0 and score.induce <= rule.min_induce, score.bypass


def _control(scorer: Scorer, best: SiteScore, seed: int) -> SiteScore:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(scorer.anatomy.d_model, generator=generator)
    bypass, induce, kl = scorer.score(raw * (best.norm / raw.norm()), best.layer, None)
    nothing = float("nan")
    return replace(best, bypass=bypass, induce=induce, kl=kl, dprime=nothing, auroc=nothing, layer=-1)
