"""Replies from the live transformers model, with the edit as whatever changes it for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from abliterate.evaluation.engines.base import Progress, check_prompts, nothing_edited
from abliterate.model.batches import BatchSize, auto_batch_size, can_share, share_prefix
from abliterate.model.generation import Reply, complete


class LocalEngine:
    """`generation.complete` on a live model. Both states share its memory; `edit` is, for example, hooks of a plan.

    Prompts share the work on their common prefix where the model allows it, which is tried out on the first ones.
    """

    name = "transformers"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        edit: Callable[[], AbstractContextManager[None]] | None = None,
        size: BatchSize | None = None,
    ) -> None:
        """`edit` makes a context manager inside which `model` is the edited one; `size` is found when not given."""
        self._model, self._tokenizer, self._edit = model, tokenizer, edit
        self._size = size or auto_batch_size(model)
        self._share: bool | None = None

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, progress: Progress | None = None
    ) -> list[Reply]:
        """Greedy replies, in the order of `prompts` (token ids)."""
        check_prompts(prompts)
        if not prompts:
            return []
        if self._share is None:
            self._share = can_share(self._model, prompts)
        encoded = share_prefix(prompts, share=self._share)
        return complete(self._model, self._tokenizer, encoded, max_new_tokens, self._size, progress)

    @contextlib.contextmanager
    def edited(self) -> Iterator[None]:
        """Inside, the model is the edited one. Raises `UsageError` when there is no `edit`."""
        if self._edit is None:
            raise nothing_edited(self.name, "a plan or another state of the model")
        with self._edit():
            yield
