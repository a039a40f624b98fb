"""What happens when something in a window is moved, pressed or sent: functions of values, for `ui` to connect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from abliterate.edit.direction import Site
from abliterate.errors import AbliterateError, UsageError
from abliterate.lab import markup
from abliterate.lab.bench import Bench, Controls
from abliterate.lab.keeping import apply_plan, load_plan, save_plan
from abliterate.lab.opening import heat_of
from abliterate.lab.shelf import Shelf
from abliterate.lab.talking import Side, Talk, coloured, talk
from abliterate.monitor import Monitor

#: The site's choice that means the direction as it was found, with its recipe.
FOUND = "found"
REMOVE, ADD = "remove", "add"
VARIANTS: tuple[Literal["plain", "norm-preserving", "bi-projected"], ...] = (
    "plain",
    "norm-preserving",
    "bi-projected",
)

Messages = list[dict[str, str]]


class Knobs(NamedTuple):
    """The values of a window's controls, in the order in which they stand there."""

    site: str
    strength: float
    first: float
    last: float
    components: list[str]
    variant: str
    mode: str
    coefficient: float

    @property
    def controls(self) -> Controls:
        """What they ask for. Raises `UsageError` for values that no control gives."""
        try:
            return Controls.model_validate(
                {
                    "site": site_of(self.site),
                    "strength": self.strength,
                    "first": int(self.first),
                    "last": int(self.last),
                    "components": tuple(self.components),
                    "variant": self.variant,
                    "adding": self.mode == ADD,
                    "coefficient": self.coefficient,
                }
            )
        except (ValueError, TypeError) as error:
            raise UsageError("controls: expected values in their ranges, found others; reload the page") from error


def one_line(error: AbliterateError) -> str:
    """An error for a window."""
    return " ".join(str(error).split())


def name_of(site: Site | None) -> str:
    """A site as a choice."""
    return FOUND if site is None else f"{site[0]}:{site[1]}"


def site_of(name: str) -> Site | None:
    """The site that a choice names; raises `ValueError` where it names none."""
    layer, _, position = name.partition(":")
    return None if name == FOUND else Site(int(layer), int(position))


def choices(bench: Bench) -> list[tuple[str, str]]:
    """Sites to choose from, with what they are called."""
    recipe = ", with its recipe" if bench.direction.recipe is not None else ""
    where = "" if bench.chosen is None else f" ({bench.chosen[0]}, {bench.chosen[1]})"
    shown = markup.positions_shown(bench.anatomy.layers + 1)
    sites = sorted((site for site in bench.sites if -site[1] <= shown), key=lambda site: (-site[1], site[0]))
    named = [(f"layer {layer}, position {position}", name_of(Site(layer, position))) for layer, position in sites]
    return [(f"as found{where}{recipe}", FOUND), *named]


def messages(side: Side) -> Messages:
    """A chat's turns as messages, escaped: the page takes what it is given for HTML."""
    said = [({"role": "user", "content": user}, {"role": "assistant", "content": reply}) for user, reply in side.turns]
    shown = [message for pair in said for message in pair if message["content"]]
    return [message | {"content": markup.escape(message["content"])} for message in shown]


@dataclass(slots=True)
class Brake:
    """Set while the replies of a window shall not go on; `empty` when nothing of them shall stay either."""

    on: bool = False
    empty: bool = False


@dataclass(frozen=True, slots=True)
class Desk:
    """The bench as windows see it, each with the plan that was loaded there, if any. A window holds the plan's key."""

    bench: Bench
    shelf: Shelf = field(default_factory=Shelf)

    def at(self, plan: str | None) -> Bench:
        """The bench with the plan of a window. Raises `UsageError` where that was put away meanwhile."""
        if plan is None:
            return self.bench
        direction = self.shelf.get(plan)
        ours, theirs = self.bench.direction.candidates, direction.candidates
        same = ours is not None and theirs is not None and torch.equal(ours.raw, theirs.raw)
        return replace(self.bench, direction=direction, heat=self.bench.heat if same else heat_of(direction))

    def send(
        self, plan: str | None, before: Talk, brake: Brake, prompt: str, limit: float, *knobs: Any
    ) -> Iterator[tuple[Talk, Messages, Messages]]:
        """Both replies as they grow, until the brake is put on."""
        if not prompt.strip():
            raise UsageError("prompt: expected some text, found none")
        bench = self.at(plan)
        intervention = bench.intervention(Knobs(*knobs).controls)
        brake.on = brake.empty = False
        for now in talk(bench, before, prompt, intervention, int(limit)):
            if brake.on:
                break
            yield now, messages(now.original), messages(now.edited)
        if brake.empty:  # what was on its way to the page when the chats were emptied
            yield Talk(), [], []

    def stop(self, brake: Brake) -> None:
        """Let the replies of this window end where they are."""
        brake.on = True

    def clear(self, brake: Brake) -> tuple[Talk, Messages, Messages]:
        """Both chats, empty."""
        brake.on = brake.empty = True
        return Talk(), [], []

    def measure(self, plan: str | None, now: Talk, prompt: str, *knobs: Any) -> str:
        """How a reply to the prompt in the box, or else the last one sent, would start."""
        asked = prompt if prompt.strip() else (now.original.turns[-1][0] if now.original.turns else "")
        if not asked:
            return markup.note("Refusal and KL of the first token appear here with the first prompt.")
        try:
            bench = self.at(plan)
            return markup.first_token(
                bench.first_token(bench.encode([], asked), bench.intervention(Knobs(*knobs).controls))
            )
        except AbliterateError as error:
            return markup.note(one_line(error))

    def heat(self, plan: str | None, site: str) -> str:
        """The map of sites with the chosen one marked."""
        try:
            bench = self.at(plan)
            return markup.heat_map(bench.heat, bench.sites, site_of(site) or bench.chosen)
        except AbliterateError as error:
            return markup.note(one_line(error))

    def colour(self, plan: str | None, now: Talk, layer: float) -> str:
        """The last replies, coloured."""
        try:
            return coloured(self.at(plan), now, int(layer))
        except AbliterateError as error:
            return markup.note(one_line(error))

    def save(self, plan: str | None, name: str, *knobs: Any) -> str:
        """Save the plan; says where."""
        return markup.note(f"Saved as {save_plan(self.at(plan), Knobs(*knobs).controls, name)}.")

    def load(self, path: str) -> str:
        """Keep the direction of an uploaded plan; returns the key by which it is asked for."""
        return self.shelf.put(Path(path), lambda: load_plan(self.bench, Path(path)))

    def apply(self, plan: str | None, name: str, realisation: str, monitor: Monitor, *knobs: Any) -> str:
        """Write the plan; says where, and what the user must know."""
        kind: Literal["weights", "lora"] = "lora" if realisation == "lora" else "weights"
        out = apply_plan(self.at(plan), Knobs(*knobs).controls, name, kind, monitor)
        return "".join(map(markup.note, [f"Written to {out}.", *(f"Warning: {text}" for text in monitor.warnings)]))


class Reporter(Monitor):
    """Phases of the work as a bar in the window: calls `show(share or None, what)`."""

    def __init__(self, show: Callable[[float | None, str], None]) -> None:
        """Nothing begun."""
        super().__init__()
        self._show, self._name, self._total, self._done = show, "", 0, 0

    def begin(self, name: str, total: int | None) -> None:
        """A phase starts."""
        self._name, self._total, self._done = name, total or 0, 0
        self.advance(0)

    def expect_bytes(self, total: int) -> None:
        """The bar is of so many bytes."""
        self._total, self._done = total, self._done if total else 0
        self.advance(0)

    def advance(self, steps: int) -> None:
        """Some steps are done."""
        self._done += steps
        self._show(self._done / self._total if self._total else None, self._name)


def told(function: Callable[..., Any], error_class: type[Exception]) -> Callable[..., Any]:
    """The function with this package's errors as one line in the window."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        try:
            return function(*args)
        except AbliterateError as error:
            raise error_class(one_line(error)) from None

    return wrapped
