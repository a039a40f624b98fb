"""The program: its commands, its exit codes, and one line for everything that can go wrong."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from abliterate.cli.apply import apply
from abliterate.cli.audit import audit
from abliterate.cli.chat import chat
from abliterate.cli.compare import compare
from abliterate.cli.eval import evaluate
from abliterate.cli.find import find
from abliterate.cli.harden import harden
from abliterate.cli.inspect import inspect
from abliterate.cli.judge import judge
from abliterate.cli.lab import lab
from abliterate.cli.repair import repair
from abliterate.cli.report import report
from abliterate.cli.run import run
from abliterate.cli.search import search
from abliterate.cli.show import show
from abliterate.cli.undo import undo
from abliterate.cli.verify import verify
from abliterate.errors import AbliterateError, GateNotMet

app = typer.Typer(
    name="abliterate",
    help="Find, prove and edit behavioural directions in open-weight language models.",
    epilog="What the words mean: docs/glossary.md, and at the end of every report.html.",
    no_args_is_help=True,
    add_completion=False,
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


_COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "search": search,
    "find": find,
    "verify": verify,
    "apply": apply,
    "eval": evaluate,
    "compare": compare,
    "inspect": inspect,
    "judge": judge,
    "chat": chat,
    "lab": lab,
    "show": show,
    "report": report,
    "audit": audit,
    "harden": harden,
    "undo": undo,
    "repair": repair,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 usage, 3 a gate was not met, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
    except AbliterateError as error:
        _say(str(error), error.exit_code)
    except typer.Abort:
        _say("interrupted", 130)
    except KeyboardInterrupt:
        _say("interrupted", 130)
    except BrokenPipeError:  # `… | head`
        os._exit(1)
    except OSError as error:
        _say(f"{error.filename or 'file'}: {error.strerror or error}", 1)
    except Exception as error:
        _unexpected(error)
    if code == 130:  # newer versions of typer catch the interrupt themselves and say nothing
        _say("interrupted", code)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _unexpected(error: Exception) -> NoReturn:
    """Usage errors of the parser are one line like all others; anything else is a fault of ours and shows where."""
    usage: Any = typer.BadParameter.__base__  # click's, which newer versions of typer bring along under another name
    if isinstance(error, usage):
        message = error.format_message()
        _say(message, error.exit_code) if message.strip() else sys.exit(error.exit_code)  # no message: help was shown
    raise error


def _say(text: str, code: int) -> NoReturn:
    label = "not done" if code == GateNotMet.exit_code else "error"
    print(f"{label}: {' '.join(text.split())}", file=sys.stderr)  # noqa: T201 - rich would wrap the one line
    sys.exit(code)
