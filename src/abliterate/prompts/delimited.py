"""Rows of delimited text (CSV): what parts them is found, and a row that does not fit the header is refused.

Spreadsheets of half the world write semicolons, and files are saved with tabs under either name. A text with a comma
that stands without quotes would be cut at the comma, and a quote that is never closed would swallow the rest of the
file: both would give prompts that nobody wrote, so both are errors.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.errors import PromptError

#: What may part the fields of a row, by what is tried first.
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


@dataclass(frozen=True, slots=True)
class Delimited:
    """A header, and the rows below it that are not empty, each with where it stands ("FILE: row 3 (line 4)")."""

    header: list[str]
    rows: list[tuple[str, list[str]]]


def read_delimited(path: Path, text: str) -> list[dict[str, str]]:
    """The rows of the prompt file `path`, whose text is `text`, under the names of its header.

    Raises what `read_rows` raises, and `PromptError` for a name that stands twice in the header.
    """
    found = read_rows(f"prompt file {path}", text, tabs=path.suffix.lower() == ".tsv")
    if twice := [name for name in found.header if found.header.count(name) > 1]:
        raise PromptError(f"prompt file {path}: expected every column once, found '{twice[0]}' twice in the header")
    return [dict(zip(found.header, row, strict=True)) for _, row in found.rows]


def read_rows(file: str, text: str, *, tabs: bool = False) -> Delimited:
    """The rows of `text`, which stands in `file` (what messages begin with); empty lines are left out.

    What parts the fields is a tab (`tabs`), else that under which all rows have as many fields as the header.

    Raises `PromptError` for a row with more or fewer fields, and for a quote that is not closed.
    """
    with _fields_of_any_length():
        delimiter = "\t" if tabs else _sniffed(text)
        rows = _rows(file, text, delimiter)
        _, header = next(rows, ("", []))
        return Delimited(header, [(where, _fitting(where, row, header, delimiter)) for where, row in rows])


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lift the csv module's limit on fields (128 KiB), which holds for the whole process."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _sniffed(text: str) -> str:
    """Of the delimiters that part the header, one that fits all rows if there is any; else the comma."""
    found = {mark: counts for mark in DELIMITERS if (counts := _counts(text, mark)) and counts[0] > 1}
    return max(found, key=lambda mark: (len(set(found[mark])) == 1, found[mark][0]), default=",")


def _counts(text: str, delimiter: str) -> list[int]:
    """How many fields each row has that is not empty; -1 for one that cannot be parsed, and none after it."""
    counts: list[int] = []
    try:
        counts.extend(len(row) for row in _parser(text, delimiter) if row)
    except csv.Error:
        counts.append(-1)
    return counts


def _parser(text: str, delimiter: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


def _rows(file: str, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The rows that are not empty, each with where it stands; the header is row 0."""
    reader, number = _parser(text, delimiter), 0
    while True:
        where = f"{file}: row {number} (line {reader.line_num + 1})"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise PromptError(f"{where}: {_reason(error)}") from error
        if row:
            yield where, row
            number += 1


def _reason(error: csv.Error) -> str:
    """What the parser found, and what to do."""
    text = str(error)
    if "end of data" in text or "expected after" in text:
        return (
            "expected a double quote that closes the field, found none, or one within the text; write a quote within "
            "a text twice"
        )
    return f"cannot be read ({text})"


def _fitting(where: str, row: list[str], header: Sequence[str], delimiter: str) -> list[str]:
    if len(row) == len(header):
        return row
    mark = DELIMITERS[delimiter]
    todo = (
        f"put a text with a {mark} between double quotes, or give a .txt file with one prompt a line"
        if len(row) > len(header)
        else f"add the missing {mark}"
    )
    names = f"fields ({', '.join(header)})" if len(header) > 1 else f"field ({header[0]})"
    raise PromptError(f"{where}: expected {len(header)} {names}, found {len(row)}; {todo}")
