"""Write docs/commands.md: every command with its options, as `--help` has them.

python scripts/commands.py           # writes the page
python scripts/commands.py --check   # exit code 1 when it is not as this would write it
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from abliterate.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """# Commands

Written by `scripts/commands.py` from the program itself; `abliterate COMMAND --help` shows the same. Words are
explained in the [glossary](glossary.md).
"""


def main() -> int:
    """Write or check the page."""
    program: Any = typer.main.get_command(app)
    lines = [line for command in program.commands.values() for line in page(command)]
    text = "\n".join([HEAD.rstrip(), *lines, ""])
    if "--check" in sys.argv:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page(command: Any) -> Iterator[str]:
    """One command in Markdown lines."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    names = " ".join((one.metavar or one.name.upper()) + ("…" if one.nargs == -1 else "") for one in arguments)
    yield ""
    yield f"## {command.name}"
    yield ""
    yield f"    abliterate {command.name} {names} [OPTIONS]"
    yield ""
    yield (command.help or "").strip()
    yield from ("", *(f"- `{one.metavar or one.name.upper()}`: {one.help}" for one in arguments if one.help))
    options = [one for one in command.params if one.param_type_name == "option"]
    for panel, group in groupby(options, lambda one: getattr(one, "rich_help_panel", None) or "Options"):
        yield ""
        yield f"**{panel}**"
        yield ""
        yield "| option | default | |"
        yield "| --- | --- | --- |"
        yield from map(row, group)


def row(option: Any) -> str:
    """One option as a row of a table."""
    plain = option.default is not None and option.default is not False and not callable(option.default)
    default = "required" if option.required else f"`{option.default}`" if plain else ""
    flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    choices = f" `{cell(option.metavar)}`" if option.metavar else ""
    return f"| {flags}{choices} | {default} | {cell(option.help or '')} |"


def cell(text: str) -> str:
    """A text that ends no cell."""
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(main())
