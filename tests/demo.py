"""The demo model, where it has been fetched: `make test` does, or python scripts/demo_model.py qwen."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
import torch

import abliterate

P = ParamSpec("P")
R = TypeVar("R")

GGUF = (
    Path(os.environ.get("ABLITERATE_CACHE", "~/.cache/abliterate")).expanduser()
    / "models"
    / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
)

#: Numbers of builtin harmful prompts: all but eight are refused by the demo model, most by a wide margin. Of all
#: builtin ones it refuses a third, so that eight to learn from would take three times as many.
REFUSED = (
    0, 6, 12, 17, 23, 31, 37, 42, 50, 54, 55, 67, 71, 73, 76, 83, 93, 121, 127, 151, 160, 163, 190, 191, 210, 212,
    214, 216, 222, 223, 234, 243, 256, 257, 258, 266, 267, 273, 276, 282, 284, 296, 304, 309, 313, 318, 319, 334,
    338, 343, 348, 351, 356, 362, 363, 371, 377, 383, 385, 392, 396, 397, 401, 406, 409, 416, 424, 425, 431, 433,
    457, 476, 484, 486, 495,
)  # fmt: skip

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


def refused(folder: Path) -> Path:
    """A file of harmful prompts that the demo model refuses, but for a few."""
    lines = (Path(abliterate.__file__).parent / "prompts" / "data" / "harmful.jsonl").read_text("utf-8").splitlines()
    path, chosen = folder / "refused.jsonl", (json.loads(lines[number]) for number in REFUSED)
    path.write_text("".join(json.dumps({name: one[name] for name in ("text", "category")}) + "\n" for one in chosen))
    return path


def share() -> int:
    """This process's share of the cores."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@contextlib.contextmanager
def cores() -> Iterator[None]:
    """As many threads as this process's share of the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(share())
    yield
    torch.set_num_threads(before)
