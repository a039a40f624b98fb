"""Rows of prompt files and of hub datasets, as they are: texts or mappings from column to value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.errors import PromptError
from abliterate.files.bounded import MB, Kind
from abliterate.monitor import without_bars
from abliterate.prompts.delimited import read_delimited

#: Columns tried in this order when none is named and the file has more than one.
USUAL_COLUMNS = ("text", "prompt", "instruction", "goal", "behavior", "question", "input")
#: Columns that hold whole conversations, tried after those.
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation", "turns")
#: What sets call the column that says which kind a prompt is of, without case and underscores; the first one counts.
CATEGORY_COLUMNS = ("category", "semanticcategory", "riskcategory", "harmcategory", "functionalcategory", "type")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")

Row = Mapping[str, Any]

_FILE = Kind("a prompt file", 1000 * MB, PromptError, raw_texts=True)
#: Rows of a Parquet file that are unpacked together, and all that are read.
_BATCH, _MOST_ROWS = 256, 10_000_000


def category_column(columns: Sequence[Any]) -> str | None:
    """The column that tells the kind of prompt, or None."""
    plain = {str(column).casefold().replace("_", "").replace(" ", ""): column for column in columns}
    return next((plain[name] for name in CATEGORY_COLUMNS if name in plain), None)


def read_file(path: Path, column: str | None = None) -> list[Any]:
    """All rows of a file, by its suffix. `column` chooses among the lists of a JSON object.

    Raises `PromptError` for a file that is not what its suffix says.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":
        if column is not None:
            raise PromptError(f"prompt file {path}: a text file has no columns; expected no ':{column}'")
        return _FILE.text(path).splitlines()
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix in (".csv", ".tsv"):
        return list(read_delimited(path, _FILE.text(path)))  # line ends as they are
    if suffix == ".jsonl":
        return [row for _, row in _FILE.json_lines(path)]
    if suffix == ".json":
        return _json_rows(_FILE.json(path), path, column)
    raise PromptError(f"prompt file {path}: expected one of {', '.join(SUFFIXES)}, found '{suffix or 'no suffix'}'")


def _json_rows(data: Any, path: Path, column: str | None) -> list[Any]:
    if isinstance(data, Mapping):  # {"text": [..], "category": [..]} or {"data": [{..}]}
        lists = {key: value for key, value in data.items() if isinstance(value, list)}
        names = (column, *USUAL_COLUMNS, *CONVERSATION_COLUMNS, *(lists if len(lists) == 1 else ()))
        if (key := next((name for name in names if name in lists), None)) is not None:
            return _zipped(lists, key)
        if lists:
            raise PromptError(f"prompt file {path}: which list? found {', '.join(lists)}; give FILE:column")
    if isinstance(data, list):
        return data
    raise PromptError(f"prompt file {path}: expected a JSON list of texts or objects, found {kind(data)}")


def _zipped(lists: Mapping[str, list[Any]], key: str) -> list[Any]:
    """The list `key` as rows, each with its category when there is a list of those as long."""
    values, category = lists[key], category_column(list(lists))
    if category not in (None, key) and len(lists[category]) == len(values):
        return [{key: value, category: kind} for value, kind in zip(values, lists[category], strict=True)]
    return [value if isinstance(value, Mapping) else {key: value} for value in values]


def _read_parquet(path: Path) -> list[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise PromptError(
            f"prompt file {path}: reading Parquet needs pyarrow; pip install 'abliterate[parquet]'"
        ) from error
    size, rows = 0, list[Any]()
    with _FILE.opened(path) as file:
        try:
            # A page can say one long text a million times: what is unpacked is counted.
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=_BATCH):
                size += batch.nbytes
                if size > _FILE.most_bytes or len(rows) > _MOST_ROWS:
                    break
                cells = [_cells(column) for column in batch.columns]
                rows += [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*cells, strict=True)]
            else:
                return rows
        except Exception as error:  # a damaged file shows as any error of pyarrow or of Python
            raise PromptError(f"prompt file {path}: not a readable Parquet file ({one_line(error)})") from error
    raise _FILE.refused(path, f"more than {_FILE.most_bytes / MB:g} MB or {_MOST_ROWS:,} rows when unpacked")


def _cells(column: Any) -> list[Any]:
    """The cells of a column; of one that Python has no values for (dates before year 1), its type in every cell."""
    try:
        cells: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, TypeError):
        return [column.type] * len(column)
    return cells


def load_hub(
    identifier: str, config: str | None, split: str, what: str, instead: str = "", files: str | None = None
) -> Any:
    """A split of a hub dataset, as `datasets` gives it; with `files` (a path or pattern in it) made of those alone.

    `what` and `instead` frame the error: what failed, what to do.

    Raises `PromptError` when the library is missing or the dataset is not to be had, for whatever reason.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise PromptError(
            f"{what}: hub datasets need an extra; pip install 'abliterate[datasets]'{instead and f', or {instead}'}"
        ) from error
    try:
        options = {} if files is None else {"data_files": files}
        with without_bars(datasets, huggingface_hub.utils):
            return datasets.load_dataset(identifier, *(() if config is None else (config,)), split=split, **options)
    except Exception as error:  # the library raises a dozen kinds, all of which mean "not to be had"
        raise PromptError(f"{what}: cannot be loaded ({one_line(error)}){instead and f'; {instead}'}") from error


def hub_rows(table: Any, columns: Sequence[str]) -> list[Row]:
    """The rows of a hub dataset with these of its columns only."""
    values = zip(*(table[column] for column in columns), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]


def kind(value: object) -> str:
    """What a value is, in JSON's words."""
    return {dict: "an object", list: "a list", type(None): "null"}.get(type(value), type(value).__name__)


def one_line(error: Exception) -> str:
    """The message of an error from elsewhere, folded and cut."""
    return " ".join(str(error).split())[:200] or type(error).__name__
