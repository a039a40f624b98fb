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
