"""Questions with right answers from local files: multiple choice (MMLU-style) and arithmetic (GSM8K-style).

What a file holds is told by its columns: a question, an answer, and options or none.

==========  ==================================================================================================
question    ``question``, ``prompt``, ``problem`` or ``input``
options     ``options`` or ``choices``: a list, or one text of lines "A. …", "B. …"; or columns ``A``, ``B``, …
answer      ``answer``, ``target``, ``label`` or ``answerKey``: a letter, an index from 0, or the option's text;
            without options a number, or a solution that ends with "#### number"
==========  ==================================================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from abliterate.config import as_natural
from abliterate.errors import PromptError, UsageError
from abliterate.evaluation.capability.arithmetic import reference_number
from abliterate.files.bounded import MB, Kind, parse_json
from abliterate.prompts.delimited import read_rows

QUESTION_COLUMNS = ("question", "prompt", "problem", "input")
OPTION_COLUMNS = ("options", "choices")
ANSWER_COLUMNS = ("answer", "target", "label", "answerKey")

_FILE = Kind("a file of questions", 512 * MB, UsageError)


@dataclass(frozen=True, slots=True)
class Choice:
    """A question with options, and which of them is right (an index from 0)."""

    question: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A question whose answer is a number (written as a decimal)."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """Items of one kind, in the order of their file; `name` is the file's without its ending."""

    name: str
    items: tuple[Choice, ...] | tuple[Problem, ...]

    @property
    def digest(self) -> str:
        """Which items these are: results of others cannot be paired with results of these."""
        text = json.dumps([[*map(str, _fields(item))] for item in self.items])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fields(item: Choice | Problem) -> tuple[object, ...]:
    return (item.question, *item.options, item.answer) if isinstance(item, Choice) else (item.question, item.answer)


def load_tasks(paths: Sequence[Path], limit: int | None = None, seed: int = 0) -> list[Task]:
    """One task for each .jsonl, .json or .csv file; of each at most `limit` items, drawn with `seed`.

    Raises `UsageError` for a file that cannot be read or is of neither kind, an answer that is none of the options,
    and two files of one name.
    """
    tasks: list[Task] = []
    for path in paths:
        task = _load(Path(os.path.expanduser(path)), limit, seed)
        if any(task.name == other.name for other in tasks):
            raise UsageError(
                f"task file {path}: expected files of different names, found two '{task.name}'; rename one"
            )
        tasks.append(task)
    return tasks


def _load(path: Path, limit: int | None, seed: int) -> Task:
    rows = _read(path)
    if not rows:
        raise UsageError(f"task file {path}: expected at least one question, found none")
    questions = [_text(row, _column(row, QUESTION_COLUMNS, path, number), path, number) for number, row in rows]
    answers = [row[_column(row, ANSWER_COLUMNS, path, number)] for number, row in rows]
    items: list[Any]
    if _has_options(rows[0][1]):
        options = [_options(row, path, number) for number, row in rows]
        right = _right(answers, options, path)
        items = [Choice(*item) for item in zip(questions, options, right, strict=True)]
    else:
        numbers = [_number(answer, path, number) for (number, _), answer in zip(rows, answers, strict=True)]
        items = [Problem(*item) for item in zip(questions, numbers, strict=True)]
    if limit is not None and limit < len(items):
        items = [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]
    return Task(path.stem, tuple(items))


def _read(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Rows with their numbers from 1."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl", ".json"):
        raise UsageError(f"task file {path}: expected .jsonl, .json or .csv, found '{suffix or 'no suffix'}'")
    if suffix == ".csv":
        try:
            found = read_rows(f"task file {path}", _FILE.text(path))
        except PromptError as error:
            raise UsageError(str(error)) from error
        rows: Any = [dict(zip(found.header, row, strict=True)) for _, row in found.rows]
    else:
        rows = _FILE.json(path) if suffix == ".json" else [row for _, row in _FILE.json_lines(path)]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"task file {path}: expected one object for each question, found something else")
    return list(enumerate(rows, 1))


def _column(row: Mapping[str, Any], names: Sequence[str], path: Path, number: int) -> str:
    found = next((name for name in names if name in row), None)
    if found is None:
        raise UsageError(
            f"task file {path}: row {number}: expected a column {' or '.join(names)}, found {', '.join(map(str, row))}"
        )
    return found


def _text(row: Mapping[str, Any], column: str, path: Path, number: int) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"task file {path}: row {number}: expected text as '{column}', found {value!r}")
    return value.strip()


def _number(answer: object, path: Path, number: int) -> str:
    value = reference_number(answer)
    if value is None:
        raise UsageError(
            f"task file {path}: row {number}: expected a number or a solution that ends with '#### number' as the "
            f"answer, found {str(answer)[-60:]!r}; for multiple choice give a column options"
        )
    return str(value)


def _has_options(row: Mapping[str, Any]) -> bool:
    return any(name in row for name in OPTION_COLUMNS) or {"A", "B"} <= set(row)


def _options(row: Mapping[str, Any], path: Path, number: int) -> tuple[str, ...]:
    column = next((name for name in OPTION_COLUMNS if name in row), None)
    if column is None:
        value: Any = [row[letter] for letter in ascii_uppercase if letter in row]
    else:
        value = row[column]
    options = _split_options(value) if isinstance(value, str) else value
    if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase):
        raise UsageError(
            f"task file {path}: row {number}: expected 2 to 26 options (a list, or lines 'A. …', 'B. …'), "
            f"found {str(value)[:60]!r}"
        )
    texts = tuple(str(option).strip() for option in options)
    if not all(texts):
        raise UsageError(f"task file {path}: row {number}: expected text in every option, found an empty one")
    return texts


def _split_options(text: str) -> list[Any]:
    """Lines "A. …", "B. …" (an option may go on over lines), or a JSON list."""
    if text.lstrip().startswith("["):
        try:
            listed = parse_json(text)
        except ValueError:
            return []
        return listed if isinstance(listed, list) else []
    options: list[str] = []
    for line in text.splitlines():
        letter = ascii_uppercase[min(len(options), len(ascii_uppercase) - 1)]
        match = re.match(rf"\s*\(?{letter}[.):]\s*(.*)", line)
        if match:
            options.append(match[1])
        elif options:
            options[-1] += f"\n{line}"
    return options


def _as_letter(answer: object, options: tuple[str, ...]) -> int | None:
    match = re.fullmatch(r"\(?([A-Z])\)?[.:]?", answer.strip()) if isinstance(answer, str) else None
    return index if match and (index := ascii_uppercase.index(match[1])) < len(options) else None


def _as_index(answer: object, options: tuple[str, ...]) -> int | None:
    if isinstance(answer, str):
        answer = as_natural(answer.strip())
    valid = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options)
    return answer if valid and isinstance(answer, int) else None


def _as_text(answer: object, options: tuple[str, ...]) -> int | None:
    text = answer.strip() if isinstance(answer, str) else None
    return options.index(text) if text in options else None


def _as_labelled(answer: object, options: tuple[str, ...]) -> int | None:
    match = re.fullmatch(r"\(?([A-Z])[.):]\s*(.+)", answer.strip(), re.DOTALL) if isinstance(answer, str) else None
    index = _as_letter(match[1], options) if match else None
    return index if match and index is not None and options[index] == match[2].strip() else None


_READINGS: Mapping[str, Callable[[object, tuple[str, ...]], int | None]] = {
    "letters": _as_letter,
    "indices": _as_index,
    "texts": _as_text,
    "labelled texts": _as_labelled,
}


def _right(answers: Sequence[object], options: Sequence[tuple[str, ...]], path: Path) -> list[int]:
    """Which option each answer means. An answer with two meanings has that which fits the whole file."""
    rows = [
        {name: index for name, read in _READINGS.items() if (index := read(answer, own)) is not None}
        for answer, own in zip(answers, options, strict=True)
    ]
    everywhere = [name for name in _READINGS if all(name in row for row in rows)]
    right = []
    for number, (answer, row) in enumerate(zip(answers, rows, strict=True), 1):
        meanings = set(row.values())
        if len(meanings) > 1:
            meanings = {row[name] for name in everywhere}
        if len(meanings) != 1:
            found = f"{answer!r}, which is {'several of them' if row else 'none of them'}"
            raise UsageError(
                f"task file {path}: row {number}: expected the answer as a letter, an index from 0 or the text of an "
                f"option, found {found}"
            )
        right.append(meanings.pop())
    return right
