"""What an engine is: greedy replies of one loaded model and of its edited state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from abliterate.errors import UsageError
from abliterate.model.batches import Encoded
from abliterate.model.generation import Reply, reply_text

Progress = Callable[[int], None]


class Engine(Protocol):
    """Answers prompts greedily, for the original model and inside `edited` for the edited one."""

    @property
    def name(self) -> str:
        """What computes, with a version or an address: for the record."""

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, progress: Progress | None = None
    ) -> list[Reply]:
        """Greedy replies of at most `max_new_tokens` tokens to prompts as token ids, in their order.

        `progress` is told how many prompts have been answered since it was last told.
        """

    def edited(self) -> AbstractContextManager[None]:
        """Replies are the edited model's, inside a `with`. Raises `UsageError` when no edited model was given."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A model and its edited state, in the forms that engines ask for; each needs its own part only.

    ============  ====================================================================================================
    all           `tokenizer`, and `ends`, the ids that end a reply (see `generation.end_tokens`)
    vllm          `folder` of the original; `edited`, the folder of a LoRA adapter for it or of an edited model
    a server      `served` and `edited_as`, the names under which it serves the two
    ============  ====================================================================================================
    """

    tokenizer: Any
    ends: frozenset[int]
    folder: Path | None = None
    edited: Path | None = None
    served: str | None = None
    edited_as: str | None = None


@dataclass(frozen=True, slots=True)
class EngineState:
    """The original, or the edited model, behind an engine: see `answering.Answering`."""

    engine: Engine
    edited: bool = False

    def complete(
        self, prompts: Encoded, max_new_tokens: int, progress: Callable[[int], None], stopping: Any = None
    ) -> list[Reply]:
        """Greedy replies. Engines take all prompts at once and let replies run to their end: `stopping` is not used."""
        sequences = [prompts.prefix + suffix for suffix in prompts.suffixes]
        with self.engine.edited() if self.edited else nullcontext():
            return self.engine.complete(sequences, max_new_tokens, progress)


def states_of(engine: Engine, *, edited: bool) -> tuple[EngineState, EngineState | None]:
    """The original behind an engine, and the edited model where there is one."""
    return EngineState(engine), EngineState(engine, True) if edited else None


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Raise `UsageError` naming a prompt without tokens."""
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UsageError(f"prompt {number}: expected at least one token, found none; leave it out")


def as_reply(tokenizer: Any, tokens: Sequence[int], ends: frozenset[int], *, ended: bool) -> Reply:
    """A reply as `generation.complete` returns it: without the tokens that end it."""
    kept = tuple(token for token in tokens if token not in ends)
    return Reply(kept, reply_text(tokenizer, kept), ended)


def nothing_edited(name: str, wanted: str) -> UsageError:
    """The error for asking an engine for an edited model that it was not given."""
    return UsageError(f"engine {name}: expected an edited model, found none; give it {wanted}")


def in_a_line(error: BaseException) -> str:
    """The beginning of a foreign error's text, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
