"""Progress, and what each phase cost: seconds, memory, work. Only `live` draws it; the library is silent."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What is done outside all phases (imports, prompts, writing the record).
BETWEEN = "between phases"


@dataclass(slots=True)
class Work:
    """What passed through a model: tokens × blocks, `forward` and `backward`, and tokens through its `head`.

    Padding that was computed counts (see `model.meter`).
    """

    forward: int = 0
    backward: int = 0
    head: int = 0


class Monitor:
    """Measures phases. Override `begin`, `advance`, `end` and `note` to show them."""

    def __init__(self) -> None:
        """Nothing measured yet."""
        self._started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.work_by_phase: dict[str, Work] = {}
        self.warnings: list[str] = []
        self._under_way = [BETWEEN]
        self._watching: list[Callable[[], contextlib.AbstractContextManager[None]]] = []

    @property
    def work(self) -> Work:
        """The work of the innermost phase under way, which whoever computes adds to."""
        return self.work_by_phase.setdefault(self._under_way[-1], Work())

    def watch(self, counting: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        """Enter `counting()` for the length of every phase from now on that is not inside another."""
        self._watching.append(counting)

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Time a phase and its peak memory; yields a function to call with the number of steps done."""
        _reset_peak()
        started = time.perf_counter()
        self.begin(name, total)
        watching = self._watching if len(self._under_way) == 1 else []
        self._under_way.append(name)
        before = _UNDER_WAY.set(self)
        done = False
        try:
            with contextlib.ExitStack() as stack:
                for counting in watching:
                    stack.enter_context(counting())
                yield self.advance
            done = True
        finally:
            _UNDER_WAY.reset(before)
            self._under_way.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak_memory())
            self.end(name, done=done)

    def timings(self) -> dict[str, float]:
        """Seconds per phase so far, and what lay between the phases."""
        other = time.perf_counter() - self._started - sum(self.seconds.values())
        return {name: round(value, 3) for name, value in {**self.seconds, BETWEEN: other}.items()}

    def warn(self, text: str) -> None:
        """Say something the user must know, and keep it for the record."""
        self.warnings.append(text)
        self.note(f"warning: {text}")

    def begin(self, name: str, total: int | None) -> None:
        """A phase starts."""

    def advance(self, steps: int) -> None:
        """Some steps of the current phase are done."""

    def expect_bytes(self, total: int) -> None:
        """The steps of the current phase are bytes from now on, and there are so many; 0 is none any more."""

    def end(self, name: str, *, done: bool) -> None:
        """A phase is over: done, or broken off by an error."""

    def note(self, text: str) -> None:
        """One line worth reading."""


_UNDER_WAY: ContextVar[Monitor | None] = ContextVar("monitor", default=None)


def under_way() -> Monitor:
    """The monitor of the innermost phase under way in this thread, for what works deep in one; else a silent one."""
    return _UNDER_WAY.get() or Monitor()


@contextlib.contextmanager
def without_bars(*libraries: Any) -> Iterator[None]:
    """Inside, these libraries of Hugging Face (modules that have a switch for it) draw no progress of their own."""
    drawing = [library for library in libraries if not library.are_progress_bars_disabled()]
    for library in drawing:
        library.disable_progress_bars()
    try:
        yield
    finally:
        for library in drawing:
            library.enable_progress_bars()


def _reset_peak() -> None:
    """Let the kernel's high-water mark start anew, where it can be reset."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Most memory resident since the last reset (Linux) or since the start, in bytes."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    try:
        import resource
    except ImportError:  # nobody says
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
