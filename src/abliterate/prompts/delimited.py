"""Rows of delimited text (CSV): what parts them is found, and a row that does not fit the header is refused.

Spreadsheets of half the world write semicolons, and files are saved with tabs under either name. A text with a comma
that stands without quotes would be cut at the comma, and a quote that is never closed would swallow the rest of the
file: both would give prompts that nobody wrote, so both are errors.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from abliterate.errors import PromptError

#: What may part the fields of a row, by what is tried first.
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


def read_delimited(path: Path, text: str) -> list[dict[str, str]]:
    """The rows of `text`, which stands in `path`, under the names of its header; empty lines are left out.

    A .tsv file is parted by tabs; else the delimiter is the one under which all rows have as many fields as the header.

    Raises `PromptError` for a row with more or fewer fields, a quote that is not closed, a name that stands twice.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _sniffed(text)
    rows = _rows(path, text, delimiter)
    _, header = next(rows, ("", []))
    if twice := [name for name in header if header.count(name) > 1]:
        raise PromptError(f"prompt file {path}: expected every column once, found '{twice[0]}' twice in the header")
    return [dict(zip(header, _fitting(path, where, row, header, delimiter), strict=True)) for where, row in rows]


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


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The rows that are not empty, each with where it stands; the header is row 0."""
    reader, number = _parser(text, delimiter), 0
    while True:
        where = f"row {number} (line {reader.line_num + 1})"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise PromptError(f"prompt file {path}: {where}: {_reason(error)}") from error
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


def _fitting(path: Path, where: str, row: Sequence[str], header: Sequence[str], delimiter: str) -> Sequence[str]:
    if len(row) == len(header):
        return row
    mark = DELIMITERS[delimiter]
    todo = (
        f"put a text with a {mark} between double quotes, or give a .txt file with one prompt a line"
        if len(row) > len(header)
        else f"add the missing {mark}"
    )
    names = f"fields ({', '.join(header)})" if len(header) > 1 else f"field ({header[0]})"
    raise PromptError(f"prompt file {path}: {where}: expected {len(header)} {names}, found {len(row)}; {todo}")
