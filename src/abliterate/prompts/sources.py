"""Prompt sources: builtin sets, published sets, local files and hub datasets, each named by one string (a SPEC).

=============================  ===================================================================
``builtin``                    the set written for this project (CC0), with its own splits
``NAME`` or ``NAME=PATH``      a published set (see `known`) from the hub, or from a copy of its files
``FILE`` or ``FILE:column``    .json, .jsonl, .csv, .txt (one prompt a line) or .parquet
``id[:config]:split:column``   a dataset of the Hugging Face hub
=============================  ===================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from abliterate.errors import PromptError
from abliterate.prompts.known import KNOWN, KnownSet, Role, find_known
from abliterate.prompts.prompt import Prompt, read_messages
from abliterate.prompts.reading import (
    CONVERSATION_COLUMNS,
    SUFFIXES,
    USUAL_COLUMNS,
    Row,
    category_column,
    hub_rows,
    kind,
    load_hub,
    read_file,
)

BUILTIN = "builtin"
SetName = Role
SplitName = Literal["train", "val", "test"]


def load_builtin(name: SetName) -> dict[SplitName, list[Prompt]]:
    """The builtin set `name`, by split."""
    text = resources.files(__package__).joinpath(f"data/{name}.jsonl").read_text(encoding="utf-8")
    splits: dict[SplitName, list[Prompt]] = {"train": [], "val": [], "test": []}
    for line in text.splitlines():
        row = json.loads(line)
        splits[row["split"]].append(Prompt(row["text"], row["category"]))
    return splits


def load_prompts(spec: str, role: SetName = "harmful") -> list[Prompt]:
    """Prompts named by a `spec` other than 'builtin' (see the module's table), in their order, blank ones dropped.

    `role` chooses among the rows of a published set, whose harmful and safe prompts stand together; of other sources
    all are taken. Raises `PromptError` when the source does not exist, has not the column, or holds no such prompts.
    """
    if (known := find_known(spec)) is not None:
        prompts = _load_known(*known, role)
    else:
        path, column = _split_path(spec)
        prompts = _load_hub(spec) if path is None else _prompts(read_file(path, column), column, f"prompt file {path}")
    if not prompts:
        raise PromptError(f"prompt source '{spec}': expected at least one prompt, found none")
    return prompts


def _split_path(spec: str) -> tuple[Path | None, str | None]:
    """`FILE[:column]` taken apart; (None, None) when the spec can only be a dataset of the hub."""
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
    if not colon:
        raise PromptError(
            f"prompt source '{spec}': no such file; expected 'builtin', FILE[:column] ({', '.join(SUFFIXES)}), "
            f"a hub dataset id[:config]:split:column, or one of {', '.join(KNOWN)}"
        )
    return None, None


def _load_known(known: KnownSet, path: Path | None, role: SetName) -> list[Prompt]:
    part = known.part(role)
    if path is None:
        where = f"prompt set '{known.name}' ({known.hub})"
        table = load_hub(known.hub, part.config, part.split, where, known.instead)
        rows: list[Any] = hub_rows(table, table.column_names)
    else:
        file = known.local_file(path, role)
        where = f"prompt set '{known.name}' at {file}"
        rows = read_file(file)
    columns = _columns(rows, where)
    column = next((name for name in known.text if name in columns), None)
    if column is None:
        raise PromptError(f"{where}: expected a column {' or '.join(known.text)}, found {', '.join(map(str, columns))}")
    category = next((name for name in known.category if name in columns), None)
    return _from_rows([row for row in rows if part.keep(row)], column, category, where)


def _load_hub(spec: str) -> list[Prompt]:
    parts = spec.split(":")
    if len(parts) not in (3, 4):
        raise PromptError(f"prompt source '{spec}': expected id[:config]:split:column, found {len(parts)} parts")
    identifier, *config, split, column = parts
    where = f"prompt source '{spec}'"
    table = load_hub(identifier, config[0] if config else None, split, where)
    if column not in table.column_names:
        raise PromptError(f"{where}: no column '{column}'; found {', '.join(table.column_names)}")
    category = category_column(table.column_names)
    needed = [column] if category in (None, column) else [column, category]
    return _from_rows(hub_rows(table, needed), column, category, where)


def _prompts(rows: Sequence[Any], column: str | None, where: str) -> list[Prompt]:
    """The rows of a file as prompts; its column is found when none is named."""
    if column is None and all(isinstance(row, str) for row in rows):
        return [Prompt(text) for row in rows if (text := row.strip())]
    columns = _columns(rows, where)
    if column is None:
        column = next((name for name in (*USUAL_COLUMNS, *CONVERSATION_COLUMNS) if name in columns), None)
        if column is None and len(columns) == 1:
            column = columns[0]
        if column is None:
            raise PromptError(f"{where}: which column? found {', '.join(map(str, columns))}; give FILE:column")
    return _from_rows(rows, column, category_column(columns), where)


def _columns(rows: Sequence[Any], where: str) -> list[str]:
    """The columns of the first row; every row must have some."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise PromptError(f"{where}: row {number}: expected an object, found {kind(row)}")
    return list(rows[0]) if rows else []


def _from_rows(rows: Sequence[Row], column: str, category: str | None, where: str) -> list[Prompt]:
    prompts = []
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise PromptError(f"{where}: row {number} has no column '{column}'; found {', '.join(map(str, row))}")
        label = row.get(category) if category not in (None, column) else None
        try:
            prompt = _prompt(row[column], _label(label))
        except PromptError as error:
            raise PromptError(f"{where}: row {number}: column '{column}': {error}") from error
        if prompt is not None:
            prompts.append(prompt)
    return prompts


def _prompt(value: object, category: str | None) -> Prompt | None:
    """One cell as a prompt; None when it is blank."""
    if value is None or (isinstance(value, str) and not value.strip()) or value == []:
        return None
    if isinstance(value, str):
        return Prompt(value.strip(), category)
    if isinstance(value, list):
        return Prompt.conversation(read_messages(value), category)
    raise PromptError(f"expected text or a list of {{role, content}}, found {kind(value)}")


def _label(value: object) -> str | None:
    """A category as text; what is neither text nor a number is none."""
    return (str(value).strip() or None) if isinstance(value, str | int) and not isinstance(value, bool) else None
