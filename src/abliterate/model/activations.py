"""Activations at sites of the residual stream, captured by hooks and reduced as they come.

Never `output_hidden_states`: its last entry is after the final norm, it keeps every token of every layer, and it has
been seen to give zeros beyond the first device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from abliterate.errors import NumericalError
from abliterate.model.anatomy import stream_out
from abliterate.model.batches import BatchSize, Encoded, SharedPrefix, forward, hooked, in_batches, last_logits
from abliterate.monitor import ranks

#: Takes layer, the rows' indices, and their activations [b, k, d] at positions -1, -2 … -k.
Consumer = Callable[[int, list[int], Float[Tensor, "b k d"]], None]
#: Says from the next-token logits of a batch's rows which of them are wanted.
Keep = Callable[[list[int], Float[Tensor, "b vocab"]], Bool[Tensor, " b"]]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of activations over prompts; axes: position (-1 first), layer 0..L, d_model."""

    count: int
    mean: Float[Tensor, "k sites d"]
    variance: Float[Tensor, "k sites d"]


@dataclass(slots=True)
class MomentsFitter:
    """Gathers float64 moments batch by batch (Chan, Golub & LeVeque 1979: merging means and sums of squares)."""

    positions: int
    sites: int
    d_model: int
    _count: list[int] = field(init=False)
    _mean: Tensor = field(init=False)
    _squares: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from nothing."""
        shape = (self.positions, self.sites, self.d_model)
        self._count = [0] * self.sites
        self._mean = torch.zeros(shape, dtype=torch.float64)
        self._squares = torch.zeros(shape, dtype=torch.float64)

    def update(self, layer: int, rows: list[int], values: Float[Tensor, "b k d"]) -> None:
        """Take in one batch of one layer."""
        batch = values.double()
        new, old = len(rows), self._count[layer]
        mean = batch.mean(0)
        delta = mean - self._mean[:, layer]
        self._mean[:, layer] += delta * (new / (old + new))
        self._squares[:, layer] += ((batch - mean) ** 2).sum(0) + delta**2 * (old * new / (old + new))
        self._count[layer] = old + new

    def merge(self) -> None:
        """Take in what its likes in other processes have taken in, of other prompts."""
        own = torch.tensor(self._count, dtype=torch.float64)
        count = ranks.summed(own.clone())
        share = (own / count.clamp_min(1))[:, None]
        mean = ranks.summed(self._mean * share)
        self._squares = ranks.summed(self._squares + own[:, None] * (self._mean - mean) ** 2)
        self._mean, self._count = mean, [int(number) for number in count]

    def result(self) -> Moments:
        """Means and unbiased variances of everything taken in."""
        count = self._count[0]
        return Moments(count, self._mean, self._squares / max(count - 1, 1))


@dataclass(slots=True)
class ProjectionFitter:
    """Keeps one number per prompt and site: the activation's coordinate along that site's own unit direction."""

    units: Float[Tensor, "k sites d"]
    prompts: int
    values: Float[Tensor, "n k sites"] = field(init=False)

    def __post_init__(self) -> None:
        """Start from nothing."""
        self.values = torch.zeros(self.prompts, *self.units.shape[:2], dtype=torch.float64)

    def update(self, layer: int, rows: list[int], values: Float[Tensor, "b k d"]) -> None:
        """Take in one batch of one layer."""
        self.values[rows, :, layer] = torch.einsum("bkd,kd->bk", values.double(), self.units[:, layer].double())

    def merge(self) -> None:
        """Take in what its likes in other processes have taken in, of other prompts."""
        ranks.summed(self.values)


def stream_sites(
    model: Any,
    blocks: list[nn.Module],
    prompts: Encoded,
    positions: int,
    consume: Consumer,
    size: BatchSize,
    *,
    into: Sequence[Tensor | ranks.Merged] | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> int:
    """Feed the activations of every layer 0..L at the last `positions` tokens of each prompt to `consume`.

    Each suffix must have at least `positions` tokens. With `keep`, only prompts whose next-token logits it approves
    are fed; without it the head is not computed. `into` is all that `consume` and `keep` put numbers into, where
    several processes may divide the prompts. Returns the number of prompts fed.

    Raises `NumericalError` at the first NaN or infinity, naming layer and prompt.
    """
    shared = SharedPrefix(model, prompts.prefix)
    fed = torch.zeros((), dtype=torch.int64)

    def work(rows: list[int]) -> None:
        # The batch is handed on only when it is whole: running out of memory half-way must leave no trace.
        batch = prompts.take(rows)
        with _captured(blocks, batch, positions) as sites:
            if keep is None:
                forward(model, shared, batch.suffixes)
                chosen = torch.ones(len(rows), dtype=torch.bool)
            else:
                chosen = keep(rows, last_logits(model, shared, batch.suffixes)).cpu()
        places = [place for place, wanted in enumerate(chosen.tolist()) if wanted]
        kept = [rows[place] for place in places]
        for layer, values in enumerate(sites):
            _check_finite(values, layer, rows)
            if kept:
                consume(layer, kept, values.index_select(0, torch.tensor(places)))
        fed.add_(len(kept))

    shares = None if into is None else (fed, *into)
    in_batches([len(s) for s in prompts.suffixes], size, work, into=shares, done=progress)
    return int(fed)


def _check_finite(values: Float[Tensor, "b k d"], layer: int, rows: list[int]) -> None:
    finite = torch.isfinite(values).flatten(1).all(1)
    if not bool(finite.all()):
        bad = rows[int((~finite).nonzero()[0])]
        raise NumericalError(
            f"activations: expected finite numbers, found NaN or infinity at layer {layer} of prompt {bad}; "
            "try --dtype float32"
        )


@contextlib.contextmanager
def _captured(blocks: list[nn.Module], batch: Encoded, positions: int) -> Iterator[list[Float[Tensor, "b k d"]]]:
    """Fill the list, layer by layer, while the batch is run right-padded inside."""
    lengths = torch.tensor([len(s) for s in batch.suffixes])
    index = lengths[:, None] - 1 - torch.arange(positions)[None]
    rows = torch.arange(len(batch))[:, None]
    captured: list[Tensor] = []

    def pick(hidden: Tensor) -> None:
        chosen = hidden[rows.to(hidden.device), index.to(hidden.device)]
        captured.append(chosen.float().cpu())

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pick(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, __: Any, output: Any) -> None:
        pick(stream_out(output))

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(after))
    with hooked(handles):
        yield captured
