"""What can be made again, kept on disk: one folder for each kind of thing, one file for each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.config import cache_folder
from abliterate.errors import CheckpointError
from abliterate.files.atomic import write_atomically
from abliterate.files.bounded import Kind
from abliterate.monitor import ranks

#: Seconds after which a folder is looked at again for more than it may hold.
_PRUNE_EVERY = 60.0
_pruned: dict[Path, float] = {}


def digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class DiskCache:
    """Values that JSON can hold, under keys, in the folder `name` of the cache, readable by the owner only.

    Every file begins with the digest of its value: one that is damaged or cut off is as good as none. Beyond
    `most_bytes` (looked at once a minute) the files that were unused for longest are removed. A folder that cannot be
    written is done without.
    """

    name: str
    most_bytes: int

    @property
    def folder(self) -> Path:
        """Where the values lie."""
        return cache_folder() / self.name

    def place(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"{digest(key)}.json"

    def read(self, key: str) -> Any:
        """The value kept under `key`, or None. It counts as used now."""
        path, kind = self.place(key), Kind("what was kept", self.most_bytes)
        try:
            found, _, text = kind.text(path).partition("\n")
            value = kind.parsed(path, text) if found == digest(text) else None
        except CheckpointError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return value

    def write(self, key: str, value: Any) -> None:
        """Keep `value` under `key`, whole or not at all; of several processes the one that leads does."""
        if not ranks.leads():
            return
        text = json.dumps(value, separators=(",", ":"))
        with contextlib.suppress(OSError, CheckpointError):  # what is kept only saves time
            write_atomically(self.place(key), f"{digest(text)}\n{text}", private=True)
            if time.monotonic() - _pruned.get(self.folder, -_PRUNE_EVERY) >= _PRUNE_EVERY:
                _pruned[self.folder] = time.monotonic()
                self.prune()

    def prune(self) -> None:
        """Remove the files unused for longest, drafts of runs that were killed among them, beyond `most_bytes`."""
        total = 0
        for stat, path in sorted(
            ((path.stat(), path) for path in self.folder.iterdir()), key=lambda file: -file[0].st_mtime_ns
        ):
            total += stat.st_size
            if total > self.most_bytes:
                path.unlink(missing_ok=True)
