"""Prompt sources: builtin sets, local files and hub datasets, each named by one string (a SPEC).

=============================  ==========================================================
``builtin``                    the set written for this project (CC0), with its own splits
``FILE`` or ``FILE:column``    .json, .jsonl, .csv, .txt (one prompt a line) or .parquet
``id[:config]:split:column``   a dataset of the Hugging Face hub
=============================  ==========================================================
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from abliterate.errors import PromptError

BUILTIN = "builtin"
SetName = Literal["harmful", "harmless", "borderline"]
SplitName = Literal["train", "val", "test"]

#: Columns tried in this order when none is named and the file has more than one.
USUAL_COLUMNS = ("text", "prompt", "instruction", "goal", "behavior", "question", "input")
SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".parquet")


def load_builtin(name: SetName) -> dict[SplitName, list[str]]:
    """The builtin set `name`, by split."""
    text = resources.files(__package__).joinpath(f"data/{name}.jsonl").read_text(encoding="utf-8")
    splits: dict[SplitName, list[str]] = {"train": [], "val": [], "test": []}
    for line in text.splitlines():
        row = json.loads(line)
        splits[row["split"]].append(row["text"])
    return splits


def load_prompts(spec: str) -> list[str]:
    """Prompts named by a file or hub `spec` (see the module's table), in their order, blank ones dropped.

    Raises `PromptError` when the source does not exist, has not the column, or holds no prompts.
    """
    path, column = _split_path(spec)
    if path is not None:
        rows = _read_file(path, column)
    elif ":" in spec:
        rows = _read_hub(spec)
    else:
        raise PromptError(
            f"prompt source '{spec}': no such file; expected 'builtin', FILE[:column] "
            f"({', '.join(SUFFIXES)}) or a hub dataset id[:config]:split:column"
        )
    prompts = [row.strip() for row in rows if row.strip()]
    if not prompts:
        raise PromptError(f"prompt source '{spec}': expected at least one prompt, found none")
    return prompts


def _split_path(spec: str) -> tuple[Path | None, str | None]:
    """`FILE[:column]` taken apart; (None, None) when the spec names no file."""
    whole = Path(spec).expanduser()
    if whole.is_file():
        return whole, None
    head, colon, column = spec.rpartition(":")
    if colon and (path := Path(head).expanduser()).is_file():
        return path, column
    named = path if colon and (path := Path(head)).suffix.lower() in SUFFIXES else whole
    if named.suffix.lower() in SUFFIXES or whole.is_dir():
        found = "a folder" if named.is_dir() else "no such file"
        raise PromptError(f"prompt source '{spec}': expected a prompt file at {named}, found {found}")
    return None, None


def _read_file(path: Path, column: str | None) -> list[str]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".txt":
            if column is not None:
                raise PromptError(f"prompt file {path}: a text file has no columns; expected no ':{column}'")
            return path.read_text(encoding="utf-8-sig").splitlines()
        if suffix == ".parquet":
            return _read_parquet(path, column)
        rows = _read_rows(path, suffix, column)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, csv.Error) as error:
        raise PromptError(f"prompt file {path}: cannot be read ({_one_line(error)})") from error
    if rows and column is None and all(isinstance(row, str) for row in rows):
        return [str(row) for row in rows]
    return _pick_column(rows, column, str(path))


def _read_rows(path: Path, suffix: str, column: str | None) -> list[Any]:
    if suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    if suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut at U+2028 inside a text
        return [_json_line(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if suffix == ".json":
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(data, Mapping):  # {"text": [..], ..} or {"data": [{..}]}
            lists = {key: value for key, value in data.items() if isinstance(value, list)}
            names = (column, *USUAL_COLUMNS, *(lists if len(lists) == 1 else ()))
            if (key := next((name for name in names if name in lists), None)) is not None:
                return [value if isinstance(value, Mapping) else {key: value} for value in lists[key]]
            if lists:
                raise PromptError(f"prompt file {path}: which list? found {', '.join(lists)}; give FILE:column")
        if isinstance(data, list):
            return data
        raise PromptError(f"prompt file {path}: expected a JSON list of texts or objects, found {_kind(data)}")
    raise PromptError(f"prompt file {path}: expected one of {', '.join(SUFFIXES)}, found '{suffix or 'no suffix'}'")


def _json_line(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"prompt file {path}: line {number} is not JSON ({error.msg} at {error.pos + 1})") from error


def _read_parquet(path: Path, column: str | None) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise PromptError(
            f"prompt file {path}: reading Parquet needs pyarrow; pip install 'abliterate[parquet]'"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"prompt file {path}: not a readable Parquet file ({_one_line(error)})") from error
    return _pick_column(rows, column, str(path))


def _read_hub(spec: str) -> list[str]:
    parts = spec.split(":")
    if len(parts) not in (3, 4):
        raise PromptError(f"prompt source '{spec}': expected id[:config]:split:column, found {len(parts)} parts")
    identifier, *config, split, column = parts
    try:
        import datasets
    except ImportError as error:
        raise PromptError(
            f"prompt source '{spec}': hub datasets need an extra; pip install 'abliterate[datasets]'"
        ) from error
    try:
        rows = datasets.load_dataset(identifier, *config, split=split)
    except Exception as error:  # the library raises a dozen kinds, all of which mean "not to be had"
        raise PromptError(f"prompt source '{spec}': cannot be loaded ({_one_line(error)})") from error
    if column not in rows.column_names:
        raise PromptError(f"prompt source '{spec}': no column '{column}'; found {', '.join(rows.column_names)}")
    return [_as_text(value, column, spec) for value in rows[column]]


def _pick_column(rows: Sequence[Any], column: str | None, where: str) -> list[str]:
    if not rows:
        return []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise PromptError(f"prompt file {where}: row {number}: expected an object, found {_kind(row)}")
    columns = list(rows[0])
    if column is None:
        column = next((name for name in USUAL_COLUMNS if name in columns), None)
        if column is None and len(columns) == 1:
            column = columns[0]
        if column is None:
            raise PromptError(
                f"prompt file {where}: which column? found {', '.join(map(str, columns))}; give FILE:column"
            )
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise PromptError(
                f"prompt file {where}: row {number} has no column '{column}'; found {', '.join(map(str, row))}"
            )
    return [_as_text(row[column], column, where) for row in rows]


def _as_text(value: object, column: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PromptError(f"prompt source {where}: column '{column}': expected text, found {_kind(value)}")
    return value


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", type(None): "null"}.get(type(value), type(value).__name__)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
