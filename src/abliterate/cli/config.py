"""`abliterate config`: a file with every option of a run, to be edited and given as `--config`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from abliterate.cli.arguments import Model
from abliterate.cli.options import flag_of
from abliterate.config import RunSettings
from abliterate.texts.terminal import write_lines

_HEAD = """\
# Options of `abliterate run --config THIS_FILE -o OUT`. What is behind a # has its default.
# Options given on the command line come first.
"""


def config(
    *,
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write to this file instead of stdout.", show_default=False)
    ] = None,
) -> None:
    """Print a file with every option of `run` and what it does, for `--config`."""
    text = written(model)
    if out is None:
        write_lines(text)
        return
    from abliterate.files.atomic import refuse_other_kinds, write_atomically

    refuse_other_kinds(out)
    write_atomically(out, text)


def written(model: str) -> str:
    """The file for a model: each option with its description and its default, commented out."""
    lines = [_HEAD, f"model = {json.dumps(model, ensure_ascii=False)}"]
    for name, group in RunSettings.model_fields.items():
        if name != "model" and name != "output":
            lines += ["", f"# --- {name}", *_options(group.annotation)]
    return "\n".join(lines) + "\n"


def _options(kind: Any) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        key, default = flag_of(name).removeprefix("--"), field.default
        yield ""
        yield from textwrap.wrap(field.description or "", 110, initial_indent="# ", subsequent_indent="# ")
        value = default if isinstance(default, bool | int | float) else str(default)
        yield f"# {key} =" + ("" if default is None else f" {json.dumps(value, ensure_ascii=False)}")
