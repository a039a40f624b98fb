"""The program: its commands, its exit codes, and one line for everything that can go wrong."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from abliterate.cli import several
from abliterate.cli.apply import apply
from abliterate.cli.audit import audit
from abliterate.cli.chat import chat
from abliterate.cli.check import check
from abliterate.cli.compare import compare
from abliterate.cli.config import config
from abliterate.cli.eval import evaluate
from abliterate.cli.find import find
from abliterate.cli.harden import harden
from abliterate.cli.inspect import inspect
from abliterate.cli.judge import judge
from abliterate.cli.lab import lab
from abliterate.cli.push import push
from abliterate.cli.read import read
from abliterate.cli.repair import repair
from abliterate.cli.report import report
from abliterate.cli.run import run
from abliterate.cli.search import search
from abliterate.cli.show import show
from abliterate.cli.steer import steer
from abliterate.cli.undo import undo
from abliterate.cli.verify import verify
from abliterate.errors import AbliterateError, GateNotMet
from abliterate.texts import printable
from abliterate.texts.terminal import Steady, steady_streams

app = typer.Typer(
    name="abliterate",
    help="Find, prove and edit behavioural directions in open-weight language models.",
    epilog="What the words mean: docs/glossary.md, and at the end of every report.html.",
    no_args_is_help=True,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        from abliterate._version import __version__

        typer.echo(f"abliterate {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find, prove and edit behavioural directions in open-weight language models."""


#: What people come for, and the commands for it.
_GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Edit a model": {
        "run": run,
        "search": search,
        "find": find,
        "verify": verify,
        "apply": apply,
        "undo": undo,
        "config": config,
    },
    "Steer and read": {"steer": steer, "read": read},
    "Look at and share what was done": {"show": show, "report": report, "lab": lab, "chat": chat, "push": push},
    "Measure": {"eval": evaluate, "compare": compare, "judge": judge},
    "Check and defend": {"check": check, "inspect": inspect, "audit": audit, "harden": harden, "repair": repair},
}
_COMMANDS = {name: command for group in _GROUPS.values() for name, command in group.items()}


def _at_home(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every path that begins with ~ in a user's home: shells see to `-o ~/x`, not to `--out=~/x`."""

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        paths = {name: value for name, value in values.items() if isinstance(value, Path)}
        command(**{**values, **{name: Path(os.path.expanduser(path)) for name, path in paths.items()}})

    return wrapper


#: What stands below the help of a command.
_EXAMPLES = {
    "run": (
        "abliterate run Qwen/Qwen2.5-0.5B-Instruct -o out",
        "abliterate run model.gguf -o adapter --as lora --harmful mine.jsonl --harmless others.jsonl",
        "abliterate run MODEL -o out --behaviour over-refusal --max-kl 0.05",
    ),
    "find": (
        "abliterate find MODEL -o direction.safetensors",
        "abliterate find MODEL -o d.safetensors --behaviour hedging",
    ),
    "check": ("abliterate check out",),
    "inspect": ("abliterate inspect DOWNLOAD --base ORIGINAL", "abliterate inspect DOWNLOAD --activations"),
}

for _group, _commands in _GROUPS.items():
    for _name, _command in _commands.items():
        _below = "\n\n".join(_EXAMPLES.get(_name, ())) or None
        app.command(_name, rich_help_panel=_group, epilog=_below)(_at_home(_command))


#: Commands whose result is what they print, unless one of these options names a file for it.
_PRINTING = {"show", "config", "eval", "compare", "chat", "inspect", "audit", "judge", "steer", "read"}
_WRITING = ("-o", "--out", "--csv", "--calibrate")


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 usage, 3 a gate was not met, 130 interrupted.

    A job that is done is done, also when its result could not be printed: then stderr says so, and the exit code is 1
    only where nothing else holds the result. A reader that has had enough (`| head`) is no failure.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    out, _ = steady_streams()
    signal.signal(signal.SIGTERM, _interrupt)
    code = _run()
    sys.stdout.flush()
    sys.exit(_printed(out) if code == 0 else code)


def _run() -> int:
    """Run a command, say in one line what went wrong, and give the exit code."""
    try:
        return several.run(_program)
    except AbliterateError as error:
        return _say(str(error), error.exit_code)


def _program() -> int:
    try:
        code = app(standalone_mode=False)
    except AbliterateError as error:
        return _say(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _say("interrupted", 130)
    except OSError as error:
        return _say(f"{error.filename or 'file'}: {error.strerror or error}", 1)
    except Exception as error:
        return _unexpected(error)
    if code == 130:  # newer versions of typer catch the interrupt themselves and say nothing
        return _say("interrupted", code)
    return code if isinstance(code, int) else 0


def _printed(out: Steady) -> int:
    """The exit code of a command that is done, after a word on what was not printed of its result."""
    if out.lost is None:
        return 0
    arguments = sys.argv[1:]
    held = not _PRINTING.intersection(arguments[:1]) or any(word.startswith(_WRITING) for word in arguments)
    if out.left_by_reader and not held:  # nothing was lost that anybody wanted
        return 0
    lost = f"not all of the result could be printed ({out.why})"
    return _say(f"done, but {lost}", 0, "warning") if held else _say(lost, 1)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _unexpected(error: Exception) -> int:
    """Usage errors of the parser are one line like all others; anything else is a fault of ours and shows where."""
    usage: Any = typer.BadParameter.__base__  # click's, which newer versions of typer bring along under another name
    if not isinstance(error, usage):
        if (speaker := several.speaker()) is None:
            return 1
        print(speaker, end="", file=sys.stderr)  # noqa: T201 - before the traceback
        raise error
    message = error.format_message()  # none where help was shown
    return _say(message, error.exit_code) if message.strip() else int(error.exit_code)


def _say(text: str, code: int, label: str = "") -> int:
    if (speaker := "" if label else several.speaker()) is None:
        return code
    label = label or ("not done" if code == GateNotMet.exit_code else "error")
    print(f"{speaker}{label}: {' '.join(printable(text).split())}", file=sys.stderr)  # noqa: T201 - rich would wrap the one line
    return code
