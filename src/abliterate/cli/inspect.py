"""What an inspection found, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from abliterate.cli.arguments import Json, Quiet, joined, monitor_for, refuse_idle, say
from abliterate.cli.options import with_settings
from abliterate.cli.tables import PLAIN
from abliterate.cli.terminal import Table, plain, write
from abliterate.config import (
    InspectSettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
    ReplySettings,
    ThinkingSettings,
)
from abliterate.errors import GateNotMet
from abliterate.report.wording import explained, headline

if TYPE_CHECKING:
    from abliterate.record import InspectionPart, WriterTracePart

#: Exit code of an inspection that neither found an edit nor could rule one out.
UNDECIDED = 4
#: Eight heights of a bar, lowest first.
_BARS = "▁▂▃▄▅▆▇█"


def show_inspection(part: InspectionPart, console: Console) -> None:
    """The verdict first, then where and how strongly."""
    style = "bold red" if part.verdict == "altered" else "bold green" if part.decided else "bold yellow"
    write(console, headline(part), style=style)
    for line in explained(part):
        write(console, line)
    edited = [unit for unit in part.units if unit.edited]
    if edited:
        write(console, _strengths(part.units, console.width))
    if part.separation:
        write(console, _separation(part))
    if part.behaviour is not None:
        rates = part.behaviour
        for name in ("harmful", "harmless", "borderline"):
            rate = getattr(rates, name)
            if rate.n:
                low, high = rate.ci95
                write(
                    console,
                    f"Refuses {rate.refusals} of {rate.n} {name} prompts ({100 * low:.0f}–{100 * high:.0f} %, 95 %).",
                )
    if part.directions is not None:
        write(console, "Directions: ", plain(part.directions, "bold"), whole=True)


def _strengths(units: Sequence[WriterTracePart], width: int) -> Table:
    """A row for each component: a bar for every block, and the range of strengths."""
    table = Table(title="Strength by block (first to last)", title_justify="left", **PLAIN)
    for column in ("component", "", "edited", "strength"):
        table.add_column(column, no_wrap=column == "edited", overflow="fold")
    kinds = dict.fromkeys(unit.kind for unit in units)
    for kind in kinds:
        own = [unit for unit in units if unit.kind == kind]
        edited = [unit.strength for unit in own if unit.edited]
        if not edited:
            table.add_row(kind, "", f"0 of {len(own)}", "")
            continue
        bars = "".join(_bar(unit) for unit in sorted(own, key=lambda unit: unit.block or 0))
        low, high = min(edited), max(edited)
        span = f"{low:.2f}" if high - low < 0.01 else f"{low:.2f} to {high:.2f}"
        table.add_row(kind, bars if len(bars) + 40 <= width else "", f"{len(edited)} of {len(own)}", span)
    return table


def _bar(unit: WriterTracePart) -> str:
    if not unit.edited:
        return "·"
    return _BARS[min(len(_BARS) - 1, max(0, round(abs(unit.strength) * (len(_BARS) - 1))))]


def _separation(part: InspectionPart) -> Table:
    """The layers where harmful and harmless prompts are told apart best."""
    table = Table(
        title=f"Harmful against harmless prompts in {part.separation_in} (AUROC)", title_justify="left", **PLAIN
    )
    for column in ("layer", "recovered direction", "own difference of means"):
        table.add_column(column, justify="right")
    key = (lambda layer: layer.own) if part.separation[0].recovered is None else (lambda layer: layer.recovered or 0.0)
    for layer in sorted(part.separation, key=key, reverse=True)[:3]:
        recovered = "–" if layer.recovered is None else f"{layer.recovered:.3f}"
        table.add_row(str(layer.layer), recovered, f"{layer.own:.3f}")
    return table


@dataclass(frozen=True, slots=True)
class _Groups:
    inspecting: InspectSettings
    loading: ModelSettings
    prompts: PromptSettings
    replies: ReplySettings
    thinking: ThinkingSettings


@with_settings
def inspect(
    given: _Groups,
    /,
    *,
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, .gguf, .safetensors file or shard.", show_default=False)
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Was a direction taken out of this checkpoint? Which, where, how strongly? Give the model that it was made from as
    --base: by itself a checkpoint shows strong edits only.

    Exit codes: 0 no direction was taken out (beside --base, or as far as --rule-out asks), 3 one was, 4 not decided:
    no trace was found, which light edits and those of a search do not leave.
    """
    inspecting = given.inspecting
    if not (inspecting.activations or inspecting.behavioural):
        refuse_idle("inspect without --activations or --behavioural", given.prompts)
    if not inspecting.behavioural:
        refuse_idle("inspect without --behavioural", given.replies, given.thinking)
    from abliterate.forensics.inspect import inspect as inspect_model

    evaluating = joined(given.replies, given.thinking)
    measuring = MeasureSettings(loading=given.loading, prompts=given.prompts, evaluating=evaluating)
    part = inspect_model(model, inspecting, measuring, monitor_for(quiet))
    say(part, show_inspection, as_json)
    if part.verdict == "altered":
        raise typer.Exit(GateNotMet.exit_code)
    if not part.decided:
        raise typer.Exit(UNDECIDED)
