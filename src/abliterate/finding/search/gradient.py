"""Search by gradient: strengths and direction are optimised through the hooks; no weight of the model is trained.

A plan is differentiable in its strengths, bases and readers, and so are the first tokens of answers. The loss is

    mean over harmful prompts of softplus(refusal score − mean refusal score of harmless prompts) + λ · mean KL

where KL is that of the first token of answers to harmless prompts that the unedited model answers. Every writer has an
oblique edit of its own: what is taken out of it starts as the difference of means of its site without the part along
the harmless mean, and what reads how much of it as what hardly reads harmless prompts (see `readers`). Where a
behaviour is to stay on some prompts, or prompts have too few tokens to know what writers write (see `readers`), there
is one direction for each site instead.

Of a behaviour that is found by the same prompts under two instructions, whole replies take the place of the first
token: with prompts asked plainly, the model's own replies under the one instruction
are to become as unlikely, and those under the other as likely, as they are under the other. The loss is then

    mean over prompts of softplus(k (l₊ − t₊)) + softplus(k (t₋ − l₋)) + λ · mean KL

with l the mean log-likelihood of a token of the reply, t what it is under the other instruction, and k = `SLOPE`. There
every site that is written to has a direction, taken out of all that writes to it: both sides are the same prompts, so
there are none that are not to be read.

Each point of the front has its own λ, and starts where the one before it ended (a homotopy along λ), so it needs few
steps.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from abliterate.algebra import ZERO_NORM, orthonormal, project_out
from abliterate.config import EditSettings
from abliterate.edit.direction import Direction, PerWriter, Recipe
from abliterate.edit.hooks import ablation
from abliterate.edit.options import plan_for
from abliterate.edit.plan import Plan
from abliterate.errors import UsageError
from abliterate.evaluation.first_tokens import first_tokens, for_each_first_token
from abliterate.evaluation.scores import kl_divergence, log_likelihood, refusal_score
from abliterate.finding.replies import own_replies
from abliterate.finding.search.readers import ENOUGH_TOKENS, Readers, begun, written_by
from abliterate.finding.search.space import free_and_fixed
from abliterate.model.batches import BatchSize, Encoded, SharedPrefix, in_batches, last_logits, logits_at, share_prefix
from abliterate.model.offloaded import is_offloaded, recomputed
from abliterate.monitor import ranks
from abliterate.session import Session

#: Prompts of each class in one step.
BATCH = 12
#: What Adam moves a strength, and the entries of a unit direction (times √d), by in one step at first.
STRENGTH_RATE, DIRECTION_RATE = 0.08, 0.16
#: By the end of each leg steps have shrunk to this share.
LAST = 0.1
#: Strength of every writer at the start; and where each has an edit of its own.
START, OWN_START = 0.5, 0.35
#: A writer whose strength ends below this is left alone: it holds nothing worth a changed file.
LEAST = 0.02
#: How steep the loss of replies is, per nat of a token's mean log-likelihood; and how many tokens of them count.
SLOPE, LESSON_TOKENS = 4.0, 16
#: Pairs of replies in one step: each is some eight times the work of a prompt.
PAIRS = 6
#: Replies whose likelihood is measured at once.
_GOALS = 8
#: Tokens whose activations are kept for one backward pass.
_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Leg:
    """A stretch of the way along the front: the weight of KL against refusal, and how many steps it gets."""

    weight: float
    steps: int


#: Weights of KL at the ends of the front. Lighter ones guide whole replies, and where a behaviour is to stay somewhere:
#: prompts that show it are then among those that must not move, and tell far more against an edit.
WEIGHTS, LIGHT_WEIGHTS = (40.0, 320.0), (2.5, 40.0)
#: The same where each writer has an edit of its own, which costs less.
OWN_WEIGHTS = (80.0, 640.0)


def legs(points: int, steps: int, *, weights: tuple[float, float] = WEIGHTS) -> list[Leg]:
    """`points` weights in even ratios, least KL last; `steps` in all, of which the first leg gets a double share."""
    share = max(1, steps // (points + 1))
    lightest, heaviest = weights
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
    one for all writers also where it is bi-projected. Each result is the mean over the second half of its
    leg (Polyak and Juditsky 1992).

    Raises `UsageError` for edits that cannot be optimised: affine and oblique ones.
    """
    if editing.affine or start.reader is not None:
        raise UsageError("--method gradient: expected an edit that takes a direction out, found an affine or LEACE one")
    with frozen(session.model):
        kind = _Lesson if session.prompts.behaviour.paired else _Descent
        descent = kind(session, list(tokens), start, editing, refine)
        with recomputed(session.model, session.blocks):
            return [descent.leg(leg, progress) for leg in way]


def has_own_edits(session: Session, editing: EditSettings, *, refine: bool = True) -> bool:
    """Whether a search by gradient gives each writer an edit of its own (see the module)."""
    if not refine or editing.biprojected or _light(session):
        return False
    prompts = session.encoded["harmless", "train"]
    tokens = sum(map(len, prompts.suffixes)) - len(prompts) * _shared(prompts)
    return tokens >= ENOUGH_TOKENS * session.anatomy.d_model


def weights_for(session: Session, editing: EditSettings, *, refine: bool = True) -> tuple[float, float]:
    """Weights of KL at the ends of the front."""
    if _light(session):
        return LIGHT_WEIGHTS
    return OWN_WEIGHTS if has_own_edits(session, editing, refine=refine) else WEIGHTS


def _light(session: Session) -> bool:
    """Whether whole replies guide the search, or the behaviour is to stay somewhere."""
    return session.prompts.behaviour.paired or session.prompts.keep is not None


def _shared(prompts: Encoded) -> int:
    """Tokens that all prompts begin with, beside their prefix."""
    return len(share_prefix(prompts.suffixes).prefix)


class _Descent:
    """The state of the optimisation; `split` are the prompts that it learns from.

    `strengths` [w] has one per free writer. `vectors` are rows of length √d: L and R of each edited writer, [w, k, d]
    both, where each has its own (`has_own_edits`); else one direction for all sites, [k, d], or for each, [L+1, k, d].
    """

    split, harmful_rows = "train", BATCH

    def __init__(
        self, session: Session, tokens: list[int], start: Direction, editing: EditSettings, refine: bool
    ) -> None:
        self.session, self.tokens, self.start, self.editing = session, tokens, start, editing
        free, self.fixed = free_and_fixed(session.anatomy, editing)
        self.free = [writer.name for writers in free.values() for writer in writers]
        self.prompts = {name: session.encoded[name, self.split] for name in ("harmful", "harmless")}
        self.kept = range(len(self.prompts["harmless"]), len(self.prompts["harmless"]))
        if (stays := session.encoded.get(("keep", "train"))) is not None:  # what is to stay is to stay as it is
            self.kept = range(self.kept.stop, self.kept.stop + len(stays))
            self.prompts["harmless"] = self.prompts["harmless"] + stays
        turned = refine and not editing.biprojected
        self.base, self.target, answered = self._unedited()
        rows = {"harmful": range(len(self.prompts["harmful"])), "harmless": answered}
        self.draw = {name: _shuffled(chosen, session.seed) for name, chosen in rows.items()}
        self.readers: Readers | None = None
        self.writers: tuple[str, ...] = ()
        basis = _beginning(start) if turned else start.basis.float()
        own = has_own_edits(session, editing, refine=refine)
        self.vectors = self._begin(basis, answered) if own else [_long(basis)]
        self.strengths = torch.full((len(self.free),), OWN_START if own else START, requires_grad=bool(self.free))
        for vectors in self.vectors:
            vectors.requires_grad_(refine)
        self.optimiser = torch.optim.Adam(self._groups(), betas=(0.9, 0.99))

    def _groups(self) -> list[dict[str, Any]]:
        """What is optimised, and by how much in a step. Raises `UsageError` where that is nothing."""
        rates = ((self.strengths, STRENGTH_RATE), *((vectors, DIRECTION_RATE) for vectors in self.vectors))
        groups = [{"params": [values], "lr": rate, "rate": rate} for values, rate in rates if values.requires_grad]
        if not groups:
            raise UsageError("--method gradient: strengths and direction are both fixed; there is nothing to search")
        return groups

    def _begin(self, basis: Float[Tensor, "*sites k d"], answered: list[int]) -> list[Float[Tensor, "w k d"]]:
        """L and R of each writer: what the plan of `basis` takes out there, and what hardly reads prompts answered."""
        session, names = self.session, {*self.free, *self.fixed}
        modules = {writer.name: writer.module for writer in session.anatomy.writers if writer.name in names}
        prompts = self.prompts["harmless"].take(answered)
        width, skip = session.anatomy.d_model, _shared(self.prompts["harmless"])
        with written_by(session.model, modules, width, skip=skip) as written:
            for_each_first_token(session.model, prompts, session.size, lambda *_: None, into=list(written.values()))
        plan = plan_for(session.anatomy, self._direction([basis], dict.fromkeys(modules, START)))
        left = torch.stack([edit.basis for edit in plan.edits])
        self.readers, right = begun(left, list(written.values()))
        self.writers = tuple(modules)
        return [_long(left), _long(right)]

    def leg(self, leg: Leg, progress: Callable[[int], None] | None) -> Direction:
        """Some steps at one weight."""
        kept: list[list[Tensor]] = []
        for step in range(leg.steps):
            for group in self.optimiser.param_groups:
                group["lr"] = group["rate"] * (1 - (1 - LAST) * step / leg.steps)
            self._step(leg.weight)
            if step >= leg.steps // 2:
                kept.append([values.detach().clone() for values in (self.strengths, *self.vectors)])
            if progress is not None:
                progress(1)
        strengths, *vectors = (torch.stack(values).mean(0) for values in zip(*kept, strict=True))
        return self._result(vectors, strengths)

    def _step(self, weight: float) -> None:
        counts = {"harmful": self.harmful_rows, "harmless": BATCH}
        rows = {name: [next(draw) for _ in range(counts[name])] for name, draw in self.draw.items()}
        joined = self._joined(rows)
        wanted = [p for p in (self.strengths, *self.vectors) if p.requires_grad]
        sums = [torch.zeros_like(p) for p in wanted]

        def work(chosen: list[int]) -> None:
            with ablation(self.session.model, self._plan()):
                loss = self._loss(joined, chosen, rows, weight) / BATCH
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient

        lengths = [len(suffix) for suffix in joined.suffixes]
        size = self.session.size
        tokens = max(_TOKENS, size.tokens // 4) if is_offloaded(self.session.model) else _TOKENS
        in_batches(lengths, BatchSize(size.rows, tokens), work, into=sums)
        for parameter, total in zip(wanted, sums, strict=True):
            parameter.grad = total
        self.optimiser.step()
        ranks.led(*wanted)

    def _joined(self, rows: Mapping[str, list[int]]) -> Encoded:
        """What is run in a step."""
        return self.prompts["harmful"].take(rows["harmful"]) + self.prompts["harmless"].take(rows["harmless"])

    def _loss(
        self, joined: Encoded, chosen: list[int], rows: Mapping[str, list[int]], weight: float
    ) -> Float[Tensor, ""]:
        """The part of a step's loss that some of its prompts have, under hooks: the first `BATCH` are harmful ones."""
        model = self.session.model
        shared = SharedPrefix(model, joined.prefix, grad=True)
        logits = last_logits(model, shared, joined.take(chosen).suffixes)
        refusing = [i for i, row in enumerate(chosen) if row < BATCH]
        answering = [i for i, row in enumerate(chosen) if row >= BATCH]
        scores = refusal_score(logits[refusing], self.tokens).to(logits)
        base = self.base[[rows["harmless"][chosen[i] - BATCH] for i in answering]].to(logits)
        loss: Tensor = softplus(scores - self.target).sum() + weight * kl_divergence(base, logits[answering]).sum()
        return loss

    def _plan(self) -> Plan:
        """The plan of the parameters as they are, differentiable in them."""
        values = dict(zip(self.free, self.strengths, strict=True))
        return plan_for(self.session.anatomy, self._direction(self.vectors, values))

    def _direction(self, vectors: Sequence[Float[Tensor, "*any k d"]], strengths: Any) -> Direction:
        recipe = self._recipe(strengths)
        first = vectors[0]
        unit = first / first.norm(dim=-1, keepdim=True)
        if self.readers is not None:
            rows = [row for row, name in enumerate(self.writers) if name in recipe.strengths]
            names = tuple(self.writers[row] for row in rows)
            own = PerWriter(names, unit[rows], self.readers(vectors[1])[rows])
            return replace(self.start, recipe=recipe, per_writer=own)
        if first.dim() == 2:
            return replace(self.start, basis=orthonormal(first), recipe=recipe)
        return replace(self.start, recipe=recipe, per_site=unit)

    def _recipe(self, strengths: Any) -> Recipe:
        """Tensors stand for strengths while they are optimised."""
        editing = self.editing
        strengths = cast(Any, {**self.fixed, **strengths})
        tied = any(writer.tied and writer.name in strengths for writer in self.session.anatomy.writers)
        return Recipe(strengths, editing.norm_preserving, editing.biprojected, editing.untie and tied)

    def _result(self, vectors: Sequence[Float[Tensor, "*any k d"]], strengths: Float[Tensor, " w"]) -> Direction:
        values = {name: round(float(s), 6) for name, s in zip(self.free, strengths, strict=True)}
        return self._direction(vectors, {n: s for n, s in values.items() if abs(s) >= LEAST})

    def _unedited(self) -> tuple[Float[Tensor, "n vocab"], float, list[int]]:
        """The first tokens of answers to harmless prompts: their distributions in the model's own precision, the mean
        refusal score, and which prompts are answered.
        """
        session, prompts = self.session, self.prompts["harmless"]
        found = first_tokens(session.model, prompts, self.tokens, session.size, keep=session.loaded.dtype)
        others = range(self.kept.start)
        answered = (found.scores[: len(others)] < 0).nonzero().flatten().tolist() or list(others)
        return found.logits, float(found.scores[answered].mean()), [*answered, *self.kept]


class _Lesson(_Descent):
    """The same, guided by whole replies: see the module."""

    split, harmful_rows = "plain train", PAIRS

    def __init__(
        self, session: Session, tokens: list[int], start: Direction, editing: EditSettings, refine: bool
    ) -> None:
        super().__init__(session, tokens, start, editing, refine)
        told = [session.encoded[name, "train"] for name in ("harmful", "harmless")]
        most = min(LESSON_TOKENS, session.prompts.behaviour.shows.tokens)
        replies = [own_replies(session, prompts, most) for prompts in told]
        # A reply without a word teaches nothing.
        usable = [row for row, pair in enumerate(zip(*replies, strict=True)) if all(reply.tokens for reply in pair)]
        if not usable:
            raise UsageError("--method gradient: expected replies under both instructions, found only empty ones")
        self.draw["harmful"] = _shuffled(usable, session.seed)
        self.replies = [[tuple(reply.tokens) for reply in side] for side in replies]
        self.goals = [self._goals(told[1], side, usable) for side in (0, 1)]

    def _joined(self, rows: Mapping[str, list[int]]) -> Encoded:
        prompts = self.prompts["harmful"]
        answered = [(*prompts.suffixes[row], *self.replies[side][row]) for side in (0, 1) for row in rows["harmful"]]
        return Encoded(prompts.prefix, tuple(answered)) + self.prompts["harmless"].take(rows["harmless"])

    def _loss(
        self, joined: Encoded, chosen: list[int], rows: Mapping[str, list[int]], weight: float
    ) -> Float[Tensor, ""]:
        model, loss = self.session.model, torch.zeros(())
        for side, sign in ((0, 1), (1, -1)):
            mine = [i - side * PAIRS for i in chosen if i // PAIRS == side]
            if mine:
                asked = [rows["harmful"][i] for i in mine]
                found = self._likelihoods(self.prompts["harmful"], side, asked, grad=True)
                goal = torch.tensor([self.goals[side][row] for row in asked]).to(found)
                loss = loss + softplus(sign * SLOPE * (found - goal)).sum() * BATCH / PAIRS
        others = [i for i in chosen if i >= 2 * PAIRS]
        if others:
            shared = SharedPrefix(model, joined.prefix, grad=True)
            logits = last_logits(model, shared, joined.take(others).suffixes)
            base = self.base[[rows["harmless"][i - 2 * PAIRS] for i in others]].to(logits)
            loss = loss + weight * kl_divergence(base, logits).sum()
        return loss

    def _goals(self, told: Encoded, side: int, rows: Sequence[int]) -> dict[int, float]:
        """How likely one side's replies are under the other instruction, by row."""
        found: dict[int, float] = {}
        for start in range(0, len(rows), _GOALS):
            piece = rows[start : start + _GOALS]
            found |= zip(piece, self._likelihoods(told, side, piece).tolist(), strict=True)
        return found

    def _likelihoods(
        self, prompts: Encoded, side: int, rows: Sequence[int], *, grad: bool = False
    ) -> Float[Tensor, " b"]:
        """Mean log-likelihood of a token of one side's replies after some of the prompts, in nats."""
        model = self.session.model
        shared = SharedPrefix(model, prompts.prefix, grad=grad)
        replies = [self.replies[side][row] for row in rows]
        suffixes = [(*prompts.suffixes[row], *reply[:-1]) for row, reply in zip(rows, replies, strict=True)]
        starts = torch.tensor([len(prompts.suffixes[row]) - 1 for row in rows])
        steps = torch.arange(max(map(len, replies)))

        def positions(lengths: Tensor) -> Tensor:
            return torch.minimum((starts[:, None] + steps).to(lengths.device), lengths[:, None] - 1)

        logits = logits_at(model, shared, suffixes, positions)
        means = [
            log_likelihood(one[: len(reply)], torch.tensor(reply, device=one.device)).mean()
            for one, reply in zip(logits, replies, strict=True)
        ]
        return torch.stack(means)


def _long(rows: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
    """Rows of length √d: entries of about one."""
    long: Tensor = rows * rows.shape[-1] ** 0.5 / rows.norm(dim=-1, keepdim=True)
    return long


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
