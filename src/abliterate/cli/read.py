"""`abliterate read`: what the stream holds along a direction, token by token: coloured, as JSON, or as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli.arguments import Along, Json, Model, Quiet, monitor_for, say
from abliterate.cli.options import with_settings
from abliterate.config import ModelSettings
from abliterate.errors import UsageError
from abliterate.report.tables.reading import show_reading
from abliterate.texts.terminal import plain, terminal, write

if TYPE_CHECKING:
    from abliterate.finding.reading import Asked


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
        from abliterate.report.html.reading import check_page

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
