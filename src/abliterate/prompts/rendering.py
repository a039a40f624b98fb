"""Prompts → chat prompts → token ids, so that position -1 is where the answer starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.errors import ChatTemplateError, PromptError, UsageError
from abliterate.files.bounded import MB, Kind, short
from abliterate.prompts.clock import Clock
from abliterate.prompts.prompt import Message, check_encodable, messages_of
from abliterate.prompts.thinking import answer_of, close_thinking, opens_thinking
from abliterate.prompts.watched import LENGTH, TooMuchError, watched
from abliterate.texts import printable

__all__ = [
    "NO_TEMPLATE",
    "ChatRenderer",
    "answer_of",
    "common_prefix",
    "common_suffix",
    "opens_thinking",
    "read_template",
]

#: `--chat-template none`: the instruction is the prompt.
NO_TEMPLATE = "none"

_TEMPLATE = Kind("a readable Jinja file or 'none' as --chat-template", 2 * MB, UsageError)

_WITHOUT_SYSTEM = (
    "leave out --system (and system messages of conversations), or give --chat-template FILE with one that takes it"
)


@dataclass(frozen=True, slots=True)
class ChatRenderer:
    """Renders a prompt as the chat prompt whose last token the answer follows.

    `template` is a Jinja chat template, None for the tokenizer's own, or `NO_TEMPLATE`. `system` is an optional
    system prompt; a conversation that brings one of its own keeps that. With `thinking` the template is asked to let
    the model think, and thinking that it opens is left open; otherwise it is closed, and the answer comes next.
    `clock` is the time that the template prints, if it does. `rows` is how many tokens the model has an embedding of.
    """

    tokenizer: Any
    template: str | None = None
    system: str | None = None
    thinking: bool = False
    clock: Clock = field(default_factory=Clock, compare=False)
    rows: int | None = None

    def __post_init__(self) -> None:
        """Refuse a tokenizer without a chat template unless one was given."""
        if self.template is None and not getattr(self.tokenizer, "chat_template", None):
            raise ChatTemplateError(
                "this model's tokenizer has no chat template: is it a base model? "
                "give --chat-template FILE (a Jinja template) or --chat-template none (bare prompts)"
            )
        if self.template == NO_TEMPLATE and self.system:
            raise ChatTemplateError("a system prompt needs a chat template; found --chat-template none")

    def render(self, instruction: str) -> str:
        """The chat prompt as text: of a string one message of the user, of a `Prompt` all its messages.

        Raises `ChatTemplateError` when the template cannot render them, or leaves the system prompt out.
        """
        messages = messages_of(instruction)
        if self.template == NO_TEMPLATE:
            if len(messages) > 1:
                raise ChatTemplateError("a conversation needs a chat template; found --chat-template none")
            return instruction
        if self.system and messages[0][0] != "system":
            messages = (("system", self.system), *messages)
        text = self._apply(messages)
        if messages[0][0] == "system" and messages[0][1].strip() not in text:
            raise ChatTemplateError(f"the chat template leaves the system prompt out; {_WITHOUT_SYSTEM}")
        return text if self.thinking else close_thinking(text)

    def _apply(self, messages: Sequence[Message]) -> str:
        """What the template makes of the messages; if it fails, with the reason and what to do."""
        try:
            return self._template_text(messages)
        except ChatTemplateError:
            raise
        except Exception as error:  # jinja2 errors, and whatever a template raises on purpose
            reason = printable(" ".join(str(error).split()))[:200] or type(error).__name__
            endless = isinstance(error, TooMuchError | MemoryError)
            if not endless and messages[0][0] == "system" and self._renders(messages[1:]):
                raise ChatTemplateError(
                    f"the chat template cannot render a prompt ({reason}): it takes no system prompt; {_WITHOUT_SYSTEM}"
                ) from error
            raise ChatTemplateError(f"the chat template cannot render a prompt ({reason})") from error

    def _renders(self, messages: Sequence[Message]) -> bool:
        try:
            self._template_text(messages)
        except Exception:
            return False
        return True

    def _template_text(self, messages: Sequence[Message]) -> str:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        if self.template is not None:
            options["chat_template"] = self.template
        # Templates name the switch differently; one that knows neither ignores both.
        switches = {"enable_thinking": self.thinking, "thinking": self.thinking}
        chat = [{"role": role, "content": content} for role, content in messages]
        with self.clock.shown(), watched(self.template or getattr(self.tokenizer, "chat_template", None)):
            text = str(self.tokenizer.apply_chat_template(chat, **switches, **options))
        if len(text) > LENGTH:
            raise TooMuchError(f"it makes {len(text)} characters of one prompt")
        return text

    @property
    def printed_time(self) -> str | None:
        """The time that prompts hold, in ISO 8601; None where no template has asked for it."""
        return self.clock.time.isoformat(timespec="seconds") if self.clock.asked else None

    def check_repeatable(self) -> None:
        """Raise `ChatTemplateError` for a template that renders one prompt in two ways: nothing could be compared."""
        if len({self.render("Hello") for _ in range(5)}) > 1:
            raise ChatTemplateError(
                "the chat template renders the same prompt differently each time: expected one that depends on its "
                "messages only; give --chat-template FILE with such a one"
            )

    def encode(self, instructions: Iterable[str]) -> list[list[int]]:
        """Token ids of each rendered prompt. A template writes its own BOS, so none is added to it."""
        texts = [self.render(instruction) for instruction in instructions]
        if not texts:
            return []
        for text in texts:
            _check_text(text)
        special = self.template == NO_TEMPLATE
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=special, padding=False)["input_ids"]
        for text, tokens in zip(texts, ids, strict=True):
            if not tokens:
                raise ChatTemplateError(f"the prompt {text!r} has no tokens; give longer prompts")
            if self.rows is not None and max(tokens) >= self.rows:
                found = self.tokenizer.convert_ids_to_tokens(max(tokens))
                raise PromptError(
                    f"a rendered prompt: expected tokens below {self.rows}, which the model has embeddings of, found "
                    f"{max(tokens)} ({short(found)}); is the tokenizer another model's?"
                )
        return ids


def _check_text(text: str) -> None:
    try:
        check_encodable(text)
    except PromptError as error:
        raise PromptError(f"a rendered prompt: {error}") from error


def read_template(option: str | None) -> str | None:
    """The value of `--chat-template`: None, 'none', or the text of a file."""
    if option is None or option == NO_TEMPLATE:
        return option
    return _TEMPLATE.text(Path(os.path.expanduser(option)))


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences share."""
    shortest, longest = min(map(list, sequences)), max(map(list, sequences))  # lexicographic extremes differ soonest
    return next(
        (i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b),
        min(len(shortest), len(longest)),
    )


def common_suffix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest suffix that all sequences share (the post-instruction tokens of a template)."""
    return common_prefix([list(reversed(sequence)) for sequence in sequences])
