"""Options from a file: `--config FILE.toml` on every command with settings, `--from-record` on `run`.

What is given on the command line comes first; what the file gives takes the place of defaults. Values are parsed and
checked as if they had been typed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.errors import UsageError
from abliterate.files.bounded import MB, Kind, named

if TYPE_CHECKING:
    from abliterate.record import Record

_FILE = Kind("a file of options (TOML; `abliterate config MODEL` writes one)", MB, UsageError)

#: What a record does not give: where a result goes and what it replaces is said each time, and so is whatever a
#: stranger's record could do harm with.
NOT_FROM_RECORD = ("out", "overwrite", "force")
#: Whether code that comes with a model or a task may run is for whoever sits here to say, not for a file.
_TYPED_ONLY = ("trust_remote_code", "trust_task_code")


def _file_given(context: typer.Context, path: Path | None) -> Path | None:
    """Take the file's values for defaults. Raises `UsageError`, which names the first that there is no option of."""
    if path is not None:
        path = path.expanduser()
        _take(context, _FILE.toml(path), str(path))
    return path


def _record_given(context: typer.Context, path: Path | None) -> Path | None:
    """Take the settings of a run for defaults. Raises `UsageError` for a record of something else."""
    if path is not None:
        groups = recorded(path).settings
        values = {name: value for group in groups.values() if isinstance(group, dict) for name, value in group.items()}
        values["model"] = groups.get("model")
        left = {*NOT_FROM_RECORD, *_TYPED_ONLY}
        if "@http" in str(values.get("judge")):  # who is sent prompts and replies is said each time
            left.add("judge")
        _take(context, {n: v for n, v in values.items() if v is not None and n not in left}, str(path))
    return path


def recorded(path: Path) -> Record:
    """The record of a run, of its folder or of the file itself."""
    from abliterate.record import FILE_NAME, read_record

    path = path.expanduser()
    record = read_record(path.parent if path.name == FILE_NAME else path)
    if record.plan is None or "model" not in record.settings or "searching" not in record.settings:
        raise UsageError(f"--from-record {path}: expected the record of a run, found that of another command")
    return record


def _take(context: typer.Context, values: Mapping[str, Any], where: str) -> None:
    command: Any = context.command
    known = {one.name: one for one in command.params if one.name not in ("config", "from_record", "help", "help_all")}
    called = {flag.removeprefix("--").replace("-", "_"): name for name, one in known.items() for flag in one.opts}
    found = dict(context.default_map or {})
    for key, value in values.items():
        name = key.replace("-", "_")
        name = name if name in known else called.get(name, name)
        if name not in known:
            like = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {like[0].replace('_', '-')}?" if like else ""
            raise UsageError(f"{where}: '{key}' is no option of {command.name}{hint}")
        if name in _TYPED_ONLY:
            raise UsageError(f"{where}: {key}: no file may say so; give it on the command line")
        found[name] = _typed(key, value, known[name], where)
    context.default_map = found


def _typed(key: str, value: Any, parameter: Any, where: str) -> Any:
    """A value as it would come from the command line."""
    flag = getattr(parameter, "is_flag", False)
    several = getattr(parameter, "multiple", False) or parameter.nargs == -1
    if flag != isinstance(value, bool):
        raise UsageError(f"{where}: {key}: expected {'true or false' if flag else 'another value'}, found {value!r}")
    if flag:
        return value
    if isinstance(value, list) and all(isinstance(one, str | int | float) for one in value):
        texts = list(map(str, value))
        return texts if several else ",".join(texts)
    if not isinstance(value, str | int | float):
        raise UsageError(f"{where}: {key}: expected a text, a number or a list of these, found {named(value)}")
    return [str(value)] if several else str(value)


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_file_given,
        is_eager=True,
        help="Take options from this file (.toml); those given beside it come first.",
        show_default=False,
    ),
]
FromRecord = Annotated[
    Path | None,
    typer.Option(
        "--from-record",
        callback=_record_given,
        is_eager=True,
        help="Do again what the record of a run says (its folder, or abliteration.json), and compare the files.",
        show_default=False,
    ),
]
