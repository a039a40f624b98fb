"""The command line in this process: exit code, stdout and stderr. What would be a traceback is an error of the test."""

from __future__ import annotations

import contextlib
import io
import signal
from dataclasses import dataclass
from unittest import mock

from abliterate.cli import main


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str

    def failed(self, *parts: str) -> None:
        """Nothing on stdout, one line on stderr with `parts` in it, and an exit code that is not 0."""
        assert self.code != 0, self
        assert self.out == "", self
        assert self.err.count("\n") == 1, self.err
        for part in parts:
            assert part in self.err, self.err


def abliterate(*arguments: object) -> Result:
    """Run `abliterate` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    code: object = None
    try:
        with (
            mock.patch("sys.argv", ["abliterate", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                main()
            except SystemExit as exit_:
                code = exit_.code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(code, int), code
    return Result(code, out.getvalue(), err.getvalue())
