"""`abliterate steer`: replies of a steered model, and behaviour and damage against the coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from abliterate.cli.arguments import (
    Along,
    Json,
    Model,
    Quiet,
    joined,
    monitor_for,
    refuse_idle,
    refuse_set,
    say,
)
from abliterate.cli.options import with_settings
from abliterate.cli.tables import PLAIN, percent
from abliterate.cli.terminal import Table, plain, write
from abliterate.config import (
    FindSettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
    RefusalSettings,
    ReplySettings,
    SteerSettings,
)
from abliterate.errors import UsageError
from abliterate.report.wording import broken, counted, judged_by, named_dose, repeated, replies_of, steered

if TYPE_CHECKING:
    from abliterate.edit.steering import SteeringVectors
    from abliterate.monitor import Monitor
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


@dataclass(frozen=True, slots=True)
class _Groups:
    steering: SteerSettings
    loading: ModelSettings
    prompts: PromptSettings
    finding: RefusalSettings
    replies: ReplySettings


@with_settings
def steer(
    given: _Groups,
    /,
    *,
    model: Model,
    along: Along,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer this, and measure nothing; may be given several times. Default: the held-out prompts.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for record and report.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add a direction to the residual stream, or scale, clamp or ablate what it holds along it: replies, and behaviour
    and damage by coefficient. Nothing is written into the model.
    """
    vectors = along.vectors()
    if prompt:
        if out is not None:
            raise UsageError("--out: does nothing with --prompt, which measures nothing; leave it out")
        part = _answered(model, vectors, prompt, given, along.name, monitor_for(quiet))
    else:
        from abliterate import pipeline

        measuring = MeasureSettings(
            loading=given.loading,
            prompts=given.prompts,
            finding=FindSettings(**given.finding.model_dump()),
            evaluating=joined(given.replies),
        )
        part = pipeline.steer(
            model, vectors, given.steering, measuring, name=along.name, out=out, monitor=monitor_for(quiet)
        )
    say(part, show_steering, as_json)


def _answered(
    model: str, vectors: SteeringVectors, prompts: Sequence[str], given: _Groups, name: str, monitor: Monitor
) -> SteeringPart:
    """Replies to these prompts. Raises `UsageError` for options that are of measurements."""
    refuse_idle("steer --prompt", given.prompts, given.finding)
    refuse_set("in steer --prompt", given.steering, "keep_completions", "no_control")
    refuse_set("in steer --prompt", given.replies, *(set(ReplySettings.model_fields) - {"max_new_tokens"}))
    from abliterate.finding.steer import reply
    from abliterate.session import open_model

    opened = open_model(model, given.loading, monitor)
    longest = given.replies.max_new_tokens
    return reply(opened, vectors, prompts, given.steering, max_new_tokens=longest, monitor=monitor, name=name)
