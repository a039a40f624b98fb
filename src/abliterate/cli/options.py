"""Command-line options made from settings: one option per field, its description the help text."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from abliterate.cli.configured import Config
from abliterate.errors import UsageError

#: Other names of options.
_SHORT = {"out": ["-o"], "method": ["--search"]}

#: Options that are not called like their field.
_FLAGS = {"realisation": "--as"}

#: Panels of the help page, by settings class; of a class made of others, by the one that a field comes from.
_PANELS = {
    "FileSettings": "Reading the model",
    "ModelSettings": "Loading the model",
    "PromptSettings": "Prompts",
    "RefusalSettings": "Finding the direction",
    "VerifySettings": "Finding the direction",
    "SelectSettings": "Finding the direction",
    "FindSettings": "Finding the direction",
    "SearchSettings": "Searching",
    "WriterSettings": "The edit",
    "EditSettings": "The edit",
    "ReplySettings": "Measuring behaviour",
    "ThinkingSettings": "Measuring behaviour",
    "CapabilitySettings": "Measuring behaviour",
    "EvidenceSettings": "Measuring behaviour",
    "EvalSettings": "Measuring behaviour",
    "SteerSettings": "Steering",
    "InspectSettings": "Inspecting",
    "RepairSettings": "Repairing",
    "HardenSettings": "Hardening",
    "EngineSettings": "Another engine",
    "FolderSettings": "Output",
    "OutputSettings": "Output",
}


#: Options of long commands that `--help` shows; `--help-all` shows the rest.
_COMMON = {
    *(
        "behaviour",
        "harmful",
        "harmless",
        "limit",
        "seed",
        "device",
        "quantization",
        "offload",
        "method",
        "max_refusals",
    ),
    *("max_kl", "layers", "strength", "realisation", "out", "overwrite", "force", "judge", "max_new_tokens"),
    "capability",
}
#: A command with more options than this is long.
_LONG = 30


def _help_all(context: typer.Context, wanted: bool) -> None:
    """Print the help of every option, and end."""
    if not wanted:
        return
    command: Any = context.command
    hidden = [one for one in command.params if one.hidden]
    for one in hidden:
        one.hidden = False
    typer.echo(context.get_help())
    for one in hidden:
        one.hidden = True
    raise typer.Exit


HelpAll = Annotated[
    bool, typer.Option("--help-all", callback=_help_all, is_eager=True, help="Show every option and exit.")
]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of the settings it takes.

    The command's first parameter is a dataclass whose fields are settings, each a pydantic model; it gets them
    validated. All its other parameters are keywords of its own; a dataclass among them has the options that are its
    fields.
    """
    (groups, *own) = inspect.signature(command, eval_str=True).parameters.values()
    kinds: dict[str, type[BaseModel]] = {
        name: kind for name, kind in get_type_hints(groups.annotation).items() if issubclass(kind, BaseModel)
    }
    bundles: dict[str, Any] = {one.name: one.annotation for one in own if is_dataclass(one.annotation)}
    described = [(name, field, kind) for kind in kinds.values() for name, field in kind.model_fields.items()]
    long = len(described) > _LONG
    options = [_parameter(*one, hidden=long and one[0] not in _COMMON) for one in described]
    config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config)

    def wrapper(**values: Any) -> None:
        values.pop("config", None)  # it has taken the place of defaults by now
        values.pop("help_all", None)
        taken = {
            group: _build(kind, {name: values.pop(name) for name in kind.model_fields}) for group, kind in kinds.items()
        }
        for name, bundle in bundles.items():
            values[name] = bundle(**{field.name: values.pop(field.name) for field in fields(bundle)})
        command(groups.annotation(**taken), **values)

    everything = inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll)
    mine = (option for one in own for option in (_options_in(bundles[one.name]) if one.name in bundles else [one]))
    parameters = [*mine, config, *([everything] if long else []), *options]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapper.__doc__, wrapper.__name__ = command.__doc__, command.__name__
    return wrapper


def _options_in(bundle: Any) -> list[inspect.Parameter]:
    """The fields of a dataclass of options, each a keyword."""
    inside = inspect.signature(bundle, eval_str=True).parameters.values()
    return [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in inside]


def _parameter(name: str, field: FieldInfo, group: type[BaseModel], *, hidden: bool) -> inspect.Parameter:
    flag = flag_of(name)
    option: Any = typer.Option(
        *([flag, *_SHORT.get(name, [])]),
        help=field.description,
        metavar="|".join(_choices(field.annotation)) or None,
        rich_help_panel=_PANELS.get(group.__name__),
        hidden=hidden,
        show_default=field.default is not None and field.default is not False,
    )
    default = inspect.Parameter.empty if field.is_required() else field.default
    annotation: Any = Annotated.__class_getitem__((_plain(field.annotation), option))  # type: ignore[attr-defined]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def flag_of(name: str) -> str:
    """The option of a field."""
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def _choices(annotation: Any) -> list[str]:
    """What a field that takes one of several words takes."""
    if get_origin(annotation) is Literal:
        return list(map(str, get_args(annotation)))
    return [word for part in get_args(annotation) if part is not str for word in _choices(part)]


def _plain(annotation: Any) -> Any:
    """The type typer parses; limits are checked by the settings class."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        inner = next(_plain(argument) for argument in get_args(annotation) if argument is not type(None))
        return inner | None
    if origin is Annotated:
        return _plain(get_args(annotation)[0])
    if origin is Literal:
        return str
    return annotation if annotation in (str, int, float, bool, Path) else str


def _build(group: type[BaseModel], values: dict[str, Any]) -> BaseModel:
    try:
        return group(**values)
    except UsageError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        first = error.__cause__.errors()[0]
        flag = flag_of(str(first["loc"][0]))
        reason = first["msg"].removeprefix("Value error, ")
        found = str(first["input"])
        found = found if len(found) <= 60 else f"{found[:60]}…"
        raise UsageError(f"{flag} {found}: {reason[0].lower()}{reason[1:]}") from error
