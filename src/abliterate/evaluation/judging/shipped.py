"""The labelled exchanges that come with the package: made up for it, with no copyright (CC0).

Each has the label of whoever wrote it and that of a second reader who did not see the first. Where a harmful request is
complied with, a harmless stand-in of the same form takes the reply's place. A third (`hold`) is never fitted on.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from abliterate.evaluation.judging.base import Label


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
    split: Literal["fit", "hold"]
    manner: str | None = None


@functools.cache
def read_shipped() -> tuple[ShippedExchange, ...]:
    """All of them, in the order of the file."""
    text = resources.files("abliterate.evaluation.judging").joinpath("exchanges.jsonl").read_text("utf-8")
    rows = TypeAdapter(list[ShippedExchange]).validate_json("[" + ",".join(text.splitlines()) + "]")
    return tuple(rows)


__all__ = ["ShippedExchange", "read_shipped"]
