"""A command in several processes, as torchrun starts them: the one that leads speaks, and one says what went wrong."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from abliterate.errors import UsageError
from abliterate.texts.terminal import hushed

if TYPE_CHECKING:
    from typing import TextIO

#: Commands that several processes can do together.
COMMANDS = ("run", "find", "search", "eval", "verify")
#: Seconds that others wait for the process that leads, when something went wrong, before they say it themselves.
_PATIENCE = 3.0

_stderr: TextIO | None = None


def started() -> int:
    """How many processes torchrun has started for this command; 1 where it was started by itself."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 1
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def leads() -> bool:
    """Whether this process speaks: the only one, or the first."""
    return started() == 1 or os.environ["RANK"] == "0"


def run(command: Callable[[], int]) -> int:
    """The exit code of a command, which several processes do together where torchrun has started them.

    All but the one that leads are silent. Raises `UsageError` for a command that one process does.
    """
    global _stderr
    if started() == 1:
        return command()
    if not leads():
        _stderr = hushed()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to clean up
    asked = next((word for word in sys.argv[1:] if not word.startswith("-")), "abliterate")
    if asked not in COMMANDS:
        raise UsageError(
            f"{asked}: expected one of {', '.join(COMMANDS)} in several processes; start it without torchrun"
        )
    from abliterate.monitor import ranks
    from abliterate.prompts.clock import stand_still

    with ranks.joined_processes():
        stand_still(ranks.agreed)
        return command()


def speaker() -> str | None:
    """What stands before a message that ends the command: who says it, "" where that is clear; None for who does not.

    One of several processes says it. What one that had been silent writes to stderr is seen from then on.
    """
    if started() == 1:
        return ""
    from abliterate.monitor import ranks

    if ranks.count() == 1:
        return "" if leads() else None
    if not ranks.first_to_end(_PATIENCE):
        return None
    if _stderr is None:
        return ""
    sys.stderr = _stderr
    return f"{ranks.name()}: "
