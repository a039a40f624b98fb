"""What several commands take, and how they refuse options that would do nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console

from abliterate.cli import several
from abliterate.cli.options import flag_of
from abliterate.config import EvalSettings, as_natural
from abliterate.errors import UsageError
from abliterate.texts.terminal import terminal, write_json

if TYPE_CHECKING:
    from abliterate.edit.direction import Site
    from abliterate.edit.steering import SteeringVectors
    from abliterate.monitor import Monitor

Result = TypeVar("Result", bound=BaseModel)

Model = Annotated[str, typer.Argument(help="Hub id, folder with safetensors, or .gguf file.", show_default=False)]
DirectionFile = Annotated[
    Path, typer.Option("--direction", help="A direction file (.safetensors).", show_default=False)
]
SteeringFile = Annotated[
    Path,
    typer.Option(
        "--direction",
        help="A direction file, a llama.cpp control vector (.gguf; repeng's too), or safetensors of vectors layer.N, "
        "added to what block N gives (steering-vectors).",
        show_default=False,
    ),
]
OptionalDirection = Annotated[
    Path | None, typer.Option("--direction", help="A direction file to ablate with hooks.", show_default=False)
]
SiteOption = Annotated[
    str | None,
    typer.Option("--site", help="LAYER:POSITION of a candidate in the file, e.g. 14:-1.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@dataclass(frozen=True, slots=True)
class Along:
    """What a model is steered or read along."""

    direction: SteeringFile
    site: SiteOption = None

    @property
    def name(self) -> str:
        """What it is called in results."""
        return str(self.direction)

    def vectors(self) -> SteeringVectors:
        """The file's vectors; of a direction with candidates, the one at the site. Raises `UsageError`."""
        from abliterate.edit.steering import SteeringVectors

        return SteeringVectors.load(self.direction, site_of(self.site))


def refuse_idle(command: str, *given: BaseModel | str | None) -> None:
    """Options that would do nothing are an error."""
    for settings in given:
        if isinstance(settings, BaseModel):
            refuse_set(f"in {command}", settings, *settings.model_fields_set)
        elif settings is not None:
            raise UsageError(f"--site: does nothing in {command}; leave it out")


def refuse_set(where: str, settings: BaseModel, *names: str) -> None:
    """Some of the settings would do nothing there."""
    for name in names:
        if getattr(settings, name) != type(settings).model_fields[name].default:
            raise UsageError(f"{flag_of(name)}: does nothing {where}; leave it out")


def joined(*settings: BaseModel) -> EvalSettings:
    """Settings by concern, as one."""
    return EvalSettings(**{name: value for one in settings for name, value in one})


def say(result: Result, show: Callable[[Result, Console], None], as_json: bool) -> None:
    """The result on stdout: as JSON, or as `show` draws it."""
    if as_json:
        write_json(result.model_dump_json(indent=1))
    else:
        show(result, terminal())


def site_of(option: str | None) -> Site | None:
    """Layer and position of `--site`."""
    if option is None:
        return None
    layer, _, position = option.partition(":")
    block, back = as_natural(layer), as_natural(position.removeprefix("-"))
    if block is None or not back or not position.startswith("-"):
        raise UsageError(f"--site {option}: expected LAYER:POSITION with a negative position, e.g. 14:-1")
    from abliterate.edit.direction import Site

    return Site(block, -back)


def monitor_for(quiet: bool) -> Monitor:
    """Draws progress on stderr; a quiet one only measures, and so do all but the first of several processes."""
    if quiet or not several.leads():
        from abliterate.monitor import Monitor

        return Monitor()
    from abliterate.monitor.live import Screen

    return Screen(terminal(stderr=True))
