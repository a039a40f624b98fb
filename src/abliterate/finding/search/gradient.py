"""Search by gradient: strengths and direction are optimised through the hooks; no weight of the model is trained.

A plan is differentiable in its strengths and its basis, and so are the first tokens of answers. The loss is

    mean over harmful prompts of softplus(refusal score − mean refusal score of harmless prompts) + λ · mean KL

where KL is that of the first token of answers to harmless prompts that the unedited model answers. Every site that is
written to has its own direction, which starts as its own difference of means without the part along the harmless mean.
Each point of the front has its own λ, and starts where the one before it ended (a homotopy along λ), so it needs few
steps.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from abliterate.algebra import ZERO_NORM, orthonormal, project_out
from abliterate.config import EditSettings
from abliterate.edit.direction import Direction, Recipe
from abliterate.edit.hooks import ablation
from abliterate.edit.options import plan_for
from abliterate.edit.plan import Plan
from abliterate.errors import UsageError
from abliterate.evaluation.first_tokens import first_tokens
from abliterate.evaluation.scores import kl_divergence, refusal_score
from abliterate.finding.search.space import free_and_fixed
from abliterate.model.batches import BatchSize, Encoded, SharedPrefix, in_batches, last_logits
from abliterate.session import Session

#: Prompts of each class in one step.
BATCH = 12
#: What Adam moves a strength, and the entries of a unit direction (times √d), by in one step at first.
STRENGTH_RATE, DIRECTION_RATE = 0.08, 0.16
#: By the end of each leg steps have shrunk to this share.
LAST = 0.1
#: Strength of every writer at the start.
START = 0.5
#: A writer whose strength ends below this is left alone: it holds nothing worth a changed file.
LEAST = 0.02
#: Tokens whose activations are kept for one backward pass.
_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Leg:
    """A stretch of the way along the front: the weight of KL against refusal, and how many steps it gets."""

    weight: float
    steps: int


def legs(points: int, steps: int, *, lightest: float = 40.0, heaviest: float = 320.0) -> list[Leg]:
    """`points` weights in even ratios, least KL last; `steps` in all, of which the first leg gets a double share."""
    share = max(1, steps // (points + 1))
    ratio = (heaviest / lightest) ** (1 / max(1, points - 1))
    return [Leg(lightest * ratio**i, share * (1 + (i == 0))) for i in range(points)]


def descend(
    session: Session,
    tokens: Sequence[int],
    start: Direction,
    editing: EditSettings,
    way: Sequence[Leg],
    *,
    refine: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[Direction]:
    """One direction with a recipe for each leg, optimised on training prompts.

    `start` says where directions begin, `tokens` are the refusal tokens. `editing` chooses writers and variant; a
    strength that it fixes stays as it is. Without `refine` there is one direction, which stays as it is, too; there is
    one for all sites also where it is bi-projected or a subspace. Each result is the mean over the second half of its
    leg (Polyak and Juditsky 1992).

    Raises `UsageError` for edits that cannot be optimised: affine and oblique ones.
    """
    if editing.affine or start.reader is not None:
        raise UsageError("--method gradient: expected an edit that takes a direction out, found an affine or LEACE one")
    with frozen(session.model):
        descent = _Descent(session, list(tokens), start, editing, refine)
        return [descent.leg(leg, progress) for leg in way]


class _Descent:
    """The state of the optimisation.

    `strengths` [w] has one per free writer. `directions` are rows of length √d, [k, d] for all sites or [L+1, k, d].
    """

    def __init__(
        self, session: Session, tokens: list[int], start: Direction, editing: EditSettings, refine: bool
    ) -> None:
        self.session, self.tokens, self.start, self.editing = session, tokens, start, editing
        free, self.fixed = free_and_fixed(session.anatomy, editing)
        self.free = [writer.name for writers in free.values() for writer in writers]
        basis = _beginning(start) if refine and not editing.biprojected else start.basis.float()
        self.strengths = torch.full((len(self.free),), START, requires_grad=bool(self.free))
        self.directions = (basis * basis.shape[-1] ** 0.5).requires_grad_(refine)
        groups = [
            {"params": [parameter], "lr": rate, "rate": rate}
            for parameter, rate in ((self.strengths, STRENGTH_RATE), (self.directions, DIRECTION_RATE))
            if parameter.requires_grad
        ]
        if not groups:
            raise UsageError("--method gradient: strengths and direction are both fixed; there is nothing to search")
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.prompts = {name: session.encoded[name, "train"] for name in ("harmful", "harmless")}
        self.base, self.target, answered = self._unedited()
        rows = {"harmful": range(len(self.prompts["harmful"])), "harmless": answered}
        self.draw = {name: _shuffled(chosen, session.seed) for name, chosen in rows.items()}

    def leg(self, leg: Leg, progress: Callable[[int], None] | None) -> Direction:
        """Some steps at one weight."""
        kept: list[tuple[Tensor, Tensor]] = []
        for step in range(leg.steps):
            for group in self.optimiser.param_groups:
                group["lr"] = group["rate"] * (1 - (1 - LAST) * step / leg.steps)
            self._step(leg.weight)
            if step >= leg.steps // 2:
                kept.append((self.directions.detach().clone(), self.strengths.detach().clone()))
            if progress is not None:
                progress(1)
        directions, strengths = (torch.stack(values).mean(0) for values in zip(*kept, strict=True))
        return self._result(directions, strengths)

    def _step(self, weight: float) -> None:
        rows = {name: [next(draw) for _ in range(BATCH)] for name, draw in self.draw.items()}
        joined = self.prompts["harmful"].take(rows["harmful"]) + self.prompts["harmless"].take(rows["harmless"])
        wanted = [p for p in (self.strengths, self.directions) if p.requires_grad]
        sums = [torch.zeros_like(p) for p in wanted]

        def work(chosen: list[int]) -> None:
            loss = self._loss(joined, chosen, rows["harmless"], weight)
            for total, gradient in zip(sums, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient

        lengths = [len(suffix) for suffix in joined.suffixes]
        in_batches(lengths, BatchSize(self.session.size.rows, _TOKENS), work)
        for parameter, total in zip(wanted, sums, strict=True):
            parameter.grad = total
        self.optimiser.step()

    def _loss(self, joined: Encoded, chosen: list[int], harmless: list[int], weight: float) -> Float[Tensor, ""]:
        """The part of a step's loss that some of its prompts have: the first `BATCH` are harmful ones."""
        model = self.session.model
        with ablation(model, self._plan()):
            shared = SharedPrefix(model, joined.prefix, grad=True)
            logits = last_logits(model, shared, joined.take(chosen).suffixes)
        refusing = [i for i, row in enumerate(chosen) if row < BATCH]
        answering = [i for i, row in enumerate(chosen) if row >= BATCH]
        scores = refusal_score(logits[refusing], self.tokens).float()
        base = self.base[[harmless[chosen[i] - BATCH] for i in answering]].to(logits)
        loss: Tensor = softplus(scores - self.target).sum() + weight * kl_divergence(base, logits[answering]).sum()
        return loss / BATCH

    def _plan(self) -> Plan:
        """The plan of the parameters as they are, differentiable in them."""
        values = dict(zip(self.free, self.strengths, strict=True))
        return plan_for(self.session.anatomy, self._direction(self.directions, values))

    def _direction(self, directions: Float[Tensor, "*sites k d"], strengths: Any) -> Direction:
        recipe = self._recipe(strengths)
        if directions.dim() == 2:
            return replace(self.start, basis=orthonormal(directions), recipe=recipe)
        return replace(self.start, recipe=recipe, per_site=directions / directions.norm(dim=-1, keepdim=True))

    def _recipe(self, strengths: Any) -> Recipe:
        """Tensors stand for strengths while they are optimised."""
        editing = self.editing
        strengths = cast(Any, {**self.fixed, **strengths})
        tied = any(writer.tied and writer.name in strengths for writer in self.session.anatomy.writers)
        return Recipe(strengths, editing.norm_preserving, editing.biprojected, editing.untie and tied)

    def _result(self, directions: Float[Tensor, "*sites k d"], strengths: Float[Tensor, " w"]) -> Direction:
        values = {name: round(float(s), 6) for name, s in zip(self.free, strengths, strict=True)}
        return self._direction(directions, {n: s for n, s in values.items() if abs(s) >= LEAST})

    def _unedited(self) -> tuple[Float[Tensor, "n vocab"], float, list[int]]:
        """The first tokens of answers to harmless prompts: their distributions in the model's own precision, the mean
        refusal score, and which prompts are answered.
        """
        session, prompts = self.session, self.prompts["harmless"]
        found = first_tokens(session.model, prompts, self.tokens, session.size, keep=session.loaded.dtype)
        answered = (found.scores < 0).nonzero().flatten().tolist() or list(range(len(prompts)))
        return found.logits, float(found.scores[answered].mean()), answered


def _beginning(start: Direction) -> Float[Tensor, "*sites k d"]:
    """What directions start with: each site's own, where there is one; else that of `start` for all sites."""
    site = start.site
    if start.candidates is None or site is None or len(start.basis) > 1:
        return start.basis.float()
    own = start.candidates.raw[-1 - site[1]]
    own = project_out(own, start.candidates.harmless_mean[-1 - site[1]])
    norms = own.norm(dim=-1, keepdim=True)
    return torch.where(norms > ZERO_NORM, own / norms.clamp_min(ZERO_NORM), start.basis.float())[:, None]


def _shuffled(rows: Sequence[int], seed: int) -> Iterator[int]:
    """Every row once in random order, again and again."""
    generator = random.Random(seed)
    while True:
        yield from generator.sample(rows, len(rows))


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No weight of the model is differentiated by, inside; all that computes with weights can be differentiated."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with _unpacked(model):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _unpacked(model: Any) -> Iterator[None]:
    """4-bit layers of bitsandbytes compute with codes in the order that has gradients, inside.

    On CPUs with AVX-512 they repack their codes at the first inference for a kernel that has no backward pass.
    """
    packing = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    try:
        for module in packing:
            module.support_avx512bf16_for_cpu = False
            weight = module.weight
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                from bitsandbytes.nn import modules as bnb

                unpack = bnb._convert_weight_packed_for_cpu_inverse
                weight.data, weight.quant_state = unpack(weight.data, weight.quant_state)
        yield
    finally:
        for module in packing:
            module.support_avx512bf16_for_cpu = True
