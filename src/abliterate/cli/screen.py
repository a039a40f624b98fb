"""What a person sees: progress on stderr, tables on stdout."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from abliterate.card import edited, grouped
from abliterate.cli.evaluating import show_evaluation
from abliterate.cli.searching import show_search
from abliterate.monitor import Monitor
from abliterate.record import Record, SelectionPart

#: Phases counted in bytes: a bar without the numbers.
_BYTES = {"edit weights"}


class Screen(Monitor):
    """Draws phases on stderr: a live bar on a terminal, one line per finished phase elsewhere."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        super().__init__()
        self.console = console
        self._progress: Progress | None = None
        self._phase_started = 0.0

    def begin(self, name: str, total: int | None) -> None:
        """Show a bar."""
        self._phase_started = time.perf_counter()
        if not self.console.is_terminal:
            return
        counts = [] if name in _BYTES or total is None else [MofNCompleteColumn()]
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn()]
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._progress.add_task(name, total=total)
        self._progress.start()

    def advance(self, steps: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0], steps)

    def end(self, name: str, *, done: bool) -> None:
        """Leave one line with the time it took; what failed says so itself."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        took = time.perf_counter() - self._phase_started
        if done:
            self.console.print(f"[green]✓[/] {name} [dim]{took:.1f} s[/]", highlight=False)

    def note(self, text: str) -> None:
        """One line, set in."""
        style = "yellow" if text.startswith("warning:") else "dim"
        self.console.print(f"  [{style}]{escape(text)}[/]", highlight=False, soft_wrap=True)


_WHAT = {
    "weights": "Model",
    "lora": "Adapter (PEFT)",
    "gguf-lora": "Adapter (GGUF, llama.cpp)",
    "control-vector": "Control vector (GGUF, llama.cpp)",
}


def show_run(record: Record, console: Console) -> None:
    """The end of a run: what changed, what was chosen, what it took, where the model lies."""
    if record.evaluation is not None:
        show_evaluation(record.evaluation, console)
    if record.selection is not None:
        show_selection(record.selection, record.model.layers, console)
    if record.search is not None and record.search.method != "closed-form":
        show_search(record.search, console)
    if record.plan is not None:
        if record.plan.realisation == "weights":
            console.print(f"Edited {edited(record.plan)}.")
        for what, why in grouped(record.plan.left_alone):
            console.print(f"Left alone: {what} ({why}).")
    show_timings(record, console)
    if record.output is not None:
        what = "Model" if record.plan is None else _WHAT[record.plan.realisation]
        console.print(f"{what}: [bold]{escape(str(Path(record.output)))}[/]", soft_wrap=True)


def show_selection(part: SelectionPart, layers: int, console: Console) -> None:
    """The chosen site beside no intervention and a random direction."""
    site, control = part.chosen, part.control
    table = Table(title="Chosen direction (refusal scores are log-odds)", title_justify="left")
    for column in ("", "bypass ↓", "induce ↑", "KL"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("no intervention", f"{part.harmful:.2f}", f"{part.harmless:.2f}", "0")
    if site is not None:
        name = f"layer {site.layer} of {layers}, position {site.position}"
        table.add_row(name, f"{site.bypass:.2f}", f"{site.induce:.2f}", f"{site.kl:.3f}")
    table.add_row("random direction", f"{control.bypass:.2f}", f"{control.induce:.2f}", f"{control.kl:.3f}")
    console.print(table)


def show_timings(record: Record, console: Console) -> None:
    """Seconds per phase and the highest peak of memory."""
    if not record.timings_s:
        return
    table = Table(title="Seconds per phase", title_justify="left", show_header=False)
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    for name, seconds in record.timings_s.items():
        table.add_row(name, f"{seconds:.1f}")
    table.add_row("[bold]together[/]", f"[bold]{sum(record.timings_s.values()):.1f}[/]")
    console.print(table)
    console.print(f"Peak memory {max(record.peak_memory_bytes.values(), default=0) / 1e9:.2f} GB.")
