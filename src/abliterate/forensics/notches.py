"""Notches: writers that write less along the model's own direction of refusal than along directions of the same kind.

A light edit, and one of a search, leave no dip in the spectrum of a writer: what is left along r̂ lies in the middle of
it. But where r̂ is known the question is about one direction, and not about the least of all. A model that was edited
lightly still has it: the difference of means of harmful and harmless prompts. Directions of the same kind, of which
nobody has taken anything out, are the differences of means of each category of these prompts from the rest of its set.

For every writer of block i and each of these directions r where the stream leaves that block,
log(‖rᵀW‖² / Σ r_j² ‖W_j‖²) says how much it writes along r, beside rows of such lengths. `depth` is the mean of the
five lowest standard scores of the own direction among those of the categories, by writer, with its sign turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.forensics.reading import InspectedModel, Place, maps
from abliterate.prompts.prompt import Prompt
from abliterate.session import Session

#: Prompts that a category has at least, categories at least, and writers at least.
_FEWEST_PROMPTS, _FEWEST_CATEGORIES, _FEWEST_WRITERS = 8, 8, 10
#: Lowest standard scores that are averaged.
_LOWEST = 5
#: Least standard deviation among categories: less is chance.
_SPREAD = 0.05
#: Standard score from which a writer counts as edited, once the depth says that some are.
_CLEAR = -4.0


@dataclass(frozen=True, slots=True)
class Notch:
    """A writer along the own direction of its layer: its `score`, and the `share` of what would be natural there."""

    place: Place
    score: float
    share: float

    @property
    def edited(self) -> bool:
        """Whether clearly too little is written."""
        return self.score <= _CLEAR


@dataclass(frozen=True, slots=True)
class Notches:
    """What the writers show; `others` are the depths of the categories, each among the rest: what nobody made."""

    depth: float
    others: tuple[float, ...]
    writers: tuple[Notch, ...]


def notches(session: Session, subject: InspectedModel) -> Notches | None:
    """Look at all writers along the model's own direction; None where there are too few of them, or of categories.

    One pass over the training prompts, and one over the writers, one tensor at a time.
    """
    directions = directions_of(session)
    return None if directions is None else notches_along(directions, subject)


def notches_along(directions: Float[Tensor, "k sites d"], subject: InspectedModel) -> Notches | None:
    """The same for given unit directions at every site, the own one first; None for too few writers."""
    places = [place for place in subject.places if place.block is not None]
    if len(places) < _FEWEST_WRITERS:
        return None
    written = torch.stack([_written(subject, place, directions[:, (place.block or 0) + 1]) for place in places])
    scores, natural = _scores(written, 0)
    found = tuple(
        Notch(place, float(score), float((own - usual).exp()))
        for place, score, own, usual in zip(places, scores, written[:, 0], natural, strict=True)
    )
    others = tuple(_depth(_scores(written[:, 1:], k)[0]) for k in range(written.shape[1] - 1))
    return Notches(_depth(scores), others, found)


def _scores(written: Float[Tensor, "w k"], own: int) -> tuple[Float[Tensor, " w"], Float[Tensor, " w"]]:
    """Standard scores of column `own` among the others, by writer, and the means of these."""
    kept = [k for k in range(written.shape[1]) if k != own]
    rest = written[:, kept]
    mean = rest.mean(1)
    return (written[:, own] - mean) / rest.std(1).clamp_min(_SPREAD), mean


def _depth(scores: Float[Tensor, " w"]) -> float:
    return -float(scores.sort().values[:_LOWEST].mean())


def _written(subject: InspectedModel, place: Place, directions: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
    """Logs of what a place writes along unit directions, beside what rows of such lengths would by chance."""
    wrote = torch.zeros(len(directions))
    natural = torch.full((len(directions),), 1e-30)
    for matrix in maps(subject.checkpoint, place):
        scaled = matrix / matrix.abs().amax().clamp_min(1e-30)
        wrote += (directions @ scaled).square().sum(1)
        natural += directions.square() @ scaled.square().sum(1)
    return (wrote / natural).clamp_min(1e-12).log()


def directions_of(session: Session) -> Float[Tensor, "k sites d"] | None:
    """Unit directions at the last token: harmful less harmless first, then each category less the rest of its set."""
    sites, width = session.anatomy.layers + 1, session.anatomy.d_model
    own, others = [], []
    total = sum(len(session.encoded[name, "train"]) for name in ("harmful", "harmless"))
    with session.monitor.phase("activations by category", total) as advance:
        for name in ("harmful", "harmless"):
            texts = getattr(session.prompts, name).train
            means = _Means(_groups(texts), sites, width)
            session.stream(session.encoded[name, "train"], means.update, advance)
            own.append(means.sums.sum(0) / len(texts))
            for group, count in enumerate(means.counts):
                if _FEWEST_PROMPTS <= count <= len(texts) - _FEWEST_PROMPTS:
                    rest = (means.sums.sum(0) - means.sums[group]) / (len(texts) - count)
                    others.append(means.sums[group] / count - rest)
    if len(others) < _FEWEST_CATEGORIES:
        return None
    return torch.nn.functional.normalize(torch.stack([own[0] - own[1], *others]), dim=-1).float()


def _groups(texts: Sequence[str]) -> list[int]:
    """The number of each prompt's category."""
    names: dict[str | None, int] = {}
    return [names.setdefault(text.category if isinstance(text, Prompt) else None, len(names)) for text in texts]


class _Means:
    """Sums of the last token's activations by group of prompts."""

    def __init__(self, groups: Sequence[int], sites: int, width: int) -> None:
        self.groups = torch.tensor(groups)
        self.counts = torch.bincount(self.groups).tolist()
        self.sums = torch.zeros(len(self.counts), sites, width, dtype=torch.float64)

    def update(self, layer: int, rows: list[int], values: Float[Tensor, "b k d"]) -> None:
        """Take in one batch of one layer."""
        self.sums[:, layer].index_add_(0, self.groups[rows], values[:, 0].double())


__all__ = ["Notch", "Notches", "directions_of", "notches", "notches_along"]
