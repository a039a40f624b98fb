"""Thinking: closing it before it starts, and telling the answer from it when it was left open.

Families mark thinking in three ways. Most wrap it in a pair of tags, and some templates write the opening tag, so that
the reply starts within. gpt-oss names channels: the answer is what stands in the channel `final`.
"""

from __future__ import annotations

import re

#: What opens thinking, what closes it, and what is put after the opening when there shall be none.
_TAGS = (
    ("<think>", "</think>", "\n\n</think>\n\n"),
    ("<thinking>", "</thinking>", "\n</thinking>\n\n"),
    ("<thought>", "</thought>", "\n</thought>\n\n"),
    ("[THINK]", "[/THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷", "◁/think▷"),
    ("<|channel>thought", "<channel|>", "\n<channel|>"),
)

#: How gpt-oss starts a reply, and what makes it the answer itself.
_CHANNELS, _FINAL = "<|start|>assistant", "<|channel|>final<|message|>"
_CHANNEL = re.compile(r"<\|channel\|>\s*(?P<name>\w+)[^<]*(?:<\|constrain\|>\w+\s*)?<\|message\|>")
_END_OF_MESSAGE = re.compile(r"<\|(?:end|return|call|start)\|>")


def close_thinking(prompt: str) -> str:
    """The rendered prompt with the thinking it opens closed again, so that the answer comes next."""
    stripped = prompt.rstrip()
    for opening, _, closing in _TAGS:
        if stripped.endswith(opening):
            return stripped + closing
    return stripped + _FINAL if stripped.endswith(_CHANNELS) else prompt


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends within thinking: what the model writes next is no answer yet."""
    return prompt.rstrip().endswith(tuple(opening for opening, *_ in _TAGS))


def answer_of(text: str, open_: bool) -> tuple[str, bool]:
    """What follows the thinking in a reply, and whether the thinking was finished.

    `text` must be decoded with special tokens kept, since some of these marks are such tokens. `open_` says that the
    prompt ended within thinking (`opens_thinking`). A reply without any thinking is its own answer; thinking that never
    ends gives ("", False). As in the judges' reading of replies, the last closing tag counts.
    """
    if channels := list(_CHANNEL.finditer(text)):
        return _from_channels(text, channels)
    for opening, closing, _ in _TAGS:
        _, closed, answer = text.rpartition(closing)
        if closed:
            again = answer.lstrip().startswith(opening)
            return ("", False) if again else (answer.lstrip(), True)
    if open_ or text.lstrip().startswith(tuple(opening for opening, *_ in _TAGS)):
        return "", False
    return text, True


def _from_channels(text: str, channels: list[re.Match[str]]) -> tuple[str, bool]:
    final = next((channel for channel in channels if channel["name"] == "final"), None)
    if final is None:
        return "", False
    return _END_OF_MESSAGE.split(text[final.end() :], maxsplit=1)[0].strip(), True
