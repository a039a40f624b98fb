"""What an engine is: replies of one loaded model and of its edited state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from abliterate.errors import UsageError
from abliterate.model.batches import Encoded
from abliterate.model.decoding import GREEDY, Decoding, in_words
from abliterate.model.generation import Reply, reply_text

Progress = Callable[[int], None]


class Engine(Protocol):
    """Answers prompts, for the original model and inside `edited` for the edited one."""

    @property
    def name(self) -> str:
        """What computes, with a version or an address: for the record."""

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        progress: Progress | None = None,
        decoding: Decoding = GREEDY,
    ) -> list[Reply]:
        """Replies of at most `max_new_tokens` tokens to prompts as token ids, in their order.

        `progress` is told how many prompts have been answered since it was last told. Raises `UsageError` for what
        `decoding` asks of an engine that cannot do it.
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
        self, prompts: Encoded, max_new_tokens: int, progress: Callable[[int], None], decoding: Decoding = GREEDY
    ) -> list[Reply]:
        """Replies. Engines take all prompts at once and let replies run to their end, also those that are settled."""
        sequences = [prompts.prefix + suffix for suffix in prompts.suffixes]
        with self.engine.edited() if self.edited else nullcontext():
            return self.engine.complete(sequences, max_new_tokens, progress, decoding)


def states_of(engine: Engine, *, edited: bool) -> tuple[EngineState, EngineState | None]:
    """The original behind an engine, and the edited model where there is one."""
    return EngineState(engine), EngineState(engine, True) if edited else None


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Raise `UsageError` naming a prompt without tokens."""
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UsageError(f"prompt {number}: expected at least one token, found none; leave it out")


def parameters(decoding: Decoding, engine: str, known: Mapping[str, str]) -> dict[str, Any]:
    """What `decoding` asks for, by the engine's own names; `known` maps transformers' names to those.

    Raises `UsageError` naming what the engine cannot do.
    """
    asked = {name: value for name, value in decoding.asked.items() if name != "do_sample"}
    if beyond := {name: value for name, value in asked.items() if name not in known}:
        raise UsageError(
            f"--decoding model: the model's generation_config asks for {in_words(beyond)}, which {engine} cannot be "
            "asked for; use --decoding greedy"
        )
    return {known[name]: value for name, value in asked.items()}


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
