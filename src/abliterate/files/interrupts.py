"""Ctrl-C, pressed once or many times: the first one stops the work, the others do not stop the cleaning up."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

#: Seconds within which several interrupts are one.
_TOGETHER = 2.0

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """What interrupts do inside `one_interrupt`."""

    def __init__(self) -> None:
        """The next one interrupts."""
        self.before: dict[int, Callable[[int, Any], Any]] = {}
        self._last = -_TOGETHER
        self._waiting = False
        self._missed: int | None = None

    def wait(self) -> None:
        """From now on interrupts wait until the end, so that what comes now is done in full."""
        self._waiting = True

    def arrive(self, number: int, frame: Any) -> None:
        """The handler of the signals."""
        if self._waiting:
            self._missed = number
            return
        now = time.monotonic()
        if now - self._last >= _TOGETHER:
            self._last = now
            self.before[number](number, frame)

    def deliver(self) -> None:
        """Do what an interrupt that had to wait asked for, unless one has been heeded already."""
        if self._missed is not None and time.monotonic() - self._last >= _TOGETHER:
            self.before[self._missed](self._missed, None)


@contextlib.contextmanager
def one_interrupt() -> Iterator[Interrupts]:
    """Inside, the first SIGINT or SIGTERM does what it always does, and more of them at once are one with it.

    After `wait` they have no effect until the end. Only the main thread gets signals; elsewhere nothing is changed.
    """
    interrupts = Interrupts()
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in _NUMBERS}
        interrupts.before = {number: handler for number, handler in found.items() if callable(handler)}
    for number in interrupts.before:
        signal.signal(number, interrupts.arrive)
    failed = True
    try:
        yield interrupts
        failed = False
    finally:
        for number, handler in interrupts.before.items():
            signal.signal(number, handler)
        if not failed:
            interrupts.deliver()
