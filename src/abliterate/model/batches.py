"""Forward passes that compute each token once: shared prefixes, right padding, batches that fit memory.

All prompts rendered with one chat template start with the same tokens. Their keys and values are computed once and
reused. What differs is padded on the *right*: under a causal mask no real token can attend to what follows it, so
padding cannot change a result and no attention mask is needed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from abliterate.errors import ModelError, NumericalError
from abliterate.model._compat import cache_name
from abliterate.model.context import check_fits
from abliterate.model.offloaded import device_of, is_offloaded
from abliterate.model.placement import Needs, free_memory, needs_of
from abliterate.monitor import ranks
from abliterate.prompts.rendering import common_prefix

_Key = TypeVar("_Key")

#: From which token of each row on the pass under way predicts a reply; None where nobody said.
_REPLIES: ContextVar[Tensor | None] = ContextVar("replies", default=None)

#: Bytes of float32 logits that may be alive at once where many tokens' are asked for.
_LOGIT_BYTES = 96 << 20
#: Prompts at once where weights are offloaded and memory would hold more.
_MOST_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompts, the part that all share taken out in front."""

    prefix: tuple[int, ...]
    suffixes: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.suffixes)

    def take(self, rows: Sequence[int]) -> Encoded:
        """The prompts at `rows`, with the same prefix."""
        return Encoded(self.prefix, tuple(self.suffixes[row] for row in rows))

    def __add__(self, other: Encoded) -> Encoded:
        """Both sets of prompts one after the other; they must share the prefix."""
        if self.prefix != other.prefix:
            raise ValueError("cannot join prompts with different prefixes")
        return Encoded(self.prefix, self.suffixes + other.suffixes)


def share_prefix(sequences: Sequence[Sequence[int]], *, keep: int = 1, share: bool = True) -> Encoded:
    """Split off the prefix that all `sequences` share, leaving each at least its last `keep` tokens."""
    length = min(common_prefix(sequences), min(map(len, sequences)) - keep) if share else 0
    length = max(length, 0)
    return Encoded(tuple(sequences[0][:length]), tuple(tuple(s[length:]) for s in sequences))


def share_prefixes(
    groups: Mapping[_Key, Sequence[Sequence[int]]], *, keep: int = 1, share: bool = True
) -> dict[_Key, Encoded]:
    """Groups of sequences, each with the prefix that the sequences of all groups share."""
    shared, start = share_prefix([ids for group in groups.values() for ids in group], keep=keep, share=share), 0
    encoded = {}
    for key, group in groups.items():
        encoded[key] = shared.take(range(start, start + len(group)))
        start += len(group)
    return encoded


class SharedPrefix:
    """Keys and values of the shared prefix, computed under the hooks that are active *now*.

    An intervention changes them like any other activation: make a new one inside each intervention. `copies` rows
    are run, for interventions that do something else in each; a batch must then come copy by copy.
    """

    def __init__(self, model: Any, prefix: Sequence[int], copies: int = 1, *, grad: bool = False) -> None:
        """Run `prefix` through `model` once (nothing is run for an empty prefix). With `grad`, what is computed
        from it can be differentiated; it then serves one batch only.
        """
        self.length = len(prefix)
        self.copies = copies
        self.grad = grad
        self._model = model
        self._cache: Any = None
        if prefix:
            self._cache = new_cache(model)
            ids = torch.tensor([list(prefix)] * copies, device=input_device(model))
            nothing = torch.full((copies,), len(prefix))
            with differentiable(grad), replies_from(nothing):
                body(model)(input_ids=ids, **cached(model, self._cache))

    def options(self, rows: int) -> dict[str, Any]:
        """What a forward pass of `rows` rows (a multiple of `copies`) is told: to go on from the prefix, if any."""
        return cached(self._model, self.cache(rows)) if self.length else {"use_cache": False}

    def cache(self, rows: int) -> Any:
        """A fresh cache of the prefix for a batch of `rows` rows (a multiple of `copies`)."""
        if self._cache is None:
            return new_cache(self._model)
        cache = self._cache if self.grad else copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows // self.copies)
        return cache


def new_cache(model: Any) -> Any:
    """An empty key/value cache of the kind the model's layers want (full or sliding attention)."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` under the name by which the model takes it."""
    return {cache_name(model): cache, "use_cache": True}


def body(model: Any) -> Any:
    """The model without its language-model head."""
    return model.base_model


def input_device(model: Any) -> torch.device:
    """Where token ids go, also when the model is spread over devices."""
    return device_of(model.get_input_embeddings())


def right_padded(
    suffixes: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "b s"], Int[Tensor, " b"]]:
    """Token ids [b, longest] and the number of real tokens of each row [b]."""
    lengths = torch.tensor([len(s) for s in suffixes], device=device)
    width = max(map(len, suffixes))
    rows = [[*s, *([s[-1]] * (width - len(s)))] for s in suffixes]  # any token will do: nothing looks at it
    return torch.tensor(rows, device=device), lengths


def forward(model: Any, shared: SharedPrefix, suffixes: Sequence[Sequence[int]]) -> Int[Tensor, " b"]:
    """Run the body of the model over one batch, for hooks to look at; returns the rows' lengths."""
    check_fits(model, shared.length + max(map(len, suffixes)))
    ids, lengths = right_padded(suffixes, input_device(model))
    with torch.inference_mode(), replies_from(lengths - 1):
        body(model)(input_ids=ids, **shared.options(len(suffixes)))
    return lengths


def logits_at(
    model: Any,
    shared: SharedPrefix,
    suffixes: Sequence[Sequence[int]],
    positions: Callable[[Int[Tensor, " b"]], Int[Tensor, "b p"]],
) -> Float[Tensor, "b p vocab"]:
    """Logits in float32 at `positions(lengths)` (indices into the suffixes), and nowhere else."""
    check_fits(model, shared.length + max(map(len, suffixes)))
    ids, lengths = right_padded(suffixes, input_device(model))
    with cut_head(model, positions(lengths)), differentiable(shared.grad):
        out = model(input_ids=ids, **shared.options(len(suffixes)))
    logits: Tensor = out.logits.float()
    require_finite(logits.detach().amax(-1))
    return logits


def differentiable(grad: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients on, or all that is only for them off."""
    return torch.enable_grad() if grad else torch.inference_mode()


def require_finite(best: Float[Tensor, "*n"]) -> None:
    """Raise `NumericalError` unless the largest logits of some rows (NaN where one is NaN) are finite."""
    if not bool(torch.isfinite(best).all()):
        raise NumericalError(
            "logits: expected finite numbers, found NaN or infinity; is the model damaged? else try --dtype float32"
        )


@contextlib.contextmanager
def replies_from(start: Int[Tensor, " b"]) -> Iterator[None]:
    """Say, of the passes inside, from which token of each row on they predict a reply: the prompt's last, or later."""
    token = _REPLIES.set(start)
    try:
        yield
    finally:
        _REPLIES.reset(token)


def predicting(hidden: Float[Tensor, "b s d"]) -> Bool[Tensor, "b s 1"]:
    """Which tokens of the pass under way predict a token of a reply; the last ones where nobody said.

    Whoever generates one token after the other from a cache (`generate` of transformers too) need not say it.
    """
    rows, width = hidden.shape[:2]
    start = _REPLIES.get()
    if start is None:
        start = torch.full((rows,), width - 1)
    return (torch.arange(width, device=hidden.device) >= start.to(hidden.device)[:, None])[..., None]


def ends(rows: int, width: int) -> Int[Tensor, " b"] | None:
    """The last token of each row's prompt in the pass under way; None where it is before or after it (a prefix)."""
    start = _REPLIES.get()
    return start if start is not None and len(start) == rows and bool((start < width).all()) else None


@contextlib.contextmanager
def cut_head(model: Any, index: Int[Tensor, "b p"], start: Int[Tensor, " b"] | None = None) -> Iterator[None]:
    """Let the head see only the tokens at `index`; the first of them, or `start`, is the first that predicts a reply.

    Its input is cut down before it runs, so the model's own scaling and soft-capping still apply, but the vocabulary
    is multiplied only where it is asked for.
    """

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        return (hidden[rows, index.to(hidden.device)].contiguous(), *args[1:])

    said = index.amin(1) if start is None else start
    with hooked([model.get_output_embeddings().register_forward_pre_hook(pick)]), replies_from(said):
        yield


def can_share(model: Any, sequences: Sequence[Sequence[int]], keep: int = 1) -> bool:
    """Whether prompts may share their prefix's keys and values: tried out on a few, against each run by itself.

    States of recurrent layers cannot be copied to many rows by all versions of transformers. Where weights are
    offloaded nothing is shared: a prefix would be one more pass, and a pass costs more than its tokens; there only a
    short prompt is run by itself, and beside a long one.

    Raises `ModelError` when padding on the right changes a result even without sharing.
    """
    offloaded = is_offloaded(model)
    chosen = sorted({0, len(sequences) // 2, len(sequences) - 1})
    few = [min(sequences, key=len), max(sequences, key=len)] if offloaded else [sequences[row] for row in chosen]
    alone = [_alone(model, sequence) for sequence in few[: 1 if offloaded else None]]
    reason = ""
    for share in (False,) if offloaded else (True, False):
        encoded = share_prefix(few, keep=keep, share=share)
        try:
            together = last_logits(model, SharedPrefix(model, encoded.prefix), encoded.suffixes)
        except (RuntimeError, AttributeError, ValueError, IndexError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            reason = f"it cannot be run on several prompts ({' '.join(str(error).split())[:120]})"
            continue
        if all(close(model, a, b) for a, b in zip(together, alone, strict=False)):
            return share
        reason = "a prompt's logits change with what stands behind it"
    raise ModelError(f"{type(model).__name__}: {reason}; expected a causal model: it can be edited, not measured")


def _alone(model: Any, sequence: Sequence[int]) -> Float[Tensor, " vocab"]:
    with torch.inference_mode():
        ids = torch.tensor([list(sequence)], device=input_device(model))
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    require_finite(logits.amax(-1))
    return logits


def close(model: Any, a: Float[Tensor, " vocab"], b: Float[Tensor, " vocab"]) -> bool:
    """Whether two ways to compute logits agree as well as the model's dtype lets them."""
    exact = next(p.dtype for p in model.parameters() if p.is_floating_point()) in (torch.float32, torch.float64)
    return float((a - b).abs().max()) <= (2e-3 if exact else 0.25) * float(b.abs().max().clamp_min(1e-6))


def last_logits(model: Any, shared: SharedPrefix, suffixes: Sequence[Sequence[int]]) -> Float[Tensor, "b vocab"]:
    """Logits in float32 of the token after each prompt."""
    return logits_at(model, shared, suffixes, lambda lengths: lengths[:, None] - 1)[:, 0]


@dataclass(slots=True)
class BatchSize:
    """How many prompts at once: found from free memory, halved for good whenever memory runs out."""

    rows: int
    tokens: int = 1024
    halvings: int = field(default=0, init=False)

    def halve(self) -> bool:
        """Half as many from now on; False when there is nothing left to halve."""
        if self.rows <= 1:
            return False
        self.rows = max(1, self.rows // 2)
        self.tokens = max(1, self.tokens // 2)
        self.halvings += 1
        return True

    def agree(self) -> None:
        """The smallest that any of several processes has: what is done at once is done by all alike."""
        if ranks.between_passes():
            self.rows, self.tokens = ranks.least(self.rows), ranks.least(self.tokens)
            self.halvings = ranks.largest(self.halvings)


def logit_size(model: Any, size: BatchSize, positions: int) -> BatchSize:
    """`size` with so few rows that their float32 logits at `positions` tokens each stay below a bound."""
    vocabulary = model.config.get_text_config().vocab_size
    return BatchSize(min(size.rows, max(1, _LOGIT_BYTES // (4 * vocabulary * positions))), size.tokens)


def auto_batch_size(model: Any, requested: int | None = None) -> BatchSize:
    """Rows and tokens per batch that use at most a quarter of the memory that is free now.

    A row is taken to need 256 tokens' keys, values and activations and three float32 rows of the vocabulary.
    On a CPU more than about a thousand tokens at once gain nothing; a GPU takes sixteen times as many. Where weights
    are offloaded a pass costs their bytes, however few prompts go through: as many do as half of free memory holds.
    """
    device = input_device(model)
    if is_offloaded(model):
        return _largest_batch(model, device, requested)
    tokens = 1024 if device.type == "cpu" else 16384
    if requested is not None:
        return BatchSize(requested, max(tokens, requested * 64))
    config = model.config.get_text_config()
    per_token = 4 * config.hidden_size * (config.num_hidden_layers + 16)
    per_row = 256 * per_token + 12 * config.vocab_size
    rows = 128 if device.type == "cpu" else 256
    while rows > 1 and rows * per_row > free_memory(device) / 4:
        rows //= 2
    return BatchSize(rows, tokens)


def _largest_batch(model: Any, device: torch.device, requested: int | None) -> BatchSize:
    """The batch that half of the free memory holds. Nothing is shared there, so keys and values are not kept."""
    needs, budget = _needs(model), free_memory(device) // 2
    rows = min(_MOST_ROWS, max(1, budget // (2 * needs.row)))
    return BatchSize(rows if requested is None else requested, max(1, budget // (2 * needs.activations)))


def rows_with_cache(model: Any, size: BatchSize, tokens: int) -> int:
    """At most `size.rows`: as many rows of so many tokens as half of the free memory holds with keys and values."""
    if not is_offloaded(model):
        return size.rows
    needs = _needs(model)
    return max(1, min(size.rows, free_memory(input_device(model)) // 2 // (tokens * needs.cache + needs.row)))


def _needs(model: Any) -> Needs:
    return needs_of(model.config, 0, next(p.dtype.itemsize for p in model.parameters() if p.is_floating_point()))


def in_batches(
    lengths: Sequence[int],
    size: BatchSize,
    work: Callable[[list[int]], None],
    *,
    into: Sequence[Tensor | ranks.Merged] | None = None,
    done: Callable[[int], None] | None = None,
    equal_lengths: bool = False,
    copies: int = 1,
) -> None:
    """Call `work(rows)` on batches of prompts of similar length until all are done, halving when memory runs out.

    `work` must have no effect when it fails for lack of memory: it is called again with fewer rows. With
    `equal_lengths` no batch needs padding. `copies` says how often `work` runs each prompt at once. `into` is all that
    `work` puts its results into, so that several processes can divide the prompts (see `ranks.one_pass`).
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    with ranks.one_pass(order, into) as mine:
        _in_batches(lengths, list(mine), size, work, done, equal_lengths=equal_lengths, copies=copies)
    if done is not None and len(mine) < len(order):
        done(len(order) - len(mine))  # the others' part
    size.agree()


def _in_batches(
    lengths: Sequence[int],
    waiting: list[int],
    size: BatchSize,
    work: Callable[[list[int]], None],
    done: Callable[[int], None] | None,
    *,
    equal_lengths: bool,
    copies: int,
) -> None:
    while waiting:
        rows = waiting[: _fitting(lengths, waiting, size, equal_lengths, copies)]
        try:
            work(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or ranks.lockstep() or len(rows) == 1 or not size.halve():
                raise
            error.__traceback__ = None  # its frames hold the tensors that did not fit
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        del waiting[: len(rows)]
        if done is not None:
            done(len(rows))


def _fitting(lengths: Sequence[int], waiting: Sequence[int], size: BatchSize, equal_lengths: bool, copies: int) -> int:
    count = max(1, min(size.rows // copies, len(waiting)))
    if equal_lengths:
        shortest = lengths[waiting[0]]
        count = sum(lengths[row] == shortest for row in waiting[:count])
    while count > 1 and count * copies * lengths[waiting[count - 1]] > size.tokens:
        count -= 1
    return count


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch (CUDA or CPU allocator) or Python means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


@contextlib.contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove `handles` (already registered hooks) at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_output(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that changes what a module gives: its tensor, or the first of several."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return hook
