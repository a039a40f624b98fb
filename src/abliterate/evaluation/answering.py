"""Who answers: a live model in a certain state, or what stands behind an engine. All fulfil one protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from abliterate.config import ReplySettings
from abliterate.evaluation.reply_cache import keep, kept_replies, key_of
from abliterate.model.batches import Encoded
from abliterate.model.context import beyond
from abliterate.model.decoding import GREEDY, Decoding
from abliterate.model.generation import Reply, complete
from abliterate.monitor import ranks
from abliterate.record import FILE_NAME
from abliterate.session import Session


class Answering(Protocol):
    """Whatever gives replies to encoded prompts."""

    def complete(
        self, prompts: Encoded, max_new_tokens: int, progress: Callable[[int], None], decoding: Decoding = GREEDY
    ) -> list[Reply]:
        """Replies of at most so many tokens in the order of the prompts, decoded as `decoding` says.

        Whoever can may leave those that it says are settled.

        `progress` is told how many prompts have been answered since it was last told.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelState:
    """A session's live model in a certain state: `state()` is a context manager in which it is measured.

    `unchanged` says that its numbers are in that state just as its files have them, so that replies may be kept on
    disk and taken up again.
    """

    session: Session
    state: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)
    unchanged: bool = False

    @property
    def model(self) -> Any:
        """The live transformers model."""
        return self.session.model

    def complete(
        self, prompts: Encoded, max_new_tokens: int, progress: Callable[[int], None], decoding: Decoding = GREEDY
    ) -> list[Reply]:
        """Replies in that state (see `Answering.complete`)."""
        session, tokenizer = self.session, self.session.loaded.tokenizer
        with self.state():
            key = None
            if self.unchanged and ranks.leads():
                key = key_of(session.loaded, prompts, max_new_tokens, decoding)
            if (known := kept_replies(key, tokenizer)) is not None:
                session.monitor.note("answers of the unchanged model taken from the cache (--no-cache asks again)")
                progress(len(known))
                return known
            replies = complete(self.model, tokenizer, prompts, max_new_tokens, session.size, progress, decoding)
            keep(key, replies)
        self._say_beyond(prompts, replies)
        return replies

    def _say_beyond(self, prompts: Encoded, replies: list[Reply]) -> None:
        """Warn of replies that went beyond what the model was trained on, once for as many."""
        pairs = zip(prompts.suffixes, replies, strict=True)
        lengths = [len(prompts.prefix) + len(suffix) + len(reply.tokens) for suffix, reply in pairs]
        said, monitor = beyond(self.model, lengths), self.session.monitor
        if said and said not in monitor.warnings:
            monitor.warn(said)


def know_replies(session: Session, limit: int, replies: Mapping[tuple[int, ...], Reply]) -> None:
    """Keep greedy replies of the unedited model, of at most `limit` tokens, in the session, by prompts' suffixes."""
    session.kept[Reply, limit] = replies


@dataclass(frozen=True, slots=True)
class Unedited:
    """A session's unedited model, which is not asked again for replies that the session knows (`know_replies`)."""

    state: ModelState

    def complete(
        self, prompts: Encoded, max_new_tokens: int, progress: Callable[[int], None], decoding: Decoding = GREEDY
    ) -> list[Reply]:
        """Replies as `Answering.complete` gives them."""
        kept = self.state.session.kept.get((Reply, max_new_tokens), {}) if decoding == GREEDY else {}
        known: dict[tuple[int, ...], Reply] = {suffix: kept[suffix] for suffix in prompts.suffixes if suffix in kept}
        rest = prompts.take([row for row, suffix in enumerate(prompts.suffixes) if suffix not in known])
        progress(len(prompts) - len(rest))
        if len(rest):
            replies = self.state.complete(rest, max_new_tokens, progress, decoding)
            known |= zip(rest.suffixes, replies, strict=True)
        return [known[suffix] for suffix in prompts.suffixes]


def as_loaded(session: Session, settings: ReplySettings | None = None) -> ModelState:
    """A session's model as its files have it.

    Its answers are kept where `settings` are given and allow it; not those of models that this package has edited.
    """
    edited = (session.loaded.files.folder / FILE_NAME).exists()
    return ModelState(session, unchanged=settings is not None and not settings.no_cache and not edited)
