"""The bench: one live model, with and without an intervention, token by token. Knows nothing of web pages.

Hooks are on the model only while one forward pass runs, under one lock. So any number of replies can be written at
the same time by any number of windows, each with an intervention of its own, and none meets another's.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from abliterate.config import EditSettings, ModelSettings
from abliterate.edit.direction import Direction, Site
from abliterate.edit.hooks import ablation, addition
from abliterate.edit.options import by_recipe, plan_for
from abliterate.edit.plan import Plan
from abliterate.errors import UsageError
from abliterate.evaluation.scores import kl_divergence
from abliterate.model.anatomy import Anatomy, stream_out
from abliterate.model.batches import cached, close, cut_head, hooked, input_device, new_cache, require_finite
from abliterate.model.context import check_fits, reply_room
from abliterate.model.generation import end_tokens
from abliterate.model.loading import LoadedModel
from abliterate.prompts import ChatRenderer
from abliterate.prompts.prompt import Prompt

#: What was said: the user's message, and the reply.
Turn = tuple[str, str]

#: First-token logits of the unedited model that are remembered: a slider moves many times over one prompt.
_REMEMBERED = 16


class Controls(BaseModel):
    """What a window asks for.

    `site` None is the direction as it was found, with its recipe; `first` to `last` are blocks, None for the ends;
    `components` None is all of them. When `adding`, `coefficient` times the raw difference of means is added to the
    stream at the site's layer, and nothing is taken out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: Site | None = None
    strength: float = Field(1.0, ge=-2, le=2)
    first: int | None = Field(None, ge=0)
    last: int | None = Field(None, ge=0)
    components: tuple[str, ...] | None = None
    variant: Literal["plain", "norm-preserving", "bi-projected"] = "plain"
    adding: bool = False
    coefficient: float = Field(1.0, ge=-4, le=4)


@dataclass(frozen=True, slots=True)
class Intervention:
    """What is done to the model: a plan of what is taken out, or a vector [d] added where it enters block `layer`."""

    plan: Plan | None = None
    layer: int = 0
    vector: Float[Tensor, " d"] | None = None


@dataclass(frozen=True, slots=True)
class FirstToken:
    """How likely a reply starts with a refusal, without and with the intervention, and KL(original ‖ edited), nats."""

    original: float
    edited: float
    kl: float


@dataclass(frozen=True, slots=True)
class Heat:
    """A number for every site [positions, L+1], NaN where none is known; `best` says which end is the good one."""

    what: str
    values: Float[Tensor, "k sites"]
    best: Literal["low", "high"]


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, a direction, the tokens that refusals start with, and the folder that results may be written into.

    `steps` says whether the model can go on from a cache; else every step runs all tokens.
    """

    loaded: LoadedModel
    renderer: ChatRenderer
    anatomy: Anatomy
    direction: Direction
    tokens: tuple[int, ...]
    loading: ModelSettings
    root: Path
    heat: Heat | None = None
    steps: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    _known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The live transformers model."""
        return self.loaded.model

    @property
    def components(self) -> tuple[str, ...]:
        """Kinds of writers that this model has, in stream order."""
        return tuple(dict.fromkeys(writer.kind.value for writer in self.anatomy.writers))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites with a direction of their own: those of the direction file's candidates where the classes differ."""
        candidates = self.direction.candidates
        if candidates is None:
            return ()
        positions = candidates.positions
        return tuple(Site(site, positions[row]) for row, site in candidates.norms.nonzero().tolist())

    @property
    def chosen(self) -> Site | None:
        """The site that the direction comes from, where its file says so."""
        return self.direction.site

    def settings(self, controls: Controls) -> EditSettings:
        """The controls as the settings that `apply` takes; what the recipe says of variants is kept."""
        last = self.anatomy.layers - 1
        first, end = controls.first or 0, last if controls.last is None else controls.last
        if first > end:
            raise UsageError(f"layers: expected the first no higher than the last, found {first} to {end}")
        if controls.components == ():
            raise UsageError("components: expected at least one, found none")
        everything = controls.components is None or set(controls.components) == set(self.components)
        everywhere = (first, end) == (0, last)
        named = self.components if controls.components is None else controls.components
        recipe = self.direction.recipe if controls.site is None else None
        return EditSettings(
            strength=controls.strength,
            layers=None if everywhere else f"{first}-{end}",
            components=None if everything and everywhere else ",".join(named),
            norm_preserving=controls.variant == "norm-preserving" or (recipe is not None and recipe.norm_preserving),
            biprojected=controls.variant == "bi-projected" or (recipe is not None and recipe.biprojected),
            untie=recipe is not None and recipe.untie,
        )

    def plan(self, controls: Controls) -> Plan:
        """The edit that the controls ask for; raises `UsageError` where there is none."""
        if controls.adding:
            raise UsageError("plan: expected something to take out, found a direction that is added; choose 'remove'")
        return plan_for(self.anatomy, self._direction(controls), self.settings(controls))

    def recipe(self, controls: Controls) -> Direction:
        """The direction with a recipe that gives this very plan without further settings."""
        self.plan(controls)
        return by_recipe(self.anatomy, self._direction(controls), self.settings(controls))

    def intervention(self, controls: Controls) -> Intervention:
        """The plan, or the vector to add."""
        if not controls.adding:
            return Intervention(self.plan(controls))
        site, candidates = controls.site or self.chosen, self.direction.candidates
        if candidates is None or site is None:
            raise UsageError("add: expected a difference of means, found a direction file without candidates")
        if site[0] >= self.anatomy.layers:
            raise UsageError(f"add: expected a layer below {self.anatomy.layers}, found {site[0]}; choose another site")
        self.direction.at(site)
        return Intervention(layer=site[0], vector=controls.coefficient * candidates.at(*site))

    def encode(self, turns: Sequence[Turn], prompt: str) -> tuple[int, ...]:
        """Token ids of a conversation that ends with `prompt`. Turns without a reply are left out.

        Raises `UsageError` for a conversation that has no positions left for a reply.
        """
        said = [pair for pair in turns if pair[1].strip()]
        messages = [message for user, reply in said for message in (("user", user), ("assistant", reply))]
        (ids,) = self.renderer.encode([Prompt.conversation([*messages, ("user", prompt)])])
        check_fits(self.model, len(ids))
        return tuple(ids)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a reply that may end within a character."""
        decoded: str = self.loaded.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return decoded.rstrip("\ufffd")

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to the text of a reply: alone, some would lose the space in front of them."""
        texts = [self.text(tokens[:end]) for end in range(len(tokens) + 1)]
        return [after[len(before) :] for before, after in itertools.pairwise(texts)]

    def reply(
        self, prompt: tuple[int, ...], intervention: Intervention | None, max_new_tokens: int
    ) -> Iterator[tuple[int, ...]]:
        """A greedy reply, as it grows: all tokens so far after each step, without the end of turn."""
        ends = end_tokens(self.model, self.loaded.tokenizer)
        cache = new_cache(self.model) if self.steps else None
        fresh = prompt
        said: tuple[int, ...] = ()
        for _ in range(reply_room(self.model, len(prompt), max_new_tokens)):
            token = int(self._logits(fresh, intervention, cache).argmax())
            if token in ends:
                return
            said = (*said, token)
            yield said
            fresh = (token,) if self.steps else (*prompt, *said)

    def first_token(self, prompt: tuple[int, ...], intervention: Intervention) -> FirstToken:
        """How a reply starts without and with the intervention."""
        base = self._known.get(prompt)
        if base is None:
            base = self._logits(prompt, None)
            self._remember(prompt, base)
        edited = self._logits(prompt, intervention)
        return FirstToken(self._refusing(base), self._refusing(edited), float(kl_divergence(base, edited)))

    def projections(
        self, prompt: tuple[int, ...], reply: tuple[int, ...], layer: int, intervention: Intervention | None
    ) -> Float[Tensor, " n"]:
        """r̂ᵀx at every token of a reply, x the stream at site `layer` (0..L), r̂ the direction's first row."""
        blocks = self._blocks
        captured: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.append(args[0] if args else kwargs["hidden_states"])

        def after(_: nn.Module, __: Any, output: Any) -> None:
            captured.append(stream_out(output))

        with self.lock, self._acting(intervention):
            # Registered last, so that what is added to the stream is seen.
            if layer < len(blocks):
                handle = blocks[layer].register_forward_pre_hook(before, with_kwargs=True)
            else:
                handle = blocks[-1].register_forward_hook(after)
            with hooked([handle]):
                self._run((*prompt, *reply), None)
        values: Tensor = captured[0][0, len(prompt) :].float().cpu() @ self.direction.basis[0].float()
        return values

    def _remember(self, prompt: tuple[int, ...], logits: Float[Tensor, " vocab"]) -> None:
        with self.lock:  # other windows ask at the same time
            while len(self._known) >= _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[prompt] = logits

    def _refusing(self, logits: Float[Tensor, " vocab"]) -> float:
        return float(logits.softmax(-1)[list(self.tokens)].sum())

    @property
    def _blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.anatomy.blocks]

    def _direction(self, controls: Controls) -> Direction:
        return self.direction.at(controls.site, self.anatomy.d_model)

    def _logits(
        self, fresh: tuple[int, ...], intervention: Intervention | None, cache: Any = None
    ) -> Float[Tensor, " vocab"]:
        with self.lock, self._acting(intervention):
            logits = self._run(fresh, cache)
        require_finite(logits.amax())
        return logits

    def _run(self, fresh: tuple[int, ...], cache: Any) -> Float[Tensor, " vocab"]:
        """Logits in float32 after the `fresh` tokens, under the hooks that are on now."""
        ids = torch.tensor([fresh], device=input_device(self.model))
        options = {"use_cache": False} if cache is None else cached(self.model, cache)
        with cut_head(self.model, torch.tensor([[len(fresh) - 1]])), torch.inference_mode():
            logits: Tensor = self.model(input_ids=ids, **options).logits[0, -1].float()
        return logits

    @contextlib.contextmanager
    def _acting(self, intervention: Intervention | None) -> Iterator[None]:
        """The model with the intervention as hooks; only ever under the lock."""
        with contextlib.ExitStack() as stack:
            if intervention is not None and intervention.plan is not None:
                stack.enter_context(ablation(self.model, intervention.plan))
            if intervention is not None and intervention.vector is not None:
                block = self._blocks[intervention.layer]
                stack.enter_context(addition(block, intervention.vector[None]))
            yield


def can_step(bench: Bench) -> bool:
    """Whether going on from a cache gives the logits of a whole pass: tried out, since not all models do."""
    prompt = bench.encode([], "Hello")
    expected = bench._logits((*prompt, prompt[-1]), None)
    cache = new_cache(bench.model)
    try:
        bench._logits(prompt, None, cache)
        found = bench._logits(prompt[-1:], None, cache)
    except (RuntimeError, AttributeError, ValueError, IndexError, TypeError):
        return False
    return close(bench.model, found, expected)
