"""The demo model, where it has been fetched: `make test` does, or python scripts/demo_model.py qwen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
import torch

P = ParamSpec("P")
R = TypeVar("R")

GGUF = (
    Path(os.environ.get("ABLITERATE_CACHE", "~/.cache/abliterate")).expanduser()
    / "models"
    / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
)

#: Marks of what needs it.
NEEDED = (
    pytest.mark.real_model,
    pytest.mark.skipif(not GGUF.is_file(), reason="the demo model is not here: python scripts/demo_model.py qwen"),
)


def demo_model(test: Callable[P, R]) -> Callable[P, R]:
    """Mark a test that needs it."""
    for mark in NEEDED:
        test = mark(test)
    return test


@contextlib.contextmanager
def cores() -> Iterator[None]:
    """This process's share of the cores."""
    before = torch.get_num_threads()
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    yield
    torch.set_num_threads(before)
