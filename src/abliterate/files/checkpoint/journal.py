"""What is already written, kept on disk so that a run that was killed can be taken up again.

A journal is a text file of one JSON object a line: first what the run is (its key), then one line for each finished
file, added when the file is on disk and flushed at once. Only the last line can be half there after a crash; it does
not count.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from abliterate.errors import CheckpointError
from abliterate.files.atomic import real_folder
from abliterate.files.bounded import MB, Kind
from abliterate.files.checkpoint.growing import sync_path
from abliterate.files.portable import NO_LINK, open_file

MODEL = "model"
"""The folder, beside the journal, that is to become OUT."""

SCRATCH = "scratch"
"""The folder beside it for what a caller wants to survive a kill."""

_NAME = "journal.jsonl"
_JOURNAL = Kind("a journal", 512 * MB)


@dataclass(frozen=True, slots=True)
class Note:
    """What a caller wants to find again with a finished file: anything JSON can hold, and files of its own.

    What comes back of `value` is what JSON makes of it (tuples are lists). `files` must lie in the journal's `scratch`
    folder or in the new model folder; `write_edited` flushes them.
    """

    value: Any = None
    files: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """A file that is written and on disk.

    `source_sha256` is the hash of the source's file of the same layout, where there is one; `note` is the caller's,
    `files` are the caller's files with their sizes, by path from the folder of the journal.
    """

    nbytes: int
    sha256: str
    source_sha256: str | None = None
    note: Any = None
    files: Mapping[str, int] = field(default_factory=dict)


class Journal:
    """The finished files of one run, by name."""

    def __init__(self, place: Path, key: str) -> None:
        """Begin a journal in the folder `place`, or go on with the one that is there if its key is the same."""
        self.place = place
        self.finished: dict[str, Finished] = {}
        for folder in (self.folder, self.scratch):
            real_folder(folder)
        self._begin(key)

    @property
    def folder(self) -> Path:
        """The new model folder."""
        return self.place / MODEL

    @property
    def scratch(self) -> Path:
        """A folder for a caller's files that survives a kill, and is removed when all is done."""
        return self.place / SCRATCH

    @property
    def kept_bytes(self) -> int:
        """Bytes of the finished files."""
        return sum(finished.nbytes for finished in self.finished.values())

    def add(self, name: str, finished: Finished) -> None:
        """Write down that the file `name` is on disk; the caller has seen to that."""
        _append(self.place / _NAME, _line((name, finished)))
        self.finished[name] = finished

    def relative(self, path: Path) -> str:
        """`path` as the journal names it."""
        return str(path.absolute().relative_to(self.place.absolute()))

    def _begin(self, key: str) -> None:
        first, *entries = _whole_lines(self.place / _NAME) or [{}]
        if first == {"key": key}:
            with suppress(KeyError, TypeError):  # not lines of ours
                found = {entry.pop("file"): Finished(**entry) for entry in entries}
                self.finished = {name: entry for name, entry in found.items() if self._holds(name, entry)}
        keep = {str(PurePosixPath(MODEL, name)) for name in self.finished}
        keep.update(*(entry.files for entry in self.finished.values()))
        for folder in (MODEL, SCRATCH):
            _remove_others(self.place, folder, keep)
        new = self.place / f"{_NAME}.new"
        new.unlink(missing_ok=True)
        _append(new, {"key": key}, *map(_line, self.finished.items()))
        os.replace(new, self.place / _NAME)
        sync_path(self.place)

    def _holds(self, name: str, entry: Finished) -> bool:
        """Whether the files of an entry are there with their sizes."""
        sizes = {str(PurePosixPath(MODEL, name)): entry.nbytes, **entry.files}
        return all(_is_file(self.place / name, nbytes) for name, nbytes in sizes.items())


def read_key(place: Path) -> str | None:
    """The key of the journal in the folder `place`; None where there is none."""
    lines = _whole_lines(place / _NAME)
    return lines[0].get("key") if lines else None


def _line(entry: tuple[str, Finished]) -> dict[str, Any]:
    return {"file": entry[0], **asdict(entry[1])}


def _append(path: Path, *lines: Mapping[str, Any]) -> None:
    handle = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK, 0o600)
    with open(handle, "ab") as file:
        file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines before the first that is not whole."""
    lines: list[dict[str, Any]] = []
    with suppress(CheckpointError):
        for line in _JOURNAL.read(path).splitlines(keepends=True):
            value = _JOURNAL.parsed(path, line) if line.endswith(b"\n") else None
            if not isinstance(value, dict):
                break
            lines.append(value)
    return lines


def _is_file(path: Path, nbytes: int) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == nbytes


def _remove_others(place: Path, folder: str, keep: Collection[str]) -> None:
    """Remove the files below `folder` that are not in `keep`, and the folders that are empty then."""
    for parent, folders, names in os.walk(place / folder, topdown=False):
        links = (name for name in folders if os.path.islink(os.path.join(parent, name)))
        for name in (*names, *links):
            path = Path(parent, name)
            if str(path.relative_to(place)) not in keep:
                path.unlink()
        if Path(parent) != place / folder and not os.listdir(parent):
            os.rmdir(parent)
