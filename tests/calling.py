"""The command line in this process, for tests that ask what it says and not that it starts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from abliterate.cli import main


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str

    def failed(self, code: int, *parts: str) -> None:
        """Nothing on stdout, exactly one line on stderr with `parts` in it, and the exit code."""
        assert (self.code, self.out) == (code, ""), self
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("not done: " if code == 3 else "error: ")
        for part in parts:
            assert part in self.err


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Run the command line in this process; what would be a traceback is an error of the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["abliterate", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capfd.readouterr()
        code = exit_.value.code
        assert isinstance(code, int)
        return Result(code, out, err)

    yield call
    signal.signal(signal.SIGTERM, before)
