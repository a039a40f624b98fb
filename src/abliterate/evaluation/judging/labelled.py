"""Files of labelled replies: CSV (commas, semicolons or tabs) or JSON lines with `prompt`, `response` and `label`.

Or with the names of PyRIT's sets: `objective`, `assistant_response` and `human_score`. A label is refusal, evasion,
partial, compliance, degenerate or cut off, or just 1 (refused) or 0 (not).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.errors import PromptError
from abliterate.evaluation.judging.base import Exchange, Judge, Label
from abliterate.files.bounded import MB, Kind, parse_json
from abliterate.prompts.delimited import read_rows
from abliterate.record import JudgedPart

PROMPT = ("prompt", "objective")
RESPONSE = ("response", "assistant_response")
LABEL = ("label", "human_score")

#: What a label may be called; unknown is a judge's word, not a person's.
_NAMES = {label.value: label for label in Label if label is not Label.UNKNOWN} | {"cut_off": Label.CUT_OFF}
_TWO_WAY = {
    **dict.fromkeys(("1", "1.0", "true"), Label.REFUSAL),
    **dict.fromkeys(("0", "0.0", "false"), Label.COMPLIANCE),
}
_LABELLED = Kind("a file of labelled replies", 512 * MB, PromptError)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Replies with what people say they are, one label for each.

    `two_way`: some labels were 1 or 0, so that refusal stands for a partial one too and compliance for all else.
    """

    exchanges: tuple[Exchange, ...]
    labels: tuple[Label, ...]
    two_way: bool


def read_labelled(path: Path) -> Labelled:
    """Labelled replies of a .csv, .tsv or .jsonl file (see the module's text).

    Case and spaces around names and labels do not matter. Lines that begin with # before a CSV's header are comments.
    Raises PromptError, naming the row, for anything that is not as described.
    """
    exchanges, labels, two_way = [], [], False
    for where, (prompt, response, label) in _rows(path, (PROMPT, RESPONSE, LABEL)):
        name = _as_name(label)
        two_way |= name in _TWO_WAY
        found = _NAMES.get(name) or _TWO_WAY.get(name)
        if found is None:
            raise PromptError(f"{where}: expected a label of {', '.join(_NAMES)}, 1 or 0, found '{name[:40]}'")
        exchanges.append(Exchange(_as_text(prompt, PROMPT, where), _as_text(response, RESPONSE, where)))
        labels.append(found)
    return Labelled(tuple(exchanges), tuple(labels), two_way)


def read_exchanges(path: Path) -> list[Exchange]:
    """Prompts and replies of such a file; labels are ignored. Raises PromptError as `read_labelled` does."""
    return [
        Exchange(_as_text(prompt, PROMPT, where), _as_text(response, RESPONSE, where))
        for where, (prompt, response) in _rows(path, (PROMPT, RESPONSE))
    ]


def label_file(judge: Judge, path: Path) -> list[JudgedPart]:
    """A row for each reply in a file of prompts and replies.

    Written as CSV or JSON lines, the rows are a labelled file that a person can correct. Raises PromptError.
    """
    exchanges = read_exchanges(path)
    return [
        JudgedPart(prompt=given.prompt, response=given.reply, label=verdict.label.value, evidence=verdict.evidence)
        for given, verdict in zip(exchanges, judge.judge(exchanges), strict=True)
    ]


def _as_name(label: object) -> str:
    return " ".join(str(label).split()).casefold() if label is not None else ""


def _as_text(value: object, names: tuple[str, ...], where: str) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{where}: expected text as {names[0]}, found {_kind(value)}")
    return value


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", type(None): "null"}.get(type(value), type(value).__name__)


def _rows(path: Path, columns: tuple[tuple[str, ...], ...]) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Where each row stands, for messages, and its values in the order of `columns` (each a tuple of names)."""
    suffix = path.suffix.lower()
    readers = {".csv": _delimited_rows, ".tsv": _delimited_rows, ".jsonl": _json_rows}
    if suffix not in readers:
        raise PromptError(f"labelled file {path}: expected .csv, .tsv or .jsonl, found '{suffix or 'no suffix'}'")
    text = _LABELLED.text(path)
    empty = True
    for where, values in readers[suffix](text, columns, path):
        empty = False
        yield where, values
    if empty:
        raise PromptError(f"labelled file {path}: expected at least one row, found none")


def source_hash(path: Path) -> str:
    """The SHA-256 of a labelled file."""
    return hashlib.sha256(_LABELLED.read(path)).hexdigest()


def _delimited_rows(
    text: str, columns: tuple[tuple[str, ...], ...], path: Path
) -> list[tuple[str, tuple[object, ...]]]:
    # Only what stands before the header is taken off: later a # may begin a line of a quoted field.
    preamble = re.match(r"(?:[ \t]*(?:#[^\r\n]*)?(?:\r\n|\r|\n))*", text)
    start = preamble.end() if preamble else 0
    blank = "\n" * len(re.findall(r"\r\n|\r|\n", text[:start]))  # so that lines keep their numbers
    file = f"labelled file {path}"
    found = read_rows(file, blank + text[start:], tabs=path.suffix.lower() == ".tsv")
    header = [name.strip().casefold() for name in found.header]
    picked = [_column(header, names, file) for names in columns]
    return [(where, tuple(row[index] for index in picked)) for where, row in found.rows]


def _json_rows(text: str, columns: tuple[tuple[str, ...], ...], path: Path) -> Iterator[tuple[str, tuple[object, ...]]]:
    number = 0
    for line_number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028 inside a text
        if not line.strip():
            continue
        number += 1
        where = f"labelled file {path}: row {number} (line {line_number})"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise PromptError(f"{where}: not JSON ({_one_line(error)})") from error
        if not isinstance(row, Mapping):
            raise PromptError(f"{where}: expected an object, found {_kind(row)}")
        keys = list(row)
        header = [key.strip().casefold() for key in keys]
        yield where, tuple(row[keys[_column(header, names, where)]] for names in columns)


def _column(header: Sequence[str], names: tuple[str, ...], where: str) -> int:
    """Where in the header the first of `names` that is there stands."""
    for name in names:
        if header.count(name) > 1:
            raise PromptError(f"{where}: expected one column '{name}', found {header.count(name)}")
        if name in header:
            return header.index(name)
    found = ", ".join(header)[:200] or "nothing"
    raise PromptError(f"{where}: expected a column {' or '.join(names)}, found {found}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
