"""Programs that are stopped in the middle: forks of one process in which everything is imported.

A process of its own takes seconds to import torch and transformers; what is tested begins when that is over.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What the process that is forked imports first.
IMPORTED = ["abliterate.pipeline", "abliterate.forensics.inspect", "transformers.models.llama.modeling_llama"]


def start(work: Callable[..., object], *arguments: object, log: Path, **environment: str) -> Any:
    """A process (of `multiprocessing`) that does the work; what it says goes into `log`.

    It leads a group of its own, and has this process's environment with `environment`. `work` and its arguments are
    pickled: a function at the top of a module.
    """
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(IMPORTED)
    process = forking.Process(target=_work, args=(work, arguments, log, {**os.environ, **environment}))
    process.start()
    return process


def command(*arguments: str) -> None:
    """The command line, as work."""
    from abliterate.cli import main

    sys.argv = ["abliterate", *arguments]
    main()


def _work(work: Callable[..., object], arguments: tuple[object, ...], log: Path, environment: dict[str, str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    with contextlib.suppress(OSError):
        os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = (open(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))  # noqa: SIM115
    work(*arguments)
