"""`abliterate read`: what the stream holds along a direction, token by token: coloured, as JSON, or as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from abliterate.cli.arguments import Along, Json, Model, Quiet, monitor_for, say
from abliterate.cli.options import with_settings
from abliterate.cli.tables import PLAIN
from abliterate.cli.terminal import Table, plain, terminal, write
from abliterate.config import ModelSettings
from abliterate.errors import UsageError
from abliterate.report.wording import reading_said, shade, shade_colour, shade_scale, token_shown

if TYPE_CHECKING:
    from abliterate.finding.reading import Asked
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


@dataclass(frozen=True, slots=True)
class _Groups:
    loading: ModelSettings


@dataclass(frozen=True, slots=True)
class _Texts:
    """What is read, and the layer that is shown of it."""

    text: Annotated[
        list[str] | None,
        typer.Option(help="A prompt to read, in the chat template; may be given several times.", show_default=False),
    ] = None
    file: Annotated[
        Path | None,
        typer.Option(
            help="Prompts (.txt, one a line; .jsonl, .csv …), or prompts with replies (columns prompt and response).",
            show_default=False,
        ),
    ] = None
    layer: Annotated[
        int | None, typer.Option(min=0, help="Layer that is shown; default: the direction's own.", show_default=False)
    ] = None
    limit: Annotated[int, typer.Option(min=1, max=10**6, help="Texts of the file that are read.")] = 16

    def check(self) -> None:
        """Raise `UsageError` unless texts come from one place."""
        if (self.text is None) == (self.file is None):
            raise UsageError("read: expected --text TEXT or --file FILE, found both or neither")

    def taken(self) -> tuple[Sequence[Asked], int]:
        """The texts that are read, and how many of the file are not."""
        from abliterate.finding.reading import read_texts

        if self.file is None:
            return [(one, None) for one in self.text or ()], 0
        texts = read_texts(self.file)
        return texts[: self.limit], max(0, len(texts) - self.limit)


@dataclass(frozen=True, slots=True)
class _Page:
    """The page that is written."""

    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Page to write (.html), with all layers.", show_default=False)
    ] = None
    overwrite: Annotated[bool, typer.Option(help="Replace the page when it exists.")] = False


@with_settings
def read(
    given: _Groups,
    /,
    *,
    model: Model,
    along: Along,
    texts: _Texts,
    page: _Page,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What the residual stream holds along a direction at every token of a text; --json and -o have all layers."""
    texts.check()
    if page.out is not None:
        check_page(page.out, overwrite=page.overwrite)
    from abliterate.finding.reading import read as read_model
    from abliterate.session import open_model

    vectors, (taken, left_out) = along.vectors(), texts.taken()
    monitor = monitor_for(quiet)
    opened = open_model(model, given.loading, monitor)
    part = read_model(opened, vectors, taken, layer=texts.layer, left_out=left_out, monitor=monitor, name=along.name)
    if page.out is not None:
        from abliterate.report.html.reading import write_reading

        write_reading(part, page.out)
    if page.out is None or as_json:
        say(part, show_reading, as_json)
    else:
        write(terminal(), "Page: ", plain(str(page.out), "bold"), whole=True)


def check_page(out: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` where a page cannot be written, or stands already."""
    from abliterate.files.atomic import refuse_other_kinds

    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"-o {out}: expected a file name ending in .html")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; give another -o or --overwrite")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"-o {out}: expected a file in a folder that exists")
    refuse_other_kinds(out)
