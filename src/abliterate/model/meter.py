"""What passes through a live model, counted where it is computed: at its blocks and its head.

A token that a block computes is one, whatever asked for it and whatever becomes of it: padding counts, and a prefix
that prompts share counts once. So the count says what a run costs without a clock, and is the same on every machine
where batches and replies are the same. Counting is one addition for each call of a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from abliterate.model.anatomy import find_blocks, stream_out
from abliterate.model.batches import hooked
from abliterate.model.read_ahead import ReadAhead
from abliterate.monitor import Monitor

_Count = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Counter:
    """A forward hook. A copy of a block counts with the original."""

    forward: _Count
    backward: _Count | None = None

    def __call__(self, _: nn.Module, __: Any, output: Any) -> None:
        stream = stream_out(output)
        tokens = stream.shape[:2].numel()
        self.forward(tokens)
        if self.backward is not None and stream.requires_grad:
            backward = self.backward
            stream.register_hook(lambda _: backward(tokens))

    def __deepcopy__(self, _: Any) -> _Counter:
        return self


def count_passes(model: Any, monitor: Monitor) -> None:
    """Tell `monitor`, in its phases from now on, of every token that passes a block of `model` or its head.

    Outside phases nothing is left on the model. Raises `AnatomyError` when no blocks are found.
    """
    find_blocks(model)
    monitor.watch(lambda: counting(model, monitor))


@contextlib.contextmanager
def counting(model: Any, monitor: Monitor) -> Iterator[None]:
    """Inside, `monitor` is told of every token that passes a block of `model`, forwards or backwards, or its head.

    Raises `AnatomyError` when no blocks are found.
    """

    def forward(tokens: int) -> None:
        monitor.work.forward += tokens

    def backward(tokens: int) -> None:
        monitor.work.backward += tokens

    def head(tokens: int) -> None:
        monitor.work.head += tokens

    handles = [block.register_forward_hook(_Counter(forward, backward)) for block in find_blocks(model)[1]]
    if (last := model.get_output_embeddings()) is not None:
        handles.append(last.register_forward_hook(_Counter(head)))
    with hooked(handles):
        yield


def changes_nothing(hook: Any) -> bool:
    """Whether a hook only counts, or asks for weights before they are needed."""
    return isinstance(hook, _Counter | ReadAhead)
