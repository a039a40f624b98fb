"""The labelled exchanges that judges are measured on and fitted to: made up for it, with no copyright (CC0).

Each has the label of whoever wrote it and that of a second reader who did not see the first. Where a harmful request is
complied with, a harmless stand-in of the same form takes the reply's place. A third (`hold`) is never fitted on. All of
them stand in benchmarks/exchanges.jsonl of the source; with the package come those that judges draw while they work
(scripts/train_judge.py takes them out).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from abliterate.evaluation.judging.base import Exchange, Label, Verdict

Split = Literal["fit", "hold"]

FILE = "exchanges.jsonl"
#: How many clear ones of the split `fit`, of each kind, judges may draw.
MOST_FIT = 32


class ShippedExchange(BaseModel):
    """A prompt, a reply, and what two readers called it; `kind` says of which kind it was written to be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    prompt: str
    reply: str
    label: Label
    second: Label
    kind: str
    lang: str
    split: Split
    manner: str | None = None

    @property
    def exchange(self) -> Exchange:
        """What a judge is shown."""
        return Exchange(self.prompt, self.reply)

    @property
    def refused(self) -> bool:
        """The two-way reading of the label."""
        return Verdict(self.label).refused

    @property
    def clear(self) -> bool:
        """Whether it is in the manner of a real model, and both readers say refused, or both complied with."""
        labels = (self.label, self.second)
        agreed = all(Verdict(label).refused for label in labels) or set(labels) == {Label.COMPLIANCE}
        return agreed and self.manner is not None


@functools.cache
def read_shipped() -> tuple[ShippedExchange, ...]:
    """Those that come with the package, in the order of the file."""
    return parse_exchanges(resources.files("abliterate.evaluation.judging").joinpath(FILE).read_text("utf-8"))


def parse_exchanges(text: str) -> tuple[ShippedExchange, ...]:
    """Exchanges of a file of them, one JSON object on a line."""
    return tuple(TypeAdapter(list[ShippedExchange]).validate_json("[" + ",".join(text.splitlines()) + "]"))


@functools.cache
def clear_exchanges(split: Split, each: int | None = None) -> tuple[ShippedExchange, ...]:
    """Clear exchanges of a split: those that were refused, then those complied with; at most so many of `each`.

    Which ones is drawn by the hash of their text. Of `fit` no more than `MOST_FIT` of each come with the package.
    """
    return draw(read_shipped(), split, each)


def draw(rows: Sequence[ShippedExchange], split: Split, each: int | None = None) -> tuple[ShippedExchange, ...]:
    """What `clear_exchanges` draws of these."""
    clear = sorted((row for row in rows if row.split == split and row.clear), key=_lot)
    kinds = ([row for row in clear if row.refused is refused] for refused in (True, False))
    return tuple(row for kind in kinds for row in kind[:each])


def _lot(row: ShippedExchange) -> bytes:
    return hashlib.sha256(json.dumps([row.prompt, row.reply]).encode()).digest()


__all__ = ["FILE", "MOST_FIT", "ShippedExchange", "Split", "clear_exchanges", "draw", "parse_exchanges", "read_shipped"]
