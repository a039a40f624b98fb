"""How often a judge is right: labelled replies → a table of errors, kept per judge and per state of that judge.

A file of labelled replies is CSV or JSON lines with `prompt`, `response` and `label`, or with the names of PyRIT's
sets: `objective`, `assistant_response` and `human_score`. A label is refusal, partial, compliance or degenerate, or
just 1 (refused) or 0 (not).
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from abliterate.config import cache_folder
from abliterate.errors import AbliterateError, CheckpointError, PromptError
from abliterate.evaluation.judging.base import Exchange, Judge, Label, Verdict
from abliterate.evaluation.statistics import Estimate, Share, rogan_gladen
from abliterate.files.atomic import write_atomically
from abliterate.files.bounded import MB, Kind, parse_json

PROMPT = ("prompt", "objective")
RESPONSE = ("response", "assistant_response")
LABEL = ("label", "human_score")

#: What a label may be called; unknown is a judge's word, not a person's.
_NAMES = {label.value: label for label in Label if label is not Label.UNKNOWN} | {"cut_off": Label.CUT_OFF}
_TWO_WAY = {
    **dict.fromkeys(("1", "1.0", "true"), Label.REFUSAL),
    **dict.fromkeys(("0", "0.0", "false"), Label.COMPLIANCE),
}
_BUILTIN = "calibrations.json"

_STORED = Kind("a calibration", MB, AbliterateError, "delete it and calibrate again")
_LABELLED = Kind("a file of labelled replies", 512 * MB, PromptError)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Replies with what people say they are, one label for each.

    `two_way`: some labels were 1 or 0, so that refusal stands for a partial one too and compliance for all else.
    """

    exchanges: tuple[Exchange, ...]
    labels: tuple[Label, ...]
    two_way: bool


class Calibration(BaseModel):
    """What a judge called replies that people have labelled.

    Two-way figures count a partial refusal as refused, degenerate text and compliance as not. A reply left without
    a verdict (`unknown`) is wrong in `accuracy` and has no part in the other figures, which speak of judged replies.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    judge: str = Field(description="How a user names the judge.")
    fingerprint: str = Field(description="The state of the judge that was calibrated.")
    source: str = Field(description="Name of the file of labelled replies.")
    source_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    two_way: bool = Field(description="The labels say refused or not, no more.")
    confusion: dict[Label, dict[Label, Annotated[int, Field(ge=0, lt=2**53, strict=True)]]] = Field(
        description="Replies by true label, then by what the judge called them."
    )

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if Label.UNKNOWN in self.confusion:
            raise ValueError("no reply is truly unknown")
        if not self.n:
            raise ValueError("expected at least one labelled reply")
        return self

    @property
    def n(self) -> int:
        """Labelled replies."""
        return self._count((True, False), (True, False, None))

    @property
    def unknown(self) -> int:
        """Replies that the judge gave no verdict on."""
        return self._count((True, False), (None,))

    @property
    def accuracy(self) -> Share:
        """Right among all, two-way."""
        return Share(self._count((True,), (True,)) + self._count((False,), (False,)), self.n)

    @property
    def precision(self) -> Share:
        """Refusals among what was called one."""
        return Share(self._count((True,), (True,)), self._count((True, False), (True,)))

    @property
    def recall(self) -> Share:
        """Called a refusal among the refusals that were judged: the sensitivity."""
        return Share(self._count((True,), (True,)), self._count((True,), (True, False)))

    @property
    def specificity(self) -> Share:
        """Called none among the replies that are none and were judged."""
        return Share(self._count((False,), (False,)), self._count((False,), (True, False)))

    def corrected(self, refusals: int, n: int) -> Estimate | None:
        """The true rate of refusals behind `refusals` called among `n` judged replies; None where nobody can say.

        It holds where the judge errs as often as on the labelled replies.
        """
        return rogan_gladen(refusals, n, self.recall, self.specificity)

    def _count(self, true: Sequence[bool], called: Sequence[bool | None]) -> int:
        rows = [row for label, row in self.confusion.items() if _refused(label) in true]
        return sum(k for row in rows for label, k in row.items() if _refused(label) in called)


def _refused(label: Label) -> bool | None:
    verdict = Verdict(label)
    return verdict.refused if verdict.given else None


def compare(judge: Judge, labelled: Labelled, verdicts: Sequence[Verdict], source: Path) -> Calibration:
    """The calibration that follows from the verdicts of `judge`, one for each labelled reply (else ValueError).

    `source` is the file that the labelled replies came from.
    """
    confusion: dict[Label, dict[Label, int]] = {
        label: dict.fromkeys(Label, 0) for label in Label if label in labelled.labels
    }
    for label, verdict in zip(labelled.labels, verdicts, strict=True):
        confusion[label][verdict.label] += 1
    return Calibration(
        judge=judge.name,
        fingerprint=judge.fingerprint,
        source=source.name,
        source_sha256=hashlib.sha256(_bytes(source)).hexdigest(),
        two_way=labelled.two_way,
        confusion=confusion,
    )


def place(fingerprint: str) -> Path:
    """The file that holds the calibration of a judge in this state."""
    return cache_folder() / "judges" / f"{hashlib.sha256(fingerprint.encode()).hexdigest()}.json"


def store(calibration: Calibration) -> Path:
    """Keep a calibration for its judge, in place of an earlier one; the file is whole or not there at all.

    Raises AbliterateError where it cannot be written.
    """
    path = place(calibration.fingerprint)
    try:
        write_atomically(path, calibration.model_dump_json(indent=1) + "\n", private=True)
    except CheckpointError as error:
        raise AbliterateError(f"calibration {error}; set ABLITERATE_CACHE to a folder that can be") from error
    return path


def calibration_of(judge: Judge) -> Calibration | None:
    """What is known of a judge in its present state: the user's own calibration, else the built-in one, else None.

    Raises AbliterateError when the stored file is damaged.
    """
    path = place(judge.fingerprint)
    if not os.path.lexists(path):
        return _builtin().get(judge.fingerprint)
    found = _STORED.model(path, Calibration)
    if found.fingerprint != judge.fingerprint:
        raise AbliterateError(
            f"calibration {path}: expected one of '{judge.fingerprint}', found '{found.fingerprint}'; delete it and "
            "calibrate again"
        )
    return found


def _builtin() -> dict[str, Calibration]:
    text = resources.files("abliterate.evaluation.judging").joinpath(_BUILTIN).read_bytes()
    return TypeAdapter(dict[str, Calibration]).validate_json(text)


def read_labelled(path: Path) -> Labelled:
    """Labelled replies of a .csv or .jsonl file (see the module's text).

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
    """Prompts and replies of a .csv or .jsonl file; labels are ignored. Raises PromptError as `read_labelled` does."""
    return [
        Exchange(_as_text(prompt, PROMPT, where), _as_text(response, RESPONSE, where))
        for where, (prompt, response) in _rows(path, (PROMPT, RESPONSE))
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
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    if suffix not in readers:
        raise PromptError(f"labelled file {path}: expected .csv or .jsonl, found '{suffix or 'no suffix'}'")
    text = _LABELLED.text(path)
    empty = True
    for where, values in readers[suffix](text, columns, path):
        empty = False
        yield where, values
    if empty:
        raise PromptError(f"labelled file {path}: expected at least one row, found none")


def _bytes(path: Path) -> bytes:
    return _LABELLED.read(path)


def _csv_rows(text: str, columns: tuple[tuple[str, ...], ...], path: Path) -> list[tuple[str, tuple[object, ...]]]:
    # Only what stands before the header is taken off: later a # may begin a line of a quoted field.
    preamble = re.match(r"(?:[ \t]*(?:#[^\r\n]*)?(?:\r\n|\r|\n))*", text)
    start = preamble.end() if preamble else 0
    skipped = len(re.findall(r"\r\n|\r|\n", text[:start]))
    reader = csv.reader(io.StringIO(text[start:], newline=""), strict=True)
    rows: list[tuple[str, tuple[object, ...]]] = []
    with _fields_of_any_length():
        try:
            header = [name.strip().casefold() for name in next(reader, [])]
            picked = [_column(header, names, f"labelled file {path}") for names in columns]
            last = reader.line_num
            for row in reader:
                where = f"labelled file {path}: row {len(rows) + 1} (line {skipped + last + 1})"
                last = reader.line_num
                if row and len(row) != len(header):
                    raise PromptError(f"{where}: expected {len(header)} fields, found {len(row)}; put fields in quotes")
                if row:
                    rows.append((where, tuple(row[index] for index in picked)))
        except csv.Error as error:
            line = skipped + reader.line_num
            raise PromptError(f"labelled file {path}: not CSV near line {line} ({_one_line(error)})") from error
    return rows


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lift the csv module's limit on fields (128 KiB), which holds for the whole process."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


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
