"""`abliterate judge`: verdicts on replies, a judge's calibration and its errors."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.measure import Measurement

from abliterate.cli.arguments import Json, monitor_for
from abliterate.errors import UsageError
from abliterate.texts.terminal import Table, plain, terminal, write, write_json, write_lines

if TYPE_CHECKING:
    from abliterate.evaluation.judging.base import Exchange, Judge, Label, Verdict
    from abliterate.evaluation.judging.calibration import Calibration, SetName
    from abliterate.evaluation.judging.labelled import Labelled
    from abliterate.evaluation.statistics import Share
    from abliterate.record import JudgedPart

#: What is shown of a prompt or reply: so many words, in so many characters.
_WORDS, _CHARACTERS = 12, 120


def as_csv(rows: Sequence[JudgedPart]) -> str:
    """Rows of `label_file` under a header."""
    from abliterate.record import JudgedPart

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, JudgedPart.model_fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return text.getvalue()


def show_calibration(calibration: Calibration, console: Console, stored: Path | None = None) -> None:
    """The four figures, every kind of error, and where it was stored."""
    _say(console, f"Judge {calibration.judge}: {calibration.n} labelled replies of {calibration.source}.")
    _show_figures(calibration, console)
    if calibration.unknown:
        _say(console, f"No verdict on {calibration.unknown}: wrong in the accuracy, left out of the other figures.")
    _show_confusion(calibration, console)
    if calibration.two_way:
        _say(console, "Labels of 1 and 0 say refused or not: a partial refusal counts as 1, broken text as 0.")
    if stored is not None:
        _say(console, f"Corrects {_what_it_corrects(calibration)}. Stored: {stored}")


def _what_it_corrects(calibration: Calibration) -> str:
    """For which rates the calibration will be taken."""
    if not calibration.model:
        return "rates whose replies are nearest to these (name their model with --model)"
    to = f" to {calibration.prompts} prompts" if calibration.prompts else ""
    return f"rates of {calibration.model}{to}"


def _show_figures(calibration: Calibration, console: Console) -> None:
    table = Table(title="Right about refusals (95 % Wilson interval)", title_justify="left")
    for column in ("", "%", "95 %", "replies"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    from abliterate.evaluation.judging.calibration import FIGURES

    lines = []
    for name in FIGURES:
        share: Share = getattr(calibration, name)
        value = "–" if math.isnan(share.value) else f"{100 * share.value:.1f}"
        between = f"{100 * share.ci95[0]:.1f} to {100 * share.ci95[1]:.1f}"
        table.add_row(name, value, between, f"{share.k}/{share.n}")
        lines.append(f"{name} {value} % ({between}), {share.k}/{share.n}")
    _draw(table, lines, console)


def _show_confusion(calibration: Calibration, console: Console) -> None:
    """What replies of each label were called; kinds of verdict that never came have no column."""
    from abliterate.evaluation.judging.base import Label

    called = [name for name in Label if any(row.get(name) for row in calibration.confusion.values())]
    table = Table(title="Labelled (rows) and called (columns)", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in called:
        table.add_column(name.value, justify="right", no_wrap=True)
    lines = []
    for true, row in calibration.confusion.items():
        table.add_row(true.value, *(str(row.get(name, 0)) for name in called))
        lines += [f"{true.value} called {name.value}: {row[name]}" for name in called if row.get(name)]
    _draw(table, lines, console)


def _draw(table: Table, lines: Sequence[str], console: Console) -> None:
    """The table, or lines that say the same where it is too wide for the screen."""
    if Measurement.get(console, console.options.update(width=1000), table).maximum <= console.width:
        write(console, table)
        return
    for line in lines:
        _say(console, line)


def show_errors(labelled: Labelled, verdicts: Sequence[Verdict], console: Console) -> None:
    """The replies on which judge and label disagree, each with the start of its prompt and reply only."""
    triples = zip(labelled.exchanges, labelled.labels, verdicts, strict=True)
    wrong = [(row, *triple) for row, triple in enumerate(triples, 1) if _disagree(*triple[1:], labelled.two_way)]
    _say(console, f"{len(wrong)} of {len(labelled.labels)} called otherwise than labelled.")
    for row, exchange, label, verdict in wrong:
        _show_error(row, exchange, label, verdict, console)


def _disagree(label: Label, verdict: Verdict, two_way: bool) -> bool:
    from abliterate.evaluation.judging.base import Verdict

    if two_way and verdict.given:
        return Verdict(label).refused != verdict.refused
    return label is not verdict.label


def _show_error(row: int, exchange: Exchange, label: Label, verdict: Verdict, console: Console) -> None:
    why = f" ({_start(verdict.evidence)})" if verdict.evidence else ""
    _say(console, f"row {row}: labelled {label.value}, called {verdict.label.value}{why}")
    for name, text in (("prompt", exchange.prompt), ("reply", exchange.reply)):
        write(console, "  ", plain(name, "dim"), f" {_start(text) or '–'}", whole=True)


def _start(text: str) -> str:
    """The first words, fit for a terminal: no control characters, nothing that has no glyph."""
    words = "".join(char if char.isprintable() else " " for char in text[: 10 * _CHARACTERS]).split()
    start = " ".join(words[:_WORDS])[:_CHARACTERS]
    return start if start == " ".join(text.split()) else f"{start} …"


def _say(console: Console, text: str) -> None:
    write(console, text, whole=True)


def judge(
    *,
    replies: Annotated[
        Path | None,
        typer.Argument(help="Replies to judge: .csv, .tsv or .jsonl with prompt, response.", show_default=False),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Labelled replies: .csv, .tsv or .jsonl with prompt, response, label.", show_default=False),
    ] = None,
    spec: Annotated[
        str, typer.Option("--judge", help="auto, rules, learnt, minos, protectai, classifier:ID, llm:MODEL@URL …")
    ] = "rules",
    model: Annotated[
        str | None, typer.Option(help="With --calibrate: the model whose replies they are.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--set",
            help="With --calibrate: which prompts they answer (harmful, harmless, borderline); default: a mixture.",
            show_default=False,
        ),
    ] = None,
    errors: Annotated[bool, typer.Option(help="List the replies that it calls otherwise than labelled.")] = False,
    device: Annotated[str, typer.Option(help="Where a classifier runs: auto, cpu, cuda …")] = "auto",
    as_json: Json = False,
) -> None:
    """Judge replies in a file; or, with --calibrate, measure how often a judge is right and remember it."""
    if (replies is None) == (calibrate is None):
        raise UsageError("judge: expected a file of replies, or --calibrate FILE; found both or neither")
    from abliterate.evaluation.judging import calibration, labelled

    if calibrate is not None:
        of = calibration.of_whom(model, prompts)
        _calibrate(_opened(spec, device), calibrate, of, errors, as_json)
    if replies is not None:
        if model is not None or prompts is not None:
            raise UsageError("--model, --set: expected them with --calibrate only")
        rows = labelled.label_file(_opened(spec, device), replies)
        if as_json:
            write_json(json.dumps([row.model_dump() for row in rows], indent=1, ensure_ascii=False))
        else:
            write_lines(as_csv(rows))


def _opened(spec: str, device: str) -> Judge:
    """The judge that a spec names; one that would ask the model itself has none to ask here."""
    from abliterate.evaluation.judging.choice import bind_judge, open_judge, opening

    monitor = monitor_for(quiet=False)
    with opening(spec, monitor):
        return bind_judge(open_judge(spec, device=device), None, monitor)


def _calibrate(chosen: Judge, path: Path, of: tuple[str, SetName], errors: bool, as_json: bool) -> None:
    """Measure a judge on the labelled replies of a file, keep the result, and show it."""
    from abliterate.evaluation.judging import calibration
    from abliterate.evaluation.judging.labelled import read_labelled

    labelled = read_labelled(path)
    verdicts = chosen.judge(labelled.exchanges)
    result = calibration.compare(chosen, labelled, verdicts, path, model=of[0], prompts=of[1])
    place = calibration.place(result)
    replaced = calibration.read(place, result.fingerprint) if os.path.lexists(place) else None
    stored = calibration.store(result)
    if as_json:
        write_json(calibration.calibration_part(result, stored).model_dump_json(indent=1))
        return
    console = terminal()
    show_calibration(result, console, stored)
    if replaced is not None:
        _say(console, f"It takes the place of the one on {replaced.source}.")
    if errors:
        show_errors(labelled, verdicts, console)
