"""Layers below the first edited one are not computed again.

Nothing below block `first` depends on an edit of later writers: the residual stream that enters that block is the same
in every trial. It is kept per prompt, and later forward passes start there.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.errors import AbliterateError
from abliterate.model.anatomy import Anatomy, Writer
from abliterate.model.batches import Encoded, SharedPrefix, close, hooked, last_logits

Tokens = tuple[int, ...]

#: Attribute of a cache, copied with it: the tokens whose keys and values it holds in every layer.
_HOLDS = "_holds_tokens"


def lowest_block(writers: Iterable[Writer]) -> int:
    """The block of the first of some writers; 0 when one stands in front of all blocks."""
    return min((writer.block or 0 for writer in writers), default=0)


@dataclass(slots=True)
class _Pass:
    """A forward pass of rows that may be kept: for each row the tokens before it and its own, without padding.

    It is the pass of a shared prefix when `opens` is set: its keys and values are wanted later.
    """

    keys: list[tuple[Tokens, Tokens]]
    width: int
    cache: Any
    opens: bool
    replayed: bool = False

    @property
    def tokens(self) -> Tokens:
        """The first row's own tokens: those of all rows when it opens."""
        return self.keys[0][1]


class LowerLayers:
    """What enters block `first`, kept for every prompt from the first time that it is run (`skipping`).

    States are constants: nothing below `first` is differentiated. Gradients, hooks on later blocks and `copies` of
    rows work as without. One object holds states of one model as it is: make a new one when the lower blocks or the
    embeddings change, and use one at a time. `computed` and `replayed` count forward passes.
    """

    def __init__(self, model: Any, anatomy: Anatomy, first: int, *, limit_bytes: int = 1 << 30) -> None:
        """`first` is the lowest edited block (0: there is nothing to save). Beyond `limit_bytes`, on the devices of
        the stream, rows are computed each time.
        """
        self.first = min(first, len(anatomy.blocks) - 1)
        self.limit_bytes = limit_bytes
        self.held_bytes = self.computed = self.replayed = 0
        blocks = [model.get_submodule(name) for name in anatomy.blocks[: self.first + 1]]
        self._lower, self._block = blocks[:-1], blocks[-1]
        parts = anatomy.blocks[0].split(".")
        around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        self._around = {module: inspect.signature(module.forward) for module in around}
        self._returns: list[type | None] = [None] * self.first
        self._extras = [0] * self.first
        self._known: dict[Tokens, dict[Tokens, set[int]]] = defaultdict(lambda: defaultdict(set))
        self._states: dict[tuple[Tokens, Tokens], Tensor] = {}
        self._caches: dict[Tokens, list[Any]] = {}
        self._forwards: list[Any] = []
        self._now: _Pass | None = None
        self._running: nn.Module | None = None

    @contextlib.contextmanager
    def skipping(self, *prompts: Encoded) -> Iterator[None]:
        """Inside, passes of `prompts` as `SharedPrefix`, `forward` and `logits_at` run them start at block `first`
        when all their rows are known, and make them known otherwise.

        Any other pass (other tokens, masks, caches from outside) is run whole. A row that goes on from one of
        `prompts` with repetitions of its last token is taken for that one, padded. What hooks on lower blocks do is
        not repeated: none may change the stream there, nor read it. Not to be nested on one model.
        """
        if not self.first:
            yield
            return
        for encoded in prompts:
            for suffix in encoded.suffixes:
                self._known[encoded.prefix][_without_run(suffix)].add(len(suffix))
        handles = [
            self._block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            *(module.register_forward_pre_hook(self._begin, with_kwargs=True) for module in self._around),
            *(module.register_forward_hook(self._end, always_call=True) for module in self._around),
        ]
        handles += [
            block.register_forward_hook(functools.partial(self._see, index), prepend=True)
            for index, block in enumerate(self._lower)
        ]
        try:
            with hooked(handles):
                yield
        finally:
            self._restore()

    # --- one forward pass

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running is not None:
            return  # what the caller said is what counts, not what models pass on to their parts
        self._running = module
        self._now = now = self._recognise(self._around[module].bind(*args, **kwargs).arguments)
        if now is None or not self._holds(now):
            self.computed += 1
            return
        now.replayed = True
        self.replayed += 1
        for block, kind, extras in zip(self._lower, self._returns, self._extras, strict=True):
            self._forwards.append(vars(block).get("forward"))
            block.forward = functools.partial(_pass_on, kind, extras)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What block `first` gets: the kept states in place of the stream; or the stream, and it is kept."""
        now = self._now
        if now is None:
            return None
        if not now.replayed:
            self._keep(args[0] if args else kwargs["hidden_states"], now)
            return None
        if now.opens:  # only now: masks and positions were made from an empty cache
            now.cache.layers[: self.first] = _repeated(self._caches[now.tokens], len(now.keys))
        states = self._padded(now)
        return ((states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": states})

    def _end(self, module: nn.Module, _: Any, __: Any) -> None:
        if module is not self._running:
            return
        now = self._now
        self._restore()
        if now is None or now.cache is None:
            return
        setattr(now.cache, _HOLDS, now.tokens if now.opens else None)
        if now.replayed and not now.opens:
            now.cache.layers[: self.first] = [_Missing()] * self.first

    def _restore(self) -> None:
        for block, forward in zip(self._lower, self._forwards, strict=False):
            del block.forward
            if forward is not None:
                block.forward = forward
        self._forwards, self._now, self._running = [], None, None

    def _see(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        """Remember what a lower block gives beside the stream when it is really run."""
        if self._now is not None and not self._now.replayed:
            several = isinstance(output, tuple | list)
            self._returns[index] = type(output) if several else None
            self._extras[index] = len(output) - 1 if several else 0

    # --- what a pass is about

    def _recognise(self, arguments: dict[str, Any]) -> _Pass | None:
        """The pass about to be run, if it is one of known prompts and of nothing that changes lower layers."""
        given = dict(arguments)
        for name in [name for name, value in given.items() if isinstance(value, dict)]:
            given |= given.pop(name)  # **kwargs
        ids = given.pop("input_ids", None)
        caches = [given.pop(name, None) for name in ("past_key_values", "cache_params")]
        cache = next((value for value in caches if value is not None), None)
        odd = any(isinstance(value, Tensor) for value in given.values())
        odd = odd or any(given.get(name) for name in ("output_hidden_states", "output_attentions"))
        if odd or not isinstance(ids, Tensor) or (cache is None and given.get("use_cache") is not False):
            if cache is not None:
                setattr(cache, _HOLDS, None)  # it will hold tokens that are not known
            return None
        rows = [tuple(row) for row in ids.tolist()]
        return self._opening(rows, cache) or self._continuing(rows, cache)

    def _opening(self, rows: list[Tokens], cache: Any) -> _Pass | None:
        """The pass that fills an empty cache with a shared prefix."""
        if cache is None or len(set(rows)) > 1 or rows[0] not in self._known or _length(cache) != 0:
            return None
        return _Pass([((), row) for row in rows], len(rows[0]), cache, opens=True)

    def _continuing(self, rows: list[Tokens], cache: Any) -> _Pass | None:
        before = () if cache is None else getattr(cache, _HOLDS, None)
        if cache is not None:
            setattr(cache, _HOLDS, None)
        if before is None or (cache is not None and _length(cache) != len(before)):
            return None
        known = self._known.get(before, {})
        keys = []
        for row in rows:
            fitting = [length for length in known.get(_without_run(row), ()) if length <= len(row)]
            if not fitting:
                return None
            keys.append((before, row[: max(fitting)]))
        return _Pass(keys, len(rows[0]), cache, opens=False)

    # --- what is kept

    def _holds(self, now: _Pass) -> bool:
        return all(key in self._states for key in now.keys) and (not now.opens or now.tokens in self._caches)

    def _keep(self, stream: Float[Tensor, "b s *d"], now: _Pass) -> None:
        if stream.shape[:2] != (len(now.keys), now.width):
            return  # rows are not where they are looked for
        # What is made in inference mode could never take part in a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            for state, key in zip(stream.detach(), now.keys, strict=True):
                own = state[: len(key[1])]
                if key not in self._states and self._fits(own.nbytes):
                    self._states[key] = own.clone()
            if now.opens and now.tokens not in self._caches:
                layers = _first_row(now.cache.layers[: self.first])
                if self._fits(sum(tensor.nbytes for layer in layers for tensor in _tensors(layer))):
                    self._caches[now.tokens] = layers

    def _fits(self, size: int) -> bool:
        """Whether so many bytes may be kept too; they are counted then."""
        fits = self.held_bytes + size <= self.limit_bytes
        self.held_bytes += size * fits
        return fits

    def _padded(self, now: _Pass) -> Float[Tensor, "b s *d"]:
        """The kept states of a batch; those of padding are the last token's, since nothing looks at them."""
        states = [self._states[key] for key in now.keys]
        lengths = torch.tensor([len(state) for state in states])
        at = torch.arange(now.width).minimum(lengths[:, None] - 1) + (lengths.cumsum(0) - lengths)[:, None]
        return torch.cat(states)[at.to(states[0].device)]


class _Missing:
    """Stands in a cache for a layer that was not computed: whoever wants to go on from it is told."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("cache: a pass that skipped lower layers left it without their keys")


def _without_run(tokens: Sequence[int]) -> Tokens:
    """Tokens with the repetitions of the last one at the end left out."""
    end = len(tokens)
    while end > 1 and tokens[end - 2] == tokens[end - 1]:
        end -= 1
    return tuple(tokens[:end])


def _pass_on(kind: type | None, extras: int, *args: Any, **kwargs: Any) -> Any:
    """In place of a block's forward: the stream as it came, in the form in which the block gives it."""
    stream = args[0] if args else kwargs["hidden_states"]
    return stream if kind is None else kind((stream, *[None] * extras))


def _length(cache: Any) -> int | None:
    """How many tokens a cache holds, where it can say so."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return None


def _first_row(layers: Sequence[Any]) -> list[Any]:
    """Copies of a cache's layers with the first row alone."""
    copies = [_copy(layer) for layer in layers]
    for layer in copies:
        layer.batch_select_indices(torch.tensor([0]))
    return copies


def _repeated(layers: Sequence[Any], rows: int) -> list[Any]:
    copies = [_copy(layer) for layer in layers]
    for layer in copies:
        layer.batch_repeat_interleave(rows)
    return copies


def _copy(layer: Any) -> Any:
    """A copy of a cache's layer, of which nothing is differentiated."""
    return copy.deepcopy(layer, {id(tensor): tensor.detach().clone() for tensor in _tensors(layer)})


def _tensors(layer: Any) -> list[Tensor]:
    values = [v for value in vars(layer).values() for v in (value.values() if isinstance(value, dict) else (value,))]
    return [value for value in values if isinstance(value, Tensor)]


def usable(model: Any, anatomy: Anatomy, first: int, prompts: Encoded) -> bool:
    """Whether `LowerLayers` gives the logits of whole passes: tried out on a few prompts, in several batches.

    It does not where later blocks take more from earlier ones than the stream (shared keys, another state beside it),
    or where what a block is called with is not known here. Never raises.
    """
    few = prompts.take(sorted({0, len(prompts) // 2, len(prompts) - 1}))
    batches = [(few.suffixes, 1), (few.suffixes, 1), (few.suffixes[::-1], 2), (few.suffixes[:1], 1)]
    try:
        whole = [_logits(model, few.prefix, *batch) for batch in batches]
        lower = LowerLayers(model, anatomy, first)
        with lower.skipping(few):
            skipped = [_logits(model, few.prefix, *batch) for batch in batches]
    except (AbliterateError, RuntimeError, AttributeError, LookupError, TypeError, ValueError):
        return False
    passes = (1 + bool(few.prefix)) * len(batches[1:])
    same = all(_same(model, a, b) for a, b in zip(skipped[:2], whole[:2], strict=True))
    alike = all(close(model, a, b) for a, b in zip(skipped[2:], whole[2:], strict=True))
    return same and alike and lower.replayed == (passes if lower.first else 0)


def _logits(model: Any, prefix: Tokens, suffixes: Sequence[Tokens], copies: int) -> Float[Tensor, "b vocab"]:
    return last_logits(model, SharedPrefix(model, prefix, copies), [*suffixes] * copies)


def _same(model: Any, a: Float[Tensor, "b vocab"], b: Float[Tensor, "b vocab"]) -> bool:
    """Whether logits agree that come from the very same sums: the batch was the same."""
    exact = next(p.dtype for p in model.parameters() if p.is_floating_point()) in (torch.float32, torch.float64)
    return float((a - b).abs().max()) <= (1e-4 if exact else 0.02) * float(b.abs().max().clamp_min(1e-6))
