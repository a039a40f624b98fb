"""Batched completions that stop early: a row leaves the batch at its end of turn, or when enough of it is known.

Written here rather than called from `transformers.generate` for three savings that evaluation on a CPU lives by: the
template's prefix is computed once for all prompts, finished rows cost nothing more, and a reply can be left as soon
as what is asked about it is settled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.model._compat import takes_positions
from abliterate.model.batches import (
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
    replies_from,
    require_finite,
    rows_with_cache,
)
from abliterate.model.context import check_fits
from abliterate.model.decoding import GREEDY, Chooser, Decoding, Settled
from abliterate.model.offloaded import is_spread
from abliterate.monitor import ranks

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

#: After every so many tokens it is asked which replies are settled.
_LOOK_EVERY = 8


@dataclass(frozen=True, slots=True)
class Reply:
    """A completion: its tokens without the end of turn, their text, and whether the model ended it itself.

    `stopped` replies were left early because they were settled; those neither ended nor stopped were cut at the limit.
    """

    tokens: tuple[int, ...]
    text: str
    ended: bool
    stopped: bool = False


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Encoded,
    max_new_tokens: int,
    size: BatchSize,
    progress: Callable[[int], None] | None = None,
    decoding: Decoding = GREEDY,
) -> list[Reply]:
    """Replies of at most `max_new_tokens` tokens, in the order of `prompts`, decoded as `decoding` says.

    Every few tokens `decoding.settled` is shown the replies that still run: the rows of their prompts and their texts
    so far, which may end within a word. Those it says True of are left there. The tokens of all other replies, and of
    these until then, are the same as without it.

    Raises `UsageError` where a prompt and its reply have not enough positions (`context.check_fits`).
    """
    lengths = [len(s) for s in prompts.suffixes]
    check_fits(model, len(prompts.prefix) + max(lengths), max_new_tokens)
    shared = SharedPrefix(model, prompts.prefix)
    how = _how_to_step(model, prompts.prefix + prompts.suffixes[0])
    ends = end_tokens(model, tokenizer)
    replies = _Replies(tokenizer)

    def work(rows: list[int]) -> None:
        suffixes = [prompts.suffixes[row] for row in rows]
        whole = how is _Steps.WHOLE
        batch = _WholeBatch(model, prompts.prefix, suffixes) if whole else _Batch(model, shared, suffixes)
        chooser = Chooser(decoding, [prompts.prefix + suffix for suffix in suffixes], max_new_tokens, ends)
        found = batch.run(max_new_tokens, ends, chooser, _watch(tokenizer, rows, decoding.settled))
        for row, tokens, stopped in zip(rows, found.tokens, found.stopped, strict=True):
            kept = tuple(t for t in tokens if t not in ends)
            replies.keep(row, kept, ended=len(kept) < len(tokens), stopped=stopped)

    # A decoding step costs little per row, so the batch is bounded by rows and not by prompt tokens.
    most = rows_with_cache(model, size, len(prompts.prefix) + max(lengths) + max_new_tokens)
    rows = BatchSize(most, most * max(lengths))
    padded = how is _Steps.PADDED and not decoding.counts_tokens
    equal_lengths = not padded or _padding_matters(model, prompts, max_new_tokens)
    in_batches(lengths, rows, work, into=[replies], done=progress, equal_lengths=equal_lengths)
    if rows.halvings:
        size.rows = min(size.rows, rows.rows)  # what did not fit will not fit next time either
    return [replies.by_row[row] for row in range(len(prompts))]


@dataclass(slots=True)
class _Replies:
    """Replies by the row of their prompt."""

    tokenizer: Any
    by_row: dict[int, Reply] = field(default_factory=dict)

    def keep(self, row: int, tokens: Sequence[int], *, ended: bool, stopped: bool) -> None:
        """Take in the reply to one prompt, by its tokens without the end of turn."""
        self.by_row[row] = Reply(tuple(tokens), reply_text(self.tokenizer, tokens), ended, stopped)

    def merge(self) -> None:
        """Take in the replies that other processes have made."""
        own, longest = self.by_row, ranks.largest(max((len(reply.tokens) for reply in self.by_row.values()), default=0))
        table = torch.zeros(len(own), 4 + longest, dtype=torch.int64)
        for line, (row, reply) in zip(table, own.items(), strict=True):
            found = (row, reply.ended, reply.stopped, len(reply.tokens), *reply.tokens)
            line[: len(found)] = torch.tensor(found)
        for row, ended, stopped, length, *tokens in ranks.joined(table).tolist():
            if row not in own:
                self.keep(row, tokens[:length], ended=bool(ended), stopped=bool(stopped))


def reply_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of a reply's tokens."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text


def _watch(tokenizer: Any, rows: Sequence[int], settled: Settled | None) -> _Watch | None:
    """`settled` for a batch of the prompts at `rows`: the batch's rows and their tokens → which to leave."""
    if settled is None:
        return None

    def watch(running: Mapping[int, Sequence[int]]) -> set[int]:
        texts = [reply_text(tokenizer, tokens) for tokens in running.values()]
        decided = settled([rows[i] for i in running], texts)
        return {i for i, leave in zip(running, decided, strict=True) if leave}

    return watch


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids of all tokens that end an answer."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends = set(declared if isinstance(declared, list) else [declared]) | {tokenizer.eos_token_id}
    special = set(tokenizer.all_special_tokens)
    # Where replies come in channels (gpt-oss) this one ends the thinking, not the turn.
    usual = [t for t in _END_OF_TURN if t in special and not (t == "<|end|>" and "<|channel|>" in special)]
    ends |= {tokenizer.convert_tokens_to_ids(t) for t in usual}
    return frozenset(int(end) for end in ends if end is not None)


def _padding_matters(model: Any, prompts: Encoded, max_new_tokens: int) -> bool:
    """Whether padding in front of a prompt changes its reply although it is masked.

    It does where distances are counted in the cache and not by `position_ids`: in a sliding or local window that is
    shorter than prompt and reply, and in ALiBi of models that take no positions; and in recurrent layers.
    """
    config = model.config.get_text_config()
    windows = [window for name in _WINDOWS if isinstance(window := getattr(config, name, None), int)]
    longest = len(prompts.prefix) + max(len(s) for s in prompts.suffixes) + max_new_tokens
    return not takes_positions(model) or _recurrent(model) or any(longest > window for window in windows)


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
    """Logits after `tokens`, of which the last is the reply's first."""
    with torch.inference_mode(), replies_from(torch.tensor([len(tokens) - 2])):
        ids = torch.tensor([tokens], device=input_device(model))
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    return logits


_Watch = Callable[[Mapping[int, Sequence[int]]], set[int]]


@dataclass(frozen=True, slots=True)
class _Found:
    """Tokens of every row of a batch, the end of turn included where it came, and which rows were left early."""

    tokens: list[list[int]]
    stopped: list[bool]


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
        self.takes_positions = takes_positions(model)
        self.spread = is_spread(model)
        layers = getattr(self.cache, "layers", [])
        self.can_compact = all(hasattr(layer, "batch_select_indices") for layer in layers)

    def run(self, max_new_tokens: int, ends: frozenset[int], chooser: Chooser, watch: _Watch | None = None) -> _Found:
        """Continue every row to its end of turn, until `watch` leaves it, or to `max_new_tokens`."""
        alive = list(range(len(self.ids)))
        replies: list[list[int]] = [[] for _ in alive]
        running, stopped = dict(enumerate(replies)), [False] * len(alive)
        fresh = self.ids
        for count in range(1, max_new_tokens + 1):
            chosen = self._step(fresh, chooser)
            for row, token in zip(alive, chosen.tolist(), strict=True):
                if row in running:
                    running[row].append(token)
                    if token in ends:
                        del running[row]
            if watch is not None and running and count % _LOOK_EVERY == 0 and count < max_new_tokens:
                for row in watch(running):
                    stopped[row] = True
                    del running[row]
            if not running:
                break
            fresh = chosen[:, None]
            if self.can_compact and len(alive) - len(running) >= _COMPACT_SHARE * len(alive):
                going = torch.tensor([i for i, row in enumerate(alive) if row in running], device=fresh.device)
                fresh = self._compact(going, fresh)
                chooser.keep(going)
                alive = list(running)
        return _Found(replies, stopped)

    def _step(self, fresh: Int[Tensor, "b s"], chooser: Chooser) -> Int[Tensor, " b"]:
        best, chosen = chooser.choose(self.forward(fresh))
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

    def _compact(self, going: Int[Tensor, " c"], fresh: Int[Tensor, "b s"]) -> Int[Tensor, "c s"]:
        self.cache.batch_select_indices(going.cpu() if self.spread else going)  # each layer's keys are where it is
        self.mask = self.mask[going]
        return fresh[going]


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
        start = torch.full((len(fresh),), self.ids.shape[1] - 1, device=fresh.device)
        with cut_head(self.model, last, start), torch.inference_mode():
            logits: Tensor = self.model(input_ids=self.all, use_cache=False).logits[:, -1]
        return logits

    def _compact(self, going: Int[Tensor, " c"], fresh: Int[Tensor, "b s"]) -> Int[Tensor, "c s"]:
        self.all = self.all[going]
        return fresh[going]
