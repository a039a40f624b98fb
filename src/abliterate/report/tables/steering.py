"""Steering, dose by dose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from abliterate.report.tables.evaluation import PLAIN, percent
from abliterate.report.wording import broken, counted, judged_by, named_dose, repeated, replies_of, steered
from abliterate.texts.terminal import Table, plain, write

if TYPE_CHECKING:
    from abliterate.record import AnswerPart, SteeringPart


#: Prompts of each set whose replies are shown.
_MOST = 4


def show_steering(part: SteeringPart, console: Console) -> None:
    """What is done, what it does by coefficient; replies of one coefficient, or to prompts that were given."""
    write(console, steered(part))
    if part.doses:
        write(console, dose_table(part))
        write(console, f"{replies_of(part.max_new_tokens, part.decoding)}.", style="dim")
        if part.judge is not None:
            write(console, judged_by(part.judge), style="dim")
    if not part.doses or len(part.answers) <= 2:
        _show_answers(part, console)


def dose_table(part: SteeringPart) -> Table:
    """Rates by the judge, KL from the model as it is, broken and repetitive replies, by coefficient."""
    table = Table(title="Held-out prompts by coefficient: % [95 %], KL of first tokens", title_justify="left", **PLAIN)
    table.add_column("", justify="right", no_wrap=True)
    sets = list(part.doses[0].behaviour)
    for name in sets:
        table.add_column(counted(part, name), justify="right")
    for column in ("KL", "broken", "repeated"):
        table.add_column(column, justify="right")
    for row, one in enumerate((*part.doses, *part.control)):
        rates = [percent(one.behaviour[name]) if name in one.behaviour else "" for name in sets]
        name = ("random " if row >= len(part.doses) else "") + named_dose(one)
        share = repeated(one)
        cells = ["–" if one.kl.value is None else f"{one.kl.value:.3f}", broken(one)]
        table.add_row(name, *rates, *cells, "–" if share is None else f"{100 * share:.1f} %")
    return table


def _show_answers(part: SteeringPart, console: Console) -> None:
    """Replies as the model is, and below each the steered ones."""
    (_, plain_sets), *steered_sets = part.answers.items()
    for name, answers in plain_sets.items():
        count = len(answers) if not part.doses else _MOST
        for row, answer in enumerate(answers[:count]):
            write(console)
            write(console, plain(f"{name}: " if part.doses else "", "dim"), plain(answer.prompt, "bold"))
            _show_answer("none", answer, console)
            for dose, sets in steered_sets:
                _show_answer(dose, sets[name][row], console)
        if (more := len(answers) - count) > 0:
            write(console, f"… and {more} more {name} prompts (--json has all).", style="dim")


def _show_answer(dose: str, answer: AnswerPart, console: Console) -> None:
    label = f" ({answer.label})" if answer.label else ""
    write(console, plain(f"{dose:>6}{label}: ", "cyan"), plain(answer.text, lines=True))
