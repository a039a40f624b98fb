"""What a window does with the bench: two chats on one prompt, and what was said in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from abliterate.lab import markup
from abliterate.lab.bench import Bench, Intervention, Turn


@dataclass(frozen=True, slots=True)
class Said:
    """One side's last exchange in tokens, and under which intervention it was written."""

    prompt: tuple[int, ...] = ()
    reply: tuple[int, ...] = ()
    intervention: Intervention | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One chat: its turns in order, and the last of them in tokens."""

    turns: tuple[Turn, ...] = ()
    last: Said = Said()


@dataclass(frozen=True, slots=True)
class Talk:
    """Both chats of a window. Each goes on from its own replies."""

    original: Side = Side()
    edited: Side = Side()


def talk(bench: Bench, before: Talk, prompt: str, intervention: Intervention, max_new_tokens: int) -> Iterator[Talk]:
    """Both sides' replies to `prompt`, a token of each in turn. What was yielded last is what was said."""
    sides = (
        _side(bench, before.original, prompt, None, max_new_tokens),
        _side(bench, before.edited, prompt, intervention, max_new_tokens),
    )
    now = before
    for original, edited in itertools.zip_longest(*sides):
        now = Talk(original or now.original, edited or now.edited)
        yield now


def _side(
    bench: Bench, before: Side, prompt: str, intervention: Intervention | None, max_new_tokens: int
) -> Iterator[Side]:
    said = Said(bench.encode(before.turns, prompt), (), intervention)
    yield Side((*before.turns, (prompt, "")), said)
    for reply in bench.reply(said.prompt, intervention, max_new_tokens):
        yield Side((*before.turns, (prompt, bench.text(reply))), replace(said, reply=reply))


def coloured(bench: Bench, now: Talk, layer: int) -> str:
    """The last replies of both sides as HTML, every token coloured by its projection on the direction."""
    sides = []
    for name, side in (("original", now.original), ("plan", now.edited)):
        said = side.last
        if said.reply:
            values = bench.projections(said.prompt, said.reply, layer, said.intervention)
            sides.append((name, bench.pieces(said.reply), values.tolist()))
    if not sides:
        return markup.note("Replies appear here token by token, coloured by how far they lie along the direction.")
    return markup.tokens(sides, layer)
