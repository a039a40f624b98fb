"""Weights on disk are asked for while the block before them computes: a pass waits for the slower of the two."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from abliterate.files.checkpoint import Shard, read_shard
from abliterate.model.offloaded import stored_places

#: Where bytes of a file begin, and how many.
Span = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class ReadAhead:
    """A hook before a block: the system is told which bytes of which files come next."""

    spans: Mapping[str, Sequence[Span]]
    _busy: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, *_: Any) -> None:
        """Returns at once; nothing is done while an earlier call still asks for the same."""
        if self._busy.acquire(blocking=False):
            threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        try:
            for path, spans in self.spans.items():
                with contextlib.suppress(OSError), Path(path).open("rb", buffering=0) as file:
                    for start, length in spans:
                        os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)
        finally:
            self._busy.release()

    def __deepcopy__(self, _: Any) -> ReadAhead:
        """A copy of a block asks for the same, with the original."""
        return self


def read_ahead(blocks: Sequence[nn.Module]) -> None:
    """Let each of `blocks`, as it begins, ask for the weights on disk of the one after it.

    Nothing is done on systems that cannot be asked.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    headers = functools.cache(lambda path: read_shard(Path(path)))
    spans = [_spans(block, headers) for block in blocks]
    for block, following in zip(blocks, [*spans[1:], *spans[:1]], strict=True):
        if following:
            block.register_forward_pre_hook(ReadAhead(following))


def _spans(block: nn.Module, headers: Callable[[str], Shard]) -> dict[str, list[Span]]:
    """Bytes of each file that a block's weights are read from."""
    found: dict[str, list[Span]] = {}
    for path, tensor in stored_places(block):
        info = headers(path).tensors[tensor]
        found.setdefault(path, []).append((info.start, info.nbytes))
    return {path: sorted(spans) for path, spans in found.items()}
