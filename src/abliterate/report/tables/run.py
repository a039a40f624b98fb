"""What a run says at its end."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from abliterate.report.tables.evaluation import PLAIN, fits, show_evaluation
from abliterate.report.tables.search import show_search
from abliterate.report.wording import edited
from abliterate.texts.terminal import Table, plain, write

if TYPE_CHECKING:
    from abliterate.record import Record, SelectionPart


_WHAT = {
    "weights": "Model",
    "gguf": "Model (GGUF)",
    "lora": "Adapter (PEFT)",
    "gguf-lora": "Adapter (GGUF, llama.cpp)",
    "control-vector": "Control vector (GGUF, llama.cpp)",
}


def show_done(record: Record, console: Console) -> None:
    """The end of a job: its tables, then the answer and what to do next, which is what somebody finds on the screen."""
    show_run(record, console)
    show_end(record, console)


def show_run(record: Record, console: Console) -> None:
    """What changed, what was chosen, what was edited, as tables."""
    from abliterate.record import grouped

    if record.evaluation is not None:
        show_evaluation(record.evaluation, console)
    if record.selection is not None:
        show_selection(record.selection, record.model.layers, console)
    if record.search is not None and record.search.method != "closed-form":
        show_search(record.search, console)
    if record.plan is not None:
        if record.plan.edits:
            write(console, f"Edited {edited(record.plan)}.")
        for what, why in grouped(record.plan.left_alone):
            write(console, f"Left alone: {what} ({why}).")


def show_place(record: Record, console: Console) -> None:
    """Where the result lies."""
    if record.output is not None:
        what = "Search" if record.plan is None else _WHAT[record.plan.realisation]
        write(console, f"{what}: ", plain(str(Path(record.output)), "bold"), whole=True)
        report = os.path.join(record.output, "report.html")
        if os.path.isfile(report):  # no name is too long for it
            write(console, "Report: ", plain(report, "bold"), whole=True)


def show_end(record: Record, console: Console) -> None:
    """What it took, where the result lies, the answer in a sentence or two, and what to do next."""
    from abliterate.report.html.page import answer

    minutes, memory = sum(record.timings_s.values()) / 60, max(record.peak_memory_bytes.values(), default=0) / 1e9
    write(console, f"Took {minutes:.1f} minutes and at most {memory:.2f} GB of memory.", style="dim")
    show_place(record, console)
    for line in answer(record):
        write(console, line, style="bold")
    if record.output is None or record.plan is None:
        return
    out = shlex.quote(record.output)
    if record.plan.realisation == "gguf":
        for line in _next_of_gguf(record.output, record.plan.files[0], record.model.name):
            write(console, line, whole=True)
    if record.plan.realisation == "weights":
        write(console, f"Next: abliterate lab {out}     both models side by side, the edit under sliders", whole=True)
        write(console, f"      abliterate show {out}    all that was measured, and what each phase took", whole=True)
        write(console, f"      abliterate undo {out}    the original back", whole=True)


def _next_of_gguf(out: str, file: str, model: str) -> list[str]:
    """What runs a GGUF file in `out`, and what asks it beside the original."""
    path, modelfile = (shlex.quote(os.path.join(out, name)) for name in (file, "Modelfile"))
    name = shlex.quote(re.sub(r"[^\w.-]+", "-", Path(out).name).strip("-.") or "edited")
    return [
        f"Next: ollama create {name} -f {modelfile} && ollama run {name}",
        f"      llama-cli -m {path}",
        f"      abliterate eval {path} --base {shlex.quote(model)}    what its stored numbers do, beside the original",
    ]


def show_selection(part: SelectionPart, layers: int, console: Console) -> None:
    """The chosen site beside no intervention and a random direction."""
    table = _selection(part, layers)
    write(console, table if fits(table, console) else _selection(part, **PLAIN))


def _selection(part: SelectionPart, layers: int | None = None, **looks: Any) -> Table:
    """Without `layers` in few words, the site as `--site` takes it."""
    site, control = part.chosen, part.control
    scores = "refusal scores are log-odds" if part.by == "first tokens" else "bypass and induce are shares of replies"
    table = Table(title=f"Chosen direction ({scores})", title_justify="left", **looks)
    table.add_column("")
    for column in ("bypass ↓", "induce ↑", "KL"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("no intervention" if layers else "untouched", f"{part.harmful:.2f}", f"{part.harmless:.2f}", "0")
    if site is not None:
        where = f"layer {site.layer} of {layers}, position {site.position}"
        name = where if layers else f"{site.layer}:{site.position}"
        table.add_row(name, f"{site.bypass:.2f}", f"{site.induce:.2f}", f"{site.kl:.3f}")
    table.add_row(
        "random direction" if layers else "random",
        f"{control.bypass:.2f}",
        f"{control.induce:.2f}",
        f"{control.kl:.3f}",
    )
    return table


def show_timings(record: Record, console: Console) -> None:
    """Seconds and work per phase, and the highest peak of memory."""
    if not record.timings_s:
        return
    table = Table(title="Seconds per phase", title_justify="left", show_header=bool(record.work))
    for column in ("phase", "seconds", *(["work"] if record.work else [])):
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=column != "phase")
    works = {name: work.forward + work.backward for name, work in record.work.items()}
    for name, seconds in record.timings_s.items():
        table.add_row(name, f"{seconds:.1f}", *([_millions(works.get(name, 0))] if works else []))
    together = [f"{sum(record.timings_s.values()):.1f}", *([_millions(sum(works.values()))] if works else [])]
    table.add_row("together", *together, style="bold")
    write(console, table)
    if works:
        backward, head = (sum(getattr(work, name) for work in record.work.values()) for name in ("backward", "head"))
        write(
            console,
            f"Work: millions of tokens × blocks passed, padding included ({_millions(backward)} of them backwards; "
            f"beside that {_millions(head)} million tokens through the head).",
        )
    write(console, f"Peak memory {max(record.peak_memory_bytes.values(), default=0) / 1e9:.2f} GB.")


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}" if count else ""
