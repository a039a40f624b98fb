"""Batched greedy completions that stop early: a row leaves the batch at its end of turn.

Written here rather than called from `transformers.generate` for two savings that evaluation on a CPU lives by: the
template's prefix is computed once for all prompts, and finished rows cost nothing more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.inference import (
    BatchSize,
    Encoded,
    SharedPrefix,
    cached,
    close,
    cut_head,
    in_batches,
    input_device,
    is_out_of_memory,
    new_cache,
    require_finite,
)

#: Ends of turn that some tokenizers do not declare as their end of sequence.
_END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
    "<|END_OF_TURN_TOKEN|>",
)

#: What configurations call the number of tokens that (some) layers look back at.
_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")

#: Finished rows are taken out of the batch when they are this share of it (moving the cache is not free).
_COMPACT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Reply:
    """A completion: its tokens without the end of turn, their text, and whether the model ended it itself."""

    tokens: tuple[int, ...]
    text: str
    ended: bool


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Encoded,
    max_new_tokens: int,
    size: BatchSize,
    progress: Callable[[int], None] | None = None,
) -> list[Reply]:
    """Greedy replies of at most `max_new_tokens` tokens, in the order of `prompts`."""
    shared = SharedPrefix(model, prompts.prefix)
    how = _how_to_step(model, prompts.prefix + prompts.suffixes[0])
    ends = end_tokens(model, tokenizer)
    replies: list[Reply | None] = [None] * len(prompts)
    lengths = [len(s) for s in prompts.suffixes]

    def work(rows: list[int]) -> None:
        suffixes = [prompts.suffixes[row] for row in rows]
        whole = how is _Steps.WHOLE
        batch = _WholeBatch(model, prompts.prefix, suffixes) if whole else _Batch(model, shared, suffixes)
        for row, tokens in zip(rows, batch.run(max_new_tokens, ends), strict=True):
            kept = tuple(t for t in tokens if t not in ends)
            text = tokenizer.decode(list(kept), skip_special_tokens=True)
            replies[row] = Reply(kept, text, len(kept) < len(tokens))

    # A decoding step costs little per row, so the batch is bounded by rows and not by prompt tokens.
    rows = BatchSize(size.rows, size.rows * max(lengths))
    equal_lengths = how is not _Steps.PADDED or _padding_matters(model, prompts, max_new_tokens)
    in_batches(lengths, rows, work, done=progress, equal_lengths=equal_lengths)
    size.rows = min(size.rows, rows.rows)  # what did not fit will not fit next time either
    return [reply for reply in replies if reply is not None]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids of all tokens that end an answer."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends = set(declared if isinstance(declared, list) else [declared]) | {tokenizer.eos_token_id}
    ends |= {tokenizer.convert_tokens_to_ids(t) for t in _END_OF_TURN if t in tokenizer.all_special_tokens}
    return frozenset(int(end) for end in ends if end is not None)


def _padding_matters(model: Any, prompts: Encoded, max_new_tokens: int) -> bool:
    """Whether padding in front of a prompt changes its reply although it is masked.

    It does where distances are counted in the cache and not by `position_ids`: in a sliding or local window that is
    shorter than prompt and reply, and in ALiBi of models that take no positions; and in recurrent layers.
    """
    config = model.config.get_text_config()
    windows = [window for name in _WINDOWS if isinstance(window := getattr(config, name, None), int)]
    longest = len(prompts.prefix) + max(len(s) for s in prompts.suffixes) + max_new_tokens
    return not _takes_positions(model) or _recurrent(model) or any(longest > window for window in windows)


def _recurrent(model: Any) -> bool:
    """Whether some layers carry a state from token to token, into which masked ones may leak."""
    layers = getattr(new_cache(model), "layers", [])
    return bool(getattr(model, "_is_stateful", False)) or any("Linear" in type(layer).__name__ for layer in layers)


class _Steps(Enum):
    """How replies can be continued token by token."""

    PADDED = auto()  # from a cache, prompts of several lengths together
    EQUAL = auto()  # from a cache, prompts of one length together
    WHOLE = auto()  # without a cache


#: What was found out about models so far.
_STEPS: WeakKeyDictionary[Any, _Steps] = WeakKeyDictionary()


def _how_to_step(model: Any, prompt: tuple[int, ...]) -> _Steps:
    """The fastest way whose logits are those of whole passes, tried out: not all models take caches and masks alike."""
    if model not in _STEPS:
        prompts = [prompt, prompt[len(prompt) // 2 :]]
        expected = [_whole(model, (*some, some[-1])) for some in prompts]
        ways = ((_Steps.PADDED, prompts), (_Steps.EQUAL, prompts[:1]))
        works = (how for how, some in ways if _steps_agree(model, some, expected[: len(some)]))
        _STEPS[model] = next(works, _Steps.WHOLE)
    return _STEPS[model]


def _steps_agree(model: Any, prompts: list[tuple[int, ...]], expected: list[Float[Tensor, " vocab"]]) -> bool:
    try:
        batch = _Batch(model, SharedPrefix(model, ()), prompts)
        batch.forward(batch.ids)
        step = batch.forward(batch.ids[:, -1:]).float()
    except (RuntimeError, AttributeError, ValueError, IndexError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return all(close(model, found, wanted) for found, wanted in zip(step, expected, strict=True))


def _whole(model: Any, tokens: tuple[int, ...]) -> Float[Tensor, " vocab"]:
    with torch.inference_mode():
        ids = torch.tensor([tokens], device=input_device(model))
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    return logits


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


class _Batch:
    """One batch of prompts being continued: [prefix | padding | prompt | reply] with the padding masked."""

    def __init__(self, model: Any, shared: SharedPrefix, suffixes: list[tuple[int, ...]]) -> None:
        self.model = model
        device = input_device(model)
        width = max(len(s) for s in suffixes)
        self.ids = torch.tensor([[s[0]] * (width - len(s)) + list(s) for s in suffixes], device=device)
        real = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in suffixes], device=device)
        self.mask = torch.cat([real.new_ones(len(suffixes), shared.length), real], dim=1)
        self.cache = shared.cache(len(suffixes))
        self.takes_positions = _takes_positions(model)
        layers = getattr(self.cache, "layers", [])
        self.can_compact = all(hasattr(layer, "batch_select_indices") for layer in layers)

    def run(self, max_new_tokens: int, ends: frozenset[int]) -> list[list[int]]:
        """Tokens of every row, the end of turn included where it came."""
        replies: list[list[int]] = [[] for _ in range(len(self.ids))]
        alive = list(range(len(self.ids)))
        fresh = self.ids
        for _ in range(max_new_tokens):
            chosen = self._step(fresh)
            for row, token in zip(alive, chosen.tolist(), strict=True):
                if not replies[row] or replies[row][-1] not in ends:
                    replies[row].append(token)
            going = [i for i, row in enumerate(alive) if replies[row][-1] not in ends]
            if not going:
                break
            fresh = chosen[:, None]
            if self.can_compact and len(alive) - len(going) >= _COMPACT_SHARE * len(alive):
                alive, fresh = [alive[i] for i in going], self._compact(going, fresh)
        return replies

    def _step(self, fresh: Int[Tensor, "b s"]) -> Int[Tensor, " b"]:
        best, chosen = self.forward(fresh).max(-1)
        require_finite(best)
        next_tokens: Tensor = chosen.to(fresh.device)
        return next_tokens

    def forward(self, fresh: Int[Tensor, "b s"]) -> Float[Tensor, "b vocab"]:
        """Logits after the `fresh` tokens."""
        if fresh is not self.ids:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(fresh), fresh.shape[1])], dim=1)
        options: dict[str, Any] = {}
        if self.takes_positions:
            options["position_ids"] = (self.mask.cumsum(-1) - 1).clamp_min(0)[:, -fresh.shape[1] :]
        last = torch.full((len(fresh), 1), fresh.shape[1] - 1, device=fresh.device)
        with cut_head(self.model, last), torch.inference_mode():
            out = self.model(input_ids=fresh, attention_mask=self.mask, **cached(self.model, self.cache), **options)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _compact(self, going: list[int], fresh: Int[Tensor, "b s"]) -> Int[Tensor, "c s"]:
        index = torch.tensor(going, device=fresh.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        return fresh[index]


class _WholeBatch(_Batch):
    """Prompts of one length continued without a cache: every step runs all tokens. Slow, and right for any model."""

    def __init__(self, model: Any, prefix: tuple[int, ...], suffixes: list[tuple[int, ...]]) -> None:
        self.model = model
        self.ids = torch.tensor([prefix + suffix for suffix in suffixes], device=input_device(model))
        self.all = self.ids[:, :0]
        self.can_compact = True

    def forward(self, fresh: Int[Tensor, "b s"]) -> Float[Tensor, "b vocab"]:
        """Logits after the `fresh` tokens."""
        self.all = torch.cat([self.all, fresh], dim=1)
        last = torch.full((len(fresh), 1), self.all.shape[1] - 1, device=fresh.device)
        with cut_head(self.model, last), torch.inference_mode():
            logits: Tensor = self.model(input_ids=self.all, use_cache=False).logits[:, -1]
        return logits

    def _compact(self, going: list[int], fresh: Int[Tensor, "b s"]) -> Int[Tensor, "c s"]:
        index = torch.tensor(going, device=fresh.device)
        self.all = self.all[index]
        return fresh[index]
