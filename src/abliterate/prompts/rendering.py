"""Instructions → chat prompts → token ids, so that position -1 is where the answer starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.errors import ChatTemplateError, UsageError

#: `--chat-template none`: the instruction is the prompt.
NO_TEMPLATE = "none"

#: Endings of a rendered prompt after which the model would first think, and what closes that part.
_OPEN_ENDINGS = (
    ("<think>", "\n\n</think>\n\n"),
    ("<thinking>", "\n</thinking>\n\n"),
    ("[THINK]", "[/THINK]"),
    ("<|start|>assistant", "<|channel|>final<|message|>"),
)


@dataclass(frozen=True, slots=True)
class ChatRenderer:
    """Renders one instruction as the chat prompt whose last token the answer follows.

    `template` is a Jinja chat template, None for the tokenizer's own, or `NO_TEMPLATE`. `system` is an optional
    system prompt.
    """

    tokenizer: Any
    template: str | None = None
    system: str | None = None

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
        """The chat prompt as text, thinking closed."""
        if self.template == NO_TEMPLATE:
            return instruction
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": instruction})
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        if self.template is not None:
            options["chat_template"] = self.template
        try:
            # Templates name the switch differently; one that knows neither ignores both.
            text = self.tokenizer.apply_chat_template(messages, enable_thinking=False, thinking=False, **options)
        except Exception as error:  # jinja2 errors, and whatever a template raises on purpose
            reason = " ".join(str(error).split())[:200]
            raise ChatTemplateError(f"the chat template cannot render a prompt ({reason})") from error
        return _close_thinking(str(text))

    def encode(self, instructions: Iterable[str]) -> list[list[int]]:
        """Token ids of each rendered prompt. A template writes its own BOS, so none is added to it."""
        texts = [self.render(instruction) for instruction in instructions]
        if not texts:
            return []
        special = self.template == NO_TEMPLATE
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=special, padding=False)["input_ids"]
        for text, tokens in zip(texts, ids, strict=True):
            if not tokens:
                raise ChatTemplateError(f"the prompt {text!r} has no tokens; give longer prompts")
        return ids


def _close_thinking(text: str) -> str:
    stripped = text.rstrip()
    for opening, closing in _OPEN_ENDINGS:
        if stripped.endswith(opening):
            return stripped + closing
    return text


def read_template(option: str | None) -> str | None:
    """The value of `--chat-template`: None, 'none', or the text of a file."""
    if option is None or option == NO_TEMPLATE:
        return option
    path = Path(option).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--chat-template {option}: expected a readable Jinja file or 'none', found {type(error).__name__}"
        ) from error


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
