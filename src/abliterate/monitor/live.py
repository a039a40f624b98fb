"""Progress on stderr: a live view of the current phases on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.text import Text

from abliterate.monitor import Monitor
from abliterate.texts.terminal import Table, plain, write

#: Phases counted in bytes from the beginning: shown in per cent.
_BYTES = {"edit weights", "restore"}

#: Columns: the longest bar, and the shortest that is worth drawing.
_LONGEST, _SHORTEST = 40, 8

#: Lines of a phase that are shown while it lasts; all of them stay when it is over.
_LATEST = 3

_WARNING = "warning:"


@dataclass(slots=True)
class _Phase:
    """A phase under way."""

    name: str
    total: int | None
    spinner: Spinner
    done: int = 0
    in_bytes: bool = False
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


class Screen(Monitor):
    """Draws phases. What is over stands above as plain text, so that only what is going on is drawn again.

    On a terminal a phase's notes follow it. Where nothing can be drawn again (no terminal, TERM=dumb) every line is
    printed at once, notes as one line however long.
    """

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        super().__init__()
        self.console = console
        self._redraws = console.is_interactive and console.file.isatty()  # FORCE_COLOR makes no terminal of a pipe
        self._spins = "dots" if console.encoding.startswith("utf") else "line"
        self._phases: list[_Phase] = []
        self._live: Live | None = None

    def begin(self, name: str, total: int | None) -> None:
        """Show the phase below those that it is a part of."""
        self._phases.append(_Phase(name, total, spinner=Spinner(self._spins), in_bytes=name in _BYTES))
        if self._redraws and self._live is None:
            self._live = Live(get_renderable=self._drawn, console=self.console, transient=True, refresh_per_second=5)
            self._live.start()

    def advance(self, steps: int) -> None:
        """Count steps of the innermost phase."""
        if self._phases:
            self._phases[-1].done += steps

    def expect_bytes(self, total: int) -> None:
        """Count bytes of the innermost phase."""
        if self._phases:
            phase = self._phases[-1]
            phase.total, phase.in_bytes, phase.done = total or None, True, phase.done if total else 0

    def end(self, name: str, *, done: bool) -> None:
        """Leave a line with the time it took, and the notes; what failed says so itself."""
        phase = self._phases.pop()
        if self._live is not None and not self._phases:
            self._live.stop()
            self._live = None
        if done:
            self._print_finished(name, phase.seconds)
        for text in phase.notes:
            self._print_note(text)

    def note(self, text: str) -> None:
        """One line, set in."""
        if self._redraws and self._phases:
            self._phases[-1].notes.append(text)
        else:
            self._print_note(text)

    def _print_finished(self, name: str, seconds: float) -> None:
        if not self._redraws:
            took = plain(f"{seconds:.1f} s", "dim")
            write(self.console, plain("✓", "green"), f" {name} ", took, whole=True)
            return
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_column(no_wrap=True, style="green")
        line.add_column()
        line.add_column(no_wrap=True, style="dim")
        line.add_row("✓", plain(name), f"{seconds:.1f} s")
        write(self.console, line)

    def _print_note(self, text: str) -> None:
        if self._redraws:
            write(self.console, Padding(_styled(text), (0, 0, 0, 2)))  # breaks between words only
        else:
            write(self.console, "  ", _styled(text), whole=True)

    def _drawn(self) -> RenderableType:
        """The phases under way, each with its latest notes cut to a line: the height is bounded."""
        lines: list[RenderableType] = []
        for phase in tuple(self._phases):
            lines.append(_line(phase, self.console.width))
            for text in phase.notes[-_LATEST:]:
                note = _styled(" ".join(text.split()))
                note.truncate(max(1, self.console.width - 2), overflow="ellipsis")
                lines.append(Padding(note, (0, 0, 0, 2)))
        return Group(*lines)


def _styled(text: str) -> Text:
    return plain(text, "bold yellow" if text.startswith(_WARNING) else "dim")


def _line(phase: _Phase, width: int) -> RenderableType:
    """Name, bar, count, time so far and time left; where there is no room for all, the name is the last to go."""
    room = width - 2
    numbers = next((some for some in _numbers(phase) if len(phase.name) + 1 + len(some) <= room), _numbers(phase)[-1])
    name = plain(phase.name)
    name.truncate(max(1, room - 1 - len(numbers)), overflow="ellipsis")
    bar = min(_LONGEST, room - len(name) - len(numbers) - 2)
    cells: list[RenderableType] = [phase.spinner, name]
    if phase.total and bar >= _SHORTEST:
        cells.append(ProgressBar(phase.total, min(phase.done, phase.total), width=bar))
    line = Table.grid(padding=(0, 1, 0, 0))
    for _ in cells:
        line.add_column(no_wrap=True)
    line.add_column(no_wrap=True, style="dim")
    line.add_row(*cells, numbers)
    return line


def _numbers(phase: _Phase) -> list[str]:
    """How far and how long, from most to least."""
    took = _clock(phase.seconds)
    if not phase.total:
        return [took]
    count = f"{100 * phase.done / phase.total:.0f} %" if phase.in_bytes else f"{phase.done}/{phase.total}"
    short = f"{count} {took}"
    if not 0 < phase.done < phase.total:
        return [short, took]
    left = _clock(phase.seconds * (phase.total - phase.done) / phase.done)
    return [f"{short}, about {left} left", short, took]


def _clock(seconds: float) -> str:
    """'0:07', '1:02:07'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
