"""A prompt: one instruction or a conversation, with the category that its source gave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.errors import PromptError

#: Who speaks, and what is said.
Message = tuple[str, str]
ROLES = ("system", "user", "assistant")


class Prompt(str):
    """What a model is asked: a `str`, so that it goes wherever an instruction goes.

    The text is the whole identity. Of a single turn it is the instruction, of a conversation a transcript with the
    roles in it; equality, hash, de-duplication and digests therefore cover every message. `category` is what the
    source calls this kind of prompt, or None. `messages` is what is said, (role, content) in order, the last one by
    the user. Methods of `str` give plain strings.
    """

    category: str | None
    messages: tuple[Message, ...]

    def __new__(cls, text: str, category: str | None = None) -> Prompt:
        """One instruction."""
        prompt = super().__new__(cls, text)
        prompt.category = category
        prompt.messages = (("user", text),)
        return prompt

    @classmethod
    def conversation(cls, messages: Sequence[Message], category: str | None = None) -> Prompt:
        """Several turns. One message alone is the same prompt as its text.

        Raises `PromptError` when a role is unknown, the system speaks anywhere but first, a message is blank, or the
        last one is not the user's.
        """
        _check(messages)
        if len(messages) == 1:
            return cls(messages[0][1], category)
        prompt = cls("\n\n".join(f"[{role}]\n{content}" for role, content in messages), category)
        prompt.messages = tuple(messages)
        return prompt


def messages_of(prompt: str) -> tuple[Message, ...]:
    """The messages of a prompt; a plain string is one message of the user."""
    return prompt.messages if isinstance(prompt, Prompt) else (("user", prompt),)


def read_messages(value: Sequence[Any]) -> tuple[Message, ...]:
    """Messages as files and data sets hold them: a list of {role, content}, or a list with one text.

    A list of several texts does not say who speaks (some sets mean turns of the user alone, others alternate), so it
    is refused like everything else that is neither.
    """
    if len(value) == 1 and isinstance(value[0], str):
        return (("user", value[0].strip()),)
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            found = "a text" if isinstance(message, str) else f"{type(message).__name__} {str(message)[:60]!r}"
            raise PromptError(f"message {number}: expected {{role, content}}, found {found}")
        messages.append((message["role"].strip().casefold(), message["content"].strip()))
    return tuple(messages)


def _check(messages: Sequence[Message]) -> None:
    for number, (role, content) in enumerate(messages, 1):
        if role not in ROLES:
            raise PromptError(f"message {number}: expected a role of {', '.join(ROLES)}, found '{role}'")
        if role == "system" and number > 1:
            raise PromptError(f"message {number}: expected the system's message first, found it after others")
        if not content.strip():
            raise PromptError(f"message {number}: expected text from the {role}, found none")
    if not messages or messages[-1][0] != "user":
        found = messages[-1][0] if messages else "no message"
        raise PromptError(f"expected the last message to be the user's, found {found}; leave the reply out")
