"""Where progress is shown: on a terminal as the command line draws it, in a notebook as one block; nowhere else."""

from __future__ import annotations

import html
import sys
import time
from typing import Any

from abliterate.monitor import Monitor

#: Seconds between two drawings of a notebook's block.
_EVERY = 0.2

_STYLE = "font-family:ui-monospace,monospace;font-size:85%;line-height:1.4"


class _Choice:
    """What the user has chosen for this process."""

    quiet = False


def quiet(on: bool = True) -> None:
    """Show no progress from now on; `quiet(False)` shows it again."""
    _Choice.quiet = on


def progress() -> Monitor:
    """A monitor for one call."""
    if _Choice.quiet:
        return Monitor()
    if (shell := _notebook()) is not None:
        return NotebookBlock(shell)
    if sys.stderr is not None and sys.stderr.isatty():
        from abliterate.monitor.live import Screen
        from abliterate.texts.terminal import terminal

        return Screen(terminal(stderr=True))
    return Monitor()


def _notebook() -> Any:
    """IPython's display module inside a notebook; None elsewhere (also in IPython on a terminal)."""
    if "IPython" not in sys.modules:
        return None
    from IPython import display, get_ipython

    shell = get_ipython()
    return display if shell is not None and type(shell).__name__ == "ZMQInteractiveShell" else None


class NotebookBlock(Monitor):
    """Phases as one block of a notebook: a bar for what is under way, a line for what is over, warnings below."""

    def __init__(self, display: Any) -> None:
        """Draw with IPython's `display` module."""
        super().__init__()
        self._display = display
        self._handle: Any = None
        self._open: list[list[Any]] = []  # name, total, done
        self._lines: list[str] = []
        self._drawn = 0.0

    def begin(self, name: str, total: int | None) -> None:
        """Draw a bar for the phase."""
        self._open.append([name, total, 0])
        self._draw(now=True)

    def advance(self, steps: int) -> None:
        """Move the bar of the innermost phase."""
        if self._open:
            self._open[-1][2] += steps
            self._draw()

    def expect_bytes(self, total: int) -> None:
        """Let the bar of the innermost phase be of so many."""
        if self._open:
            self._open[-1][1:] = [total or None, self._open[-1][2] if total else 0]
            self._draw()

    def end(self, name: str, *, done: bool) -> None:
        """A line in place of the bar."""
        self._open.pop()
        mark = "✓" if done else "✗"
        self._lines.append(f"{mark} {html.escape(name)} {self.seconds[name]:.1f} s")
        self._draw(now=True)

    def note(self, text: str) -> None:
        """Warnings stay to be read; other notes are in what is returned."""
        if text.startswith("warning:"):
            self._lines.append(f"<b>{html.escape(text)}</b>")
            self._draw(now=True)

    def _draw(self, *, now: bool = False) -> None:
        if not now and time.perf_counter() - self._drawn < _EVERY:
            return
        self._drawn = time.perf_counter()
        bars = [
            f'{html.escape(name)} <progress max="{total}" value="{done}"></progress> {done}/{total}'
            if total
            else f"{html.escape(name)} …"
            for name, total, done in self._open
        ]
        block = self._display.HTML(f'<div style="{_STYLE}">{"<br>".join([*self._lines, *bars])}</div>')
        if self._handle is None:
            self._handle = self._display.display(block, display_id=True)
        else:
            self._handle.update(block)
