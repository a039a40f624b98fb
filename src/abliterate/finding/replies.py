"""Directions of a behaviour that first tokens do not tell: read at replies, and scored by what replies show.

A site is tried out in two ways. *COSMIC* (Siu et al. 2025) looks at activations only: with the direction taken out,
how like is the side that shows the behaviour to the other one, and with it put in, how like is that one to the first,
in the layers where the sides differ most? It is quick and screens sites. The best are then scored as a judge reads
short replies: *bypass* is the share of replies that still show the behaviour with the direction taken out, *induce* how
much more of them show it with the direction put in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.edit.direction import Candidates, Site
from abliterate.edit.hooks import addition
from abliterate.edit.plan import Plan
from abliterate.errors import GateNotMet
from abliterate.evaluation.judging import Exchange, Judge
from abliterate.evaluation.probe import MIN_PROMPTS, Behaving, Probe
from abliterate.model.activations import Consumer, Keep, Progress, stream_sites
from abliterate.model.batches import Encoded
from abliterate.model.generation import Reply, complete
from abliterate.monitor import ranks
from abliterate.session import Session

#: Prompts of each side that COSMIC looks at, and the share of layers, those where the sides differ most.
_COSMIC_PROMPTS, _LOW_LAYERS = 16, 0.1


def stream(
    session: Session,
    name: str,
    split: str,
    consume: Consumer,
    progress: Progress,
    *,
    into: Sequence[Tensor | ranks.Merged] | None = None,
    keep: Keep | None = None,
) -> int:
    """Feed the activations of one part of the prompts where the behaviour is read: at prompts, or over replies.

    `into` is all that `consume` and `keep` put numbers into (see `activations.stream_sites`).
    """
    encoded, read = session.encoded[name, split], session.prompts.behaviour.read
    if read.at == "prompt":
        return session.stream(encoded, consume, progress, into=into, keep=keep)
    answered, lengths = _with_replies(session, encoded, read.tokens)
    longest = min(max(lengths), min(map(len, answered.suffixes)))

    def averaged(layer: int, rows: list[int], values: Float[Tensor, "b k d"]) -> None:
        means = [value[: lengths[row]].mean(0) for row, value in zip(rows, values, strict=True)]
        consume(layer, rows, torch.stack(means)[:, None])

    model, blocks, size = session.model, session.blocks, session.size
    return stream_sites(model, blocks, answered, longest, averaged, size, into=into, progress=progress)


def stream_classes(
    session: Session,
    split: str,
    consumers: Mapping[str, Consumer],
    keeps: Mapping[str, Keep] | None,
    progress: Progress,
    *,
    into: Mapping[str, Sequence[Tensor | ranks.Merged]],
) -> None:
    """The same for several parts, by part: in the same batches where the behaviour is read at prompts."""
    if session.prompts.behaviour.read.at == "prompt":
        everything = [one for some in into.values() for one in some]
        session.stream_classes(split, consumers, keeps, progress, into=everything)
        return
    for name, consume in consumers.items():
        stream(session, name, split, consume, progress, into=into[name])


def _with_replies(session: Session, prompts: Encoded, tokens: int) -> tuple[Encoded, list[int]]:
    """Prompts with the unedited model's own replies to them, and how many tokens of each are the reply (at least 1)."""
    replies = own_replies(session, prompts, tokens)
    suffixes = tuple(s + tuple(reply.tokens) for s, reply in zip(prompts.suffixes, replies, strict=True))
    return Encoded(prompts.prefix, suffixes), [max(1, len(reply.tokens)) for reply in replies]


def own_replies(session: Session, prompts: Encoded, tokens: int) -> list[Reply]:
    """The unedited model's greedy replies to prompts, of at most so many tokens. They are kept in the session."""
    key = ("own replies", prompts.suffixes, tokens)
    if key not in session.kept:
        session.kept[key] = complete(session.model, session.loaded.tokenizer, prompts, tokens, session.size)
    replies: list[Reply] = session.kept[key]
    return replies


@dataclass(frozen=True, slots=True)
class Shown:
    """Which validation prompts of each side have replies that show the behaviour, of the unedited model."""

    harmful: tuple[bool, ...]
    harmless: tuple[bool, ...]

    @property
    def rates(self) -> tuple[float, float]:
        """The share that shows it, by side."""
        return sum(self.harmful) / len(self.harmful), sum(self.harmless) / len(self.harmless)

    def behaving(self, *, all_prompts: bool) -> Behaving:
        """Prompts whose replies are as their side says, with the share of them that shows it; or all of them.

        Raises `GateNotMet` when too few are left.
        """
        rows = {
            name: tuple(row for row, shown in enumerate(found) if all_prompts or shown == wanted)
            for name, found, wanted in (("harmful", self.harmful, True), ("harmless", self.harmless, False))
        }
        for name, found in rows.items():
            if len(found) < MIN_PROMPTS:
                side = "show the behaviour" if name == "harmful" else "do not show it"
                whole = len(getattr(self, name))
                raise GateNotMet(
                    f"validation prompts whose replies {side}: expected at least {MIN_PROMPTS}, found {len(found)} of "
                    f"{whole}"
                )
        share = {name: sum(getattr(self, name)[row] for row in found) / len(found) for name, found in rows.items()}
        return Behaving(rows["harmful"], rows["harmless"], share["harmful"], share["harmless"])


@dataclass(frozen=True, slots=True)
class ReplyScorer:
    """Scores directions by short replies (see the module); `plan` makes the plan of a direction [1, d]."""

    probe: Probe
    rows: Behaving
    plan: Callable[[Float[Tensor, "1 d"]], Plan]
    judge: Judge
    tokens: int

    def score(
        self,
        raw: Float[Tensor, "g d"],
        layers: Sequence[int],
        prompts: int | None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[tuple[float, float, float]]:
        """Bypass, induce and KL of g differences of means at their layers, on that many prompts per side.

        Bypass and induce are shares of replies; induce is what there is more than without the direction.
        """
        session, rows = self.probe.session, self.rows
        plans = [self.plan(r[None] / r.norm()) for r in raw]
        together = self.probe.together(rows, prompts)
        parts = (plans[start : start + together] for start in range(0, len(plans), together))
        costs = [kl for part in parts for _, kl in self.probe.ablated(part, rows, prompts)]
        results = []
        for plan, vector, layer, kl in zip(plans, raw, layers, costs, strict=True):
            left = self._share("harmful", rows.harmful[:prompts], session.ablated(plan))
            into = addition(session.blocks[layer], vector[None])
            induced = self._share("harmless", rows.harmless[:prompts], into) - rows.harmless_score
            results.append((left, induced, kl))
            progress(1)
        return results

    def _share(self, name: str, rows: Sequence[int], state: AbstractContextManager[None]) -> float:
        with state:
            found = _shown(self.probe.session, name, rows, self.judge, self.tokens)
        return sum(found) / len(found)


def _shown(session: Session, name: str, rows: Sequence[int], judge: Judge, tokens: int) -> list[bool]:
    """Whether short replies to validation prompts show the behaviour, in the model's present state."""
    texts, prompts = session.prompts.texts(name, "val"), session.encoded[name, "val"].take(rows)
    replies = complete(session.model, session.loaded.tokenizer, prompts, tokens, session.size)
    exchanges = [Exchange(texts[row], reply.text) for row, reply in zip(rows, replies, strict=True)]
    return [verdict.refused for verdict in judge.judge(exchanges)]


def unedited(probe: Probe, judge: Judge, tokens: int) -> Shown:
    """What the unedited model's short replies to validation prompts show. It is kept in the session."""
    session = probe.session
    key = (Shown, judge.fingerprint, tokens)
    if key not in session.kept:
        sides = {name: len(session.encoded[name, "val"]) for name in ("harmful", "harmless")}
        with session.monitor.phase("see the behaviour in replies", sum(sides.values())) as advance:
            found = {}
            for name, count in sides.items():
                found[name] = tuple(_shown(session, name, range(count), judge, tokens))
                advance(count)
        session.kept[key] = Shown(**found)
    known: Shown = session.kept[key]
    return known


def cosmic(scorer: ReplyScorer, candidates: Candidates, sites: Sequence[Site], progress: Progress) -> dict[Site, float]:
    """COSMIC's score of sites: the mean of two cosines, at most 1."""
    session, rows = scorer.probe.session, scorer.rows
    harmful = session.encoded["harmful", "val"].take(rows.harmful[:_COSMIC_PROMPTS])
    harmless = session.encoded["harmless", "val"].take(rows.harmless[:_COSMIC_PROMPTS])
    base = [_means(session, prompts, nullcontext()) for prompts in (harmful, harmless)]
    alike = torch.cosine_similarity(base[0], base[1], dim=-1)
    low = alike.argsort()[: max(1, round(_LOW_LAYERS * len(alike)))]
    scores = {}
    for site in sites:
        raw = candidates.at(*site)
        without = _means(session, harmful, session.ablated(scorer.plan(raw[None] / raw.norm())))
        put_in = _means(session, harmless, addition(session.blocks[site.layer], raw[None]))
        pairs = ((without, base[1]), (put_in, base[0]))
        scores[site] = sum(
            float(torch.cosine_similarity(one[low].flatten(), other[low].flatten(), dim=0)) / 2 for one, other in pairs
        )
        progress(1)
    return scores


def _means(session: Session, prompts: Encoded, state: AbstractContextManager[None]) -> Float[Tensor, "sites d"]:
    """Mean activations at the last token, by layer, in a state."""
    sums = torch.zeros(session.anatomy.layers + 1, session.anatomy.d_model)

    def add(layer: int, _: list[int], values: Float[Tensor, "b k d"]) -> None:
        sums[layer] += values[:, 0].sum(0)

    with state:
        stream_sites(session.model, session.blocks, prompts, 1, add, session.size, into=[sums])
    return sums / len(prompts)
