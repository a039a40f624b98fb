"""A SPEC taken apart: which file or dataset, which of its rows, which column. Reads nothing but names.

Rows are cut as `datasets` cuts splits: ``[:400]``, ``[10%:20%]``, ``[-100:]``. A slice stands behind the split of a
dataset of the hub, or behind a file or its column.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from abliterate.errors import PromptError
from abliterate.prompts.reading import SUFFIXES

Row = TypeVar("Row")

_SLICE = re.compile(r"\[(?:(-?\d{1,12})(%?))?:(?:(-?\d{1,12})(%?))?\]")
#: Colons that part a spec: not those within the brackets of a slice.
_COLON = re.compile(r":(?![^\[:]*\])")
#: How the hub's pages and file system name a dataset, and the branch within it.
_URL = re.compile(r"^(?:https?://(?:www\.)?huggingface\.co/|hf://)datasets/")
_BRANCH = re.compile(r"^([^/:]+/[^/:@]+)/(?:resolve|blob|raw|tree)/main/")


@dataclass(frozen=True, slots=True)
class Cut:
    """Which rows, from `start` up to `stop`; those with `percent` are shares of all, rounded to the nearest row."""

    start: int | None = None
    stop: int | None = None
    percent: tuple[bool, bool] = (False, False)

    def of(self, rows: list[Row]) -> list[Row]:
        """The rows themselves."""
        ends = [
            round(len(rows) * end / 100) if share and end is not None else end
            for end, share in zip((self.start, self.stop), self.percent, strict=True)
        ]
        return rows[slice(*ends)]


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A file, its column where one is named, and which of its rows are meant."""

    path: Path
    column: str | None
    cut: Cut


@dataclass(frozen=True, slots=True)
class HubSource:
    """A split of a dataset of the hub (with its slice), or of some of its files; `column` where one is named."""

    identifier: str
    config: str | None
    split: str
    column: str | None
    files: str | None = None


def find_local(spec: str) -> LocalSource | None:
    """The file that a spec names, if there is one: ``FILE[SLICE][:column]`` or ``FILE[:column][SLICE]``."""
    parts = _COLON.split(spec)
    for count in range(len(parts), 0, -1):
        head, rest = ":".join(parts[:count]), parts[count:]
        name, cut = _cut_off(head)
        for written, slice_ in ((head, None), (name, cut)):
            path = Path(os.path.expanduser(written))
            if path.is_file():
                return _local(spec, path, rest, slice_)
    return None


def _local(spec: str, path: Path, rest: list[str], cut: Cut | None) -> LocalSource:
    """`rest` is what stands behind the file: nothing, a column, or what a hub dataset calls its only split and one."""
    if len(rest) > 1 and _cut_off(rest[0])[0] == "train":
        first, rest = _cut_off(rest[0])[1], rest[1:]
        cut = cut or first
    column, last = _cut_off(":".join(rest))
    if cut is not None and last is not None:
        raise PromptError(f"prompt source '{spec}': expected one slice of rows, found two")
    return LocalSource(path, column or None, cut or last or Cut())


def _cut_off(text: str) -> tuple[str, Cut | None]:
    """A slice at the end taken off; the whole text and None where there is none."""
    name, bracket, inside = text.rpartition("[")
    found = _SLICE.fullmatch(bracket + inside)
    if found is None or not name:
        return text, None
    start, start_share, stop, stop_share = found.groups()
    ends = [None if end is None else int(end) for end in (start, stop)]
    return name, Cut(ends[0], ends[1], (bool(start_share), bool(stop_share)))


def missing_file(spec: str) -> tuple[Path, bool]:
    """The path that a spec would name, and whether it must be one: not if it can be a file of a dataset of the hub."""
    name, _ = _cut_off(_COLON.split(spec)[0])
    path, whole = Path(os.path.expanduser(name)), Path(os.path.expanduser(spec))
    if path.suffix.lower() not in SUFFIXES and (whole.suffix.lower() in SUFFIXES or whole.is_dir()):
        path = whole
    return path, not _URL.match(spec) and _files(name) is None


def _files(name: str) -> tuple[str, str] | None:
    """``owner/name/PATH`` parted into the dataset and its files; None where it is no such thing."""
    owner, _, rest = name.partition("/")
    dataset, slash, inside = rest.partition("/")
    named = all((owner, dataset, slash, inside)) and owner not in (".", "..", "~") and not Path(owner).exists()
    return (f"{owner}/{dataset}", inside) if named and Path(inside).suffix.lower() in SUFFIXES else None


def read_hub(spec: str) -> HubSource:
    """The dataset, or the files of one, that a spec names by id or by address.

    Raises `PromptError` when it has not the parts that it takes.
    """
    plain = _BRANCH.sub(r"\1/", _URL.sub("", spec))
    first, *rest = _COLON.split(plain)
    name, _ = _cut_off(first)
    if (files := _files(name)) is not None:
        if len(rest) > 2:
            raise PromptError(
                f"prompt source '{spec}': expected id/FILES[:split][:column], found {len(rest) + 1} parts"
            )
        split = rest[0] if len(rest) == 2 else "train" + first[len(name) :]
        return HubSource(files[0], None, split, rest[-1] if rest else None, files[1])
    if len(rest) not in (2, 3):
        raise PromptError(f"prompt source '{spec}': expected id[:config]:split:column, found {len(rest) + 1} parts")
    *config, split, column = rest
    return HubSource(name, config[0] if config else None, split, column)
