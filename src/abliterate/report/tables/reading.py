"""What the stream holds along a direction, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from abliterate.report.tables.evaluation import PLAIN
from abliterate.report.wording import reading_said, shade, shade_colour, shade_scale, token_shown
from abliterate.texts.terminal import Table, plain, write

if TYPE_CHECKING:
    from abliterate.record import ReadingPart, ReadTextPart


#: Tokens that are listed at either end.
_ENDS = 3


def show_reading(part: ReadingPart, console: Console) -> None:
    """Tokens shaded by their projection at one layer; where nothing is coloured, a table of them."""
    place = part.layers.index(part.layer)
    write(console, reading_said(part, place))
    coloured = console.record or (console.color_system is not None and not console.no_color)
    scale = shade_scale(part, place)
    for number, text in enumerate(part.texts, 1):
        values = text.projections[place]
        write(console)
        if coloured:
            _show_coloured(text, values, scale, console)
        else:
            _show_listed(text, values, number, console)
        ends = sorted(range(len(values)), key=values.__getitem__)
        for word, rows in (("highest", ends[: -1 - _ENDS : -1]), ("lowest", ends[:_ENDS])):
            named = ", ".join(f"{text.tokens[row]!r} {values[row]:.2f}" for row in rows)
            write(console, f"{word}: {named}", style="dim")
    if coloured:
        write(console)
        write(console, _legend(scale))
    if part.left_out:
        write(console, f"… and {part.left_out} more texts were not read (--limit).", style="dim")


def _show_coloured(text: ReadTextPart, values: list[float], scale: float, console: Console) -> None:
    line = Text()
    for token, value in zip(text.tokens, values, strict=True):
        shown = plain(token_shown(token), lines=True)
        shown.stylize(_style(shade(value, scale)))
        line.append_text(shown)
    write(console, line)


def _show_listed(text: ReadTextPart, values: list[float], number: int, console: Console) -> None:
    table = Table(title=f"Text {number}", title_justify="left", **PLAIN)
    table.add_column("token")
    table.add_column("projection", justify="right")
    for token, value in zip(text.tokens, values, strict=True):
        table.add_row(repr(token), f"{value:.3f}")
    write(console, table)


def _legend(scale: float) -> Text:
    line = Text()
    for value in (-scale, -scale / 2, 0.0, scale / 2, scale):
        line.append(f" {value:.2f} ", _style(shade(value, scale)))
    return line


def _style(step: int) -> str:
    red, green, blue = shade_colour(step)
    return f"black on rgb({red},{green},{blue})"
