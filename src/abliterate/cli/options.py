"""Command-line options made from settings: one option per field, its description the help text."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from abliterate.errors import UsageError

#: Other names of options.
_SHORT = {"out": ["-o"], "method": ["--search"]}

#: Options that are not called like their field.
_FLAGS = {"realisation": "--as"}

#: Panels of the help page, by settings class.
_PANELS = {
    "FileSettings": "Reading the model",
    "ModelSettings": "Loading the model",
    "PromptSettings": "Prompts",
    "FindSettings": "Finding the direction",
    "SearchSettings": "Searching",
    "EditSettings": "The edit",
    "EvalSettings": "Measuring behaviour",
    "InspectSettings": "Inspecting",
    "HardenSettings": "Hardening",
    "EngineSettings": "Another engine",
    "OutputSettings": "Output",
}


def with_settings(*groups: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per field of each settings class; it gets the settings, validated, by class.

    The command is called with its own parameters and one positional argument per group, in order.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]
        fields = [_parameter(name, field, group) for group in groups for name, field in group.model_fields.items()]

        def wrapper(**values: Any) -> None:
            settings = [_build(group, {name: values.pop(name) for name in group.model_fields}) for group in groups]
            command(*settings, **values)

        wrapper.__signature__ = inspect.Signature([*own, *fields])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *fields]}
        wrapper.__doc__, wrapper.__name__ = command.__doc__, command.__name__
        return wrapper

    return decorate


def _parameter(name: str, field: FieldInfo, group: type[BaseModel]) -> inspect.Parameter:
    flag = flag_of(name)
    option: Any = typer.Option(
        *([flag, *_SHORT.get(name, [])]),
        help=field.description,
        rich_help_panel=_PANELS.get(group.__name__),
        show_default=field.default is not None and field.default is not False,
    )
    default = inspect.Parameter.empty if field.is_required() else field.default
    annotation: Any = Annotated.__class_getitem__((_plain(field.annotation), option))  # type: ignore[attr-defined]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def flag_of(name: str) -> str:
    """The option of a field."""
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


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
    except ValidationError as error:
        first = error.errors()[0]
        flag = flag_of(str(first["loc"][0]))
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{flag} {first['input']}: {reason[0].lower()}{reason[1:]}") from error
