"""Plans that windows loaded: a bounded number of bytes for all windows together, however many come and go."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from abliterate.edit.direction import Direction
from abliterate.errors import UsageError
from abliterate.files.bounded import Kind

#: Bytes of the files of all plans that are kept; no plan alone may have more.
MOST_BYTES = 256_000_000


class Shelf:
    """Directions by a hash of their file. Those that were asked for longest ago are put away when there is no room."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        """Empty, with room for so many bytes."""
        self._room = most_bytes
        self._file = Kind("a plan", most_bytes, UsageError)
        self._kept: OrderedDict[str, tuple[int, Direction]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the files whose plans are kept."""
        return sum(size for size, _ in self._kept.values())

    def put(self, path: Path, load: Callable[[], Direction]) -> str:
        """Keep what `load` makes of a file, and return its key. Raises `UsageError` for one that is too large."""
        with self._file.opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            key = hashlib.file_digest(file, "sha256").hexdigest()
        with self._lock:
            if key not in self._kept:
                direction = load()
                while self._kept and self.nbytes + size > self._room:
                    self._kept.popitem(last=False)
                self._kept[key] = size, direction
            self._kept.move_to_end(key)
        return key

    def get(self, key: str) -> Direction:
        """What is kept under a key. Raises `UsageError` where that was put away for others."""
        with self._lock:
            if key not in self._kept:
                raise UsageError("plan: it was put away since other windows loaded theirs; load it again")
            self._kept.move_to_end(key)
            return self._kept[key][1]
