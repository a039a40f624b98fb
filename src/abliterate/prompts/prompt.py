"""A prompt: one instruction or a conversation, with the category that its source gave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.errors import PromptError

#: Who speaks, and what is said.
Message = tuple[str, str]
ROLES = ("system", "user", "assistant")

#: What data sets call who speaks and what is said (the second pair is ShareGPT's), and other names of the roles.
_SPEAKER, _SAID = ("role", "from"), ("content", "value")
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}


class Prompt(str):
    """What a model is asked: a `str`, so that it goes wherever an instruction goes.

    The text is the whole identity. Of a single turn it is the instruction, of a conversation a transcript with the
    roles in it; equality, hash, de-duplication and digests therefore cover every message. `category` is what the
    source calls this kind of prompt, or None. `messages` is what is said, (role, content) in order, the last one by
    the user. `answered` says that its source gave a reply, which was left out, `origin` is the prompt that this one was
    made of by putting something around it. Methods of `str` give plain strings.
    """

    category: str | None
    messages: tuple[Message, ...]
    answered: bool
    origin: Prompt | None

    def __new__(cls, text: str, category: str | None = None) -> Prompt:
        """One instruction. Raises `PromptError` for text that no encoding can hold."""
        check_encodable(text)
        prompt = super().__new__(cls, text)
        prompt.category = category
        prompt.answered = False
        prompt.origin = None
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


def check_encodable(text: str) -> None:
    """Raise `PromptError` for a lone surrogate, half of a character: no tokenizer takes it and no file holds it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise PromptError(
            f"expected Unicode text, found half of a character ({found}) at place {error.start + 1}; write it anew"
        ) from error


def read_conversation(value: Sequence[Any], category: str | None = None) -> Prompt:
    """A conversation as files and data sets hold it, up to what the model is to answer.

    Messages are {role, content} or ShareGPT's {from, value}; content is text or a list of parts {type: text, text}. A
    list with one text is that text. Replies at the end are left out, and `Prompt.answered` says so.

    A list of several texts does not say who speaks (some sets mean turns of the user alone, others alternate), so it
    is refused like everything else that is neither, with `PromptError`.
    """
    if len(value) == 1 and isinstance(value[0], str):
        return Prompt(value[0].strip(), category)
    if all(isinstance(part, Mapping) and "type" in part and _role(part) is None for part in value):
        return Prompt(_content(value), category)
    asked = list(value)
    while asked and _role(asked[-1]) == "assistant":
        asked.pop()
    if value and not asked:
        raise PromptError("expected a message of the user, found only replies of the assistant")
    prompt = Prompt.conversation([_message(number, message) for number, message in enumerate(asked, 1)], category)
    prompt.answered = len(asked) < len(value)
    return prompt


def _message(number: int, message: Any) -> Message:
    role = _role(message)
    said = None if role is None else next((message[key] for key in _SAID if message.get(key) is not None), None)
    if role is None or not isinstance(said, str | list):
        found = "a text" if isinstance(message, str) else f"{type(message).__name__} {str(message)[:60]!r}"
        raise PromptError(f"message {number}: expected {{role, content}}, found {found}")
    try:
        return role, _content(said)
    except PromptError as error:
        raise PromptError(f"message {number}: {error}") from error


def _role(message: Any) -> str | None:
    """Who speaks, in the words of chat templates; None of what is no message."""
    names = [message.get(key) for key in _SPEAKER] if isinstance(message, Mapping) else []
    name = next((name.strip().casefold() for name in names if isinstance(name, str)), None)
    return None if name is None else _ALIASES.get(name, name)


def _content(value: str | Sequence[Any]) -> str:
    """What is said: a text, or the texts of its parts, each on lines of its own."""
    if isinstance(value, str):
        return value.strip()
    texts = []
    for number, part in enumerate(value, 1):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise PromptError(
                f"part {number}: expected {{type: text, text}}, found {str(kind)[:60]!r}; "
                "only text is measured, leave other parts out"
            )
        texts.append(text)
    return "\n".join(texts).strip()


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
