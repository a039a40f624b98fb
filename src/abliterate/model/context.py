"""How many positions a model has, and whether prompts and replies stay within them.

Of learnt positions (a table with a row for each, as GPT-2 has) there are no more: a longer text ends in an index
error, on a GPU in one that takes the process along. Such texts are refused by name before anything is run. Rotary and
other computed positions go on beyond the number that the configuration gives, but the model was not trained there: that
is said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from abliterate.errors import UsageError

#: What tables of positions are called.
_TABLE = re.compile(r"(?:^|[._])(?:wpe|pos|position|positions|positional)(?:[._]|$)")
#: Rows that tables may have beside those that count (OPT's first two).
_SPARE = 8


@dataclass(frozen=True, slots=True)
class Context:
    """The number of positions, None where the configuration says none; `learnt` ones have an end."""

    positions: int | None
    learnt: bool


_KNOWN: WeakKeyDictionary[Any, Context] = WeakKeyDictionary()


def context_of(model: Any) -> Context:
    """The context of a live model, from its configuration and its tables."""
    if model not in _KNOWN:
        number = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        positions = number if isinstance(number, int) and number > 0 else None
        _KNOWN[model] = Context(positions, positions is not None and _has_table(model, positions))
    return _KNOWN[model]


def _has_table(model: Any, positions: int) -> bool:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return any(
        _TABLE.search(name) and tensor.dim() > 1 and positions <= tensor.shape[0] <= positions + _SPARE
        for name, tensor in tensors
    )


def check_fits(model: Any, prompt: int, reply: int = 0) -> None:
    """Raise `UsageError` where a prompt of so many tokens with a reply of so many has no positions left."""
    context = context_of(model)
    if context.positions is None or not context.learnt or _needed(prompt, reply) <= context.positions:
        return
    found = f"a prompt of {prompt} tokens" + (f" and a reply of up to {reply}" if reply else "")
    raise UsageError(
        f"{type(model).__name__}: expected at most the {context.positions} positions that it has learnt, found "
        f"{found}; {_todo(context.positions, prompt, reply)}"
    )


def reply_room(model: Any, prompt: int, wanted: int) -> int:
    """How many of `wanted` tokens a reply can have behind a prompt of so many."""
    context = context_of(model)
    return wanted if context.positions is None or not context.learnt else min(wanted, context.positions - prompt + 1)


def beyond(model: Any, lengths: Sequence[int]) -> str:
    """What to say of texts of these lengths; "" where all stay within the positions that a model was trained on."""
    positions = context_of(model).positions
    over = [] if positions is None else [length for length in lengths if length > positions]
    if not over:
        return ""
    return (
        f"{len(over)} of {len(lengths)} prompts with their replies go beyond the {positions} positions that this model "
        f"was trained on (the longest has {max(over)} tokens): what is measured there means little"
    )


def _needed(prompt: int, reply: int) -> int:
    return prompt + max(0, reply - 1)  # nothing comes after the last token of a reply


def _todo(positions: int, prompt: int, reply: int) -> str:
    room = positions - prompt + 1
    if reply and room > 0:
        return f"give --max-new-tokens of at most {room}, or shorter prompts"
    return "leave such prompts out or shorten them"
