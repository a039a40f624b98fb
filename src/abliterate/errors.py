"""Every error the package raises on purpose.

::

    AbliterateError                exit code 1   something failed; the message says what to do next
    ├── UsageError                 exit code 2   what was asked for makes no sense or is not allowed
    │   └── PromptError                          a prompt source cannot be read or gives nothing
    ├── ModelError                               a model cannot be loaded or is of a kind not supported
    │   ├── ChatTemplateError                    the tokenizer has no chat template
    │   └── AnatomyError                         not every writer to the residual stream is known
    ├── CheckpointError                          files of a checkpoint are damaged, missing or unwritable
    ├── NumericalError                           NaN or infinity where a number was needed
    ├── LostProcessError                         another of several processes that do one job has ended
    └── GateNotMet                 exit code 3   the measurement does not support going on

A message is one line: what, what was expected, what was found, what to do.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from abliterate.texts import printable

#: Characters of a message: it may quote what comes from outside. Of a longer one the beginning and the end are kept.
_HEAD, _TAIL = 1500, 400


class AbliterateError(Exception):
    """Root of the tree; `exit_code` is what the command line returns. A message is one line that any terminal shows."""

    exit_code: int = 1

    def __init__(self, message: str = "") -> None:
        """With a message, of which what does not print is written as an escape."""
        text = printable(message)
        super().__init__(text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]} […] {text[-_TAIL:]}")


#: A command in backticks, which stays; or an option, with what stands for its value in capitals.
_OPTION = re.compile(
    r"`[^`]*`|(?<![\w/.-])(?:--(?P<name>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)|-o)(?P<value> [A-Z][A-Z_.:@]*\b)?(?![\w-])"
)


def keywords_in(message: str) -> str:
    """A message that names options as a shell does (`--max-kl`, `-o OUT`), with Python's keywords in their place."""

    def keyword(match: re.Match[str]) -> str:
        if match[0].startswith("`"):
            return match[0]
        name = (match["name"] or "out").replace("-", "_")
        value = "" if match["value"] is None else f"={match['value'].strip()}"
        return f"{'as_' if name == 'as' else name}{value}"

    return _OPTION.sub(keyword, message)


@contextlib.contextmanager
def in_words_of_python() -> Iterator[None]:
    """Errors of this package that leave the `with` name options as keywords: whoever called wrote Python."""
    try:
        yield
    except AbliterateError as error:
        error.args = (keywords_in(str(error)),)
        raise


class UsageError(AbliterateError):
    """What was asked for makes no sense or is not allowed."""

    exit_code = 2


class PromptError(UsageError):
    """A prompt source cannot be read, has not the column asked for, or gives no prompts."""


class ModelError(AbliterateError):
    """A model cannot be loaded, or is of a kind that is not supported."""


class ChatTemplateError(ModelError):
    """The tokenizer has no chat template, or the one given cannot be used."""


class AnatomyError(ModelError):
    """Not every writer to the residual stream is known, so an edit would be incomplete."""


class CheckpointError(AbliterateError):
    """Files of a checkpoint are damaged, missing, contradictory or cannot be written."""


class NumericalError(AbliterateError):
    """NaN or infinity was found where a finite number is needed."""


class LostProcessError(AbliterateError):
    """Another of several processes that do one job has ended, so that this one cannot go on."""


class GateNotMet(AbliterateError):  # noqa: N818 - a verdict about the model, not a fault of the program
    """The measurement does not support going on: the model does not refuse, or no direction passed."""

    exit_code = 3
