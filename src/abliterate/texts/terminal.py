"""What reaches the terminal: texts that are only ever text, and streams that never end a finished job.

Everything that a command prints goes through here. A string is text: it is no markup, and what a terminal would obey in
it stands there as an escape (see `texts`). Colours and emphasis are given beside the text, with `plain`.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
import unicodedata
from collections.abc import Callable
from typing import Any, TextIO, cast

from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from abliterate.texts import printable, printable_lines, shown_json

#: How signs are written where the terminal's encoding has none of them; each as wide as the sign.
_SIGNS = str.maketrans("→←↑↓✓✗·–—−‖′×Δ≤≥▁▂▃▄▅▆▇█─│“”‘’•", "><^v+x.---|'xd<>12345678-|\"\"''*")
_ERRORS = "abliterate.readable"


def terminal(*, stderr: bool = False) -> Console:
    """The terminal, or what stands in its place."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def plain(text: str, style: str = "", *, lines: bool = False) -> Text:
    """A text for the terminal, on one line unless it may have `lines`."""
    return Text(printable_lines(text) if lines else printable(text), style=style)


def write(console: Console, *parts: RenderableType, style: str = "", whole: bool = False) -> None:
    """Print texts one after the other on a line, or a table; a `whole` line is never broken (paths, commands)."""
    if all(isinstance(part, str | Text) for part in parts):
        line = Text(style=style)
        for part in parts:
            line.append_text(part if isinstance(part, Text) else plain(str(part)))
        parts = (line,)
    console.print(*parts, soft_wrap=whole, markup=False, highlight=False)


class Table(RichTable):
    """A table whose title, headers and cells are texts, never markup."""

    def __init__(self, *, title: str | None = None, **looks: Any) -> None:
        """`title` as text, `looks` as rich takes them."""
        super().__init__(title=None if title is None else plain(title, "table.title"), **looks)

    def add_column(self, header: RenderableType = "", *args: Any, **looks: Any) -> None:
        """A column under `header`."""
        super().add_column(_cell(header), *args, **looks)

    def add_row(self, *cells: RenderableType | None, **looks: Any) -> None:
        """A row of `cells`."""
        super().add_row(*(None if cell is None else _cell(cell) for cell in cells), **looks)


def _cell(content: RenderableType) -> RenderableType:
    return plain(content) if isinstance(content, str) else content


def write_json(text: str) -> None:
    """Print JSON on stdout; whatever the encoding there, it stays JSON that says the same."""
    sys.stdout.write(shown_json(text, getattr(sys.stdout, "encoding", None) or "utf-8") + "\n")
    sys.stdout.flush()


def write_lines(text: str) -> None:
    """Print lines on stdout, without control characters: a file, or rows of CSV (`write_json` gives cells raw)."""
    sys.stdout.write(printable_lines(text))
    sys.stdout.flush()


class Steady:
    """A standard stream that outlives what it leads to.

    When that is full, closed or gone the rest of what is written is dropped, and `lost` says why: printing must not end
    a job that changes files, nor make a finished one a failed one. Characters that the stream's encoding does not have
    are replaced by similar ones or escapes.
    """

    def __init__(self, stream: TextIO) -> None:
        """Stand in the place of `stream`."""
        self._stream = stream
        self.lost: Exception | None = None
        if callable(reconfigure := getattr(stream, "reconfigure", None)):
            reconfigure(errors=_ERRORS)

    def write(self, text: str) -> int:
        """Write `text`; never fails."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Pass on what was written; never fails."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's."""
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError) as error:  # a closed file is a ValueError
            self.lost = self.lost or error
            with contextlib.suppress(OSError, ValueError):
                # What is still buffered goes nowhere, and no failure comes of it when the program ends.
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    @property
    def why(self) -> str:
        """Why something was lost, in words; "" when nothing was."""
        return "" if self.lost is None else str(getattr(self.lost, "strerror", None) or self.lost)

    @property
    def left_by_reader(self) -> bool:
        """Whether whoever read it (`| head`) has had enough."""
        return isinstance(self.lost, OSError) and self.lost.errno == errno.EPIPE


def nobody_reads() -> bool:
    """Whether what is printed on stdout leads nowhere any more."""
    return isinstance(sys.stdout, Steady) and sys.stdout.lost is not None


def steady_streams() -> tuple[Steady, Steady]:
    """Put streams that never fail in the place of stdout and stderr, and give them.

    A standard stream that the program was started without (`>&-`) leads nowhere: else the next file that is opened
    would get its number, and what is printed would be written into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8")
    if callable(reconfigure := getattr(sys.stdin, "reconfigure", None)):
        reconfigure(errors="surrogateescape")  # prompts that are not text are refused as prompts
    out, err = (
        Steady(os.fdopen(number, "w", encoding="utf-8") if stream is None else stream)
        for number, stream in ((1, sys.stdout), (2, sys.stderr))
    )
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    return out, err


def hushed() -> TextIO:
    """Let nothing that is printed from now on be seen; gives the stderr that was there."""
    before = sys.stderr
    sys.stdout = sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    return before


def _readable(error: UnicodeError) -> tuple[str, int]:
    """Signs as similar ones in ASCII, letters without their accents, anything else as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    if unicodedata.combining(character):
        return ""
    similar = unicodedata.normalize("NFKD", character.translate(_SIGNS))
    bare = "".join(part for part in similar if not unicodedata.combining(part))
    return bare if bare.isascii() else bare.encode("ascii", "backslashreplace").decode()


codecs.register_error(_ERRORS, _readable)
