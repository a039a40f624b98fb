"""A sample of damaged files for every reader (`python tests/fuzzing.py` reads 20,000 of each)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import fuzzing
from abliterate.errors import UsageError
from fuzzed_kinds import kinds
from fuzzing import Kind, fuzz

SAMPLE = 200
KINDS = {kind.name: kind for kind in kinds()}


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_read_or_refused_in_one_line(name: str) -> None:
    found = fuzz(KINDS[name], SAMPLE)
    assert found.faults == ()
    assert found.read + found.refused == SAMPLE


def _raises(path: Path) -> None:
    raise KeyError(path.read_bytes()[:1])


def _says_too_much(path: Path) -> None:
    raise UsageError("")


def _reads_elsewhere(path: Path) -> None:
    Path("/etc/hostname").read_bytes()


def _writes_elsewhere(path: Path) -> None:
    (path.parents[1] / f"{path.parent.name}.elsewhere").mkdir()


def _hangs(path: Path) -> None:
    time.sleep(0.02)


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (_raises, "KeyError"),
        (_says_too_much, "says ''"),
        (_reads_elsewhere, "touches open /etc/hostname"),
        (_writes_elsewhere, "touches os.mkdir"),
        (_hangs, "took"),
    ],
)
def test_what_readers_must_not_do_is_seen(
    read: fuzzing.Reader, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The control."""
    monkeypatch.setattr(fuzzing, "PATIENCE", 0.01)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.path.isdir", lambda _: False)
    calls: list[Path] = []

    def later(path: Path) -> None:
        calls.append(path)
        if len(calls) > 1:  # the first file is a good one, read without a watch
            read(path)

    ((case, fault),) = fuzz(Kind("x.json", b'{"a": 1}', later), 1).faults
    assert case == 0
    assert said in fault
