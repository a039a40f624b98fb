"""Prompt sources: builtin sets, published sets, local files and hub datasets, each named by one string (a SPEC).

=============================  ===================================================================
``builtin``                    the set written for this project (CC0), with its own splits; ``builtin:NAME`` another
                               than the one of the side
``NAME`` or ``NAME=PATH``      a published set (see `known`) from the hub, or from a copy of its files
``FILE`` or ``FILE:column``    .json, .jsonl, .csv, .tsv, .txt (one prompt a line) or .parquet
``id[:config]:split:column``   a dataset of the Hugging Face hub
``id/FILES[:column]``          files of such a dataset, by a path or a pattern (``id/data/*.parquet``)
=============================  ===================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from abliterate.config import given_prompts
from abliterate.errors import PromptError
from abliterate.prompts.known import KNOWN, KnownSet, Role, find_known
from abliterate.prompts.prompt import Prompt, check_encodable, read_conversation
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
from abliterate.prompts.specs import HubSource, find_local, missing_file, read_hub

BUILTIN = "builtin"
SetName = Role
SplitName = Literal["train", "val", "test"]


def builtin_set(spec: str, role: SetName) -> SetName | None:
    """The builtin set with its own splits that a spec names, for that role; None of any other source."""
    if spec == BUILTIN:
        return role
    name = spec.removeprefix(f"{BUILTIN}:")
    return next((known for known in get_args(SetName) if spec != name == known), None)


def load_builtin(name: SetName) -> dict[SplitName, list[Prompt]]:
    """The builtin set `name`, by split."""
    text = resources.files(__package__).joinpath(f"data/{name}.jsonl").read_text(encoding="utf-8")
    splits: dict[SplitName, list[Prompt]] = {"train": [], "val": [], "test": []}
    for line in text.splitlines():
        row = json.loads(line)
        splits[row["split"]].append(Prompt(row["text"], row["category"]))
    return splits


def load_prompts(spec: str, role: SetName = "harmful") -> list[Prompt]:
    """Prompts named by a `spec` (see the module's table), in their order, blank ones dropped.

    `role` chooses among the rows of a published set, whose harmful and safe prompts stand together; of other sources
    all are taken. Raises `PromptError` when the source does not exist, has not the column, or holds no such prompts.
    """
    if (given := given_prompts(spec)) is not None:
        prompts = _given(given, spec)
    elif (whole := builtin_set(spec, role)) is not None:
        prompts = [prompt for part in load_builtin(whole).values() for prompt in part]
    elif spec.startswith(f"{BUILTIN}:"):
        prompts = _of_behaviour(spec.removeprefix(f"{BUILTIN}:"), spec)
    elif (known := find_known(spec)) is not None:
        prompts = _load_known(*known, role)
    elif (local := find_local(spec)) is not None:
        rows = local.cut.of(read_file(local.path, local.column))
        prompts = _prompts(rows, local.column, f"prompt file {local.path}")
    else:
        _refuse_missing(spec)
        prompts = _load_hub(read_hub(spec), f"prompt source '{spec}'")
    if not prompts:
        raise PromptError(f"prompt source '{spec}': expected at least one prompt, found none")
    return prompts


def _of_behaviour(name: str, spec: str) -> list[Prompt]:
    """The prompts of a builtin behaviour, by the name of their file."""
    if not re.fullmatch(r"[a-z-]+\.jsonl", name):
        raise PromptError(f"prompt source '{spec}': expected {', '.join(get_args(SetName))} after 'builtin:'")
    text = resources.files(__package__).joinpath(f"data/behaviours/{name}").read_text(encoding="utf-8")
    return [Prompt(row["text"], row.get("category")) for row in map(json.loads, text.splitlines())]


def _given(rows: Sequence[Any], where: str) -> list[Prompt]:
    """Prompts that were given as a list: texts, conversations (lists of messages), or rows with columns."""
    if not all(isinstance(row, str) for row in rows):
        columns = [{CONVERSATION_COLUMNS[0]: [*row]} if isinstance(row, list | tuple) else row for row in rows]
        return _prompts(columns, None, where)
    return [row if isinstance(row, Prompt) else Prompt(row.strip()) for row in rows if row.strip()]


def _refuse_missing(spec: str) -> None:
    """Raise `PromptError` for what can only have been meant as a file, or as nothing that there is."""
    named, local = missing_file(spec)
    if local and (named.suffix.lower() in SUFFIXES or named.is_dir()):
        found = "a folder" if named.is_dir() else "no such file"
        raise PromptError(f"prompt source '{spec}': expected a prompt file at {named}, found {found}")
    if local and ":" not in spec:
        raise PromptError(
            f"prompt source '{spec}': no such file; expected 'builtin', FILE[:column] ({', '.join(SUFFIXES)}), "
            f"a hub dataset id[:config]:split:column, or one of {', '.join(KNOWN)}"
        )


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


def _load_hub(source: HubSource, where: str) -> list[Prompt]:
    instead = "" if source.files is None else "nor is there such a file here: give a path that exists"
    table = load_hub(source.identifier, source.config, source.split, where, instead, source.files)
    column = source.column or _column_of(table.column_names, where)
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
    return _from_rows(rows, column or _column_of(columns, where), category_column(columns), where)


def _column_of(columns: Sequence[str], where: str) -> str:
    """The column with the prompts where none was named."""
    usual = next((name for name in (*USUAL_COLUMNS, *CONVERSATION_COLUMNS) if name in columns), None)
    if usual is None and len(columns) != 1:
        raise PromptError(f"{where}: which column? found {', '.join(map(str, columns))}; give FILE:column")
    return usual or columns[0]


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
        return read_conversation(value, category)
    raise PromptError(f"expected text or a list of {{role, content}}, found {kind(value)}")


def _label(value: object) -> str | None:
    """A category as text; what is neither text nor a number is none."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    text = str(value).strip()
    check_encodable(text)
    return text or None
