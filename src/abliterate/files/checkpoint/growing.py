"""A file while it is written: bytes go in front to back, and its hash follows in another thread.

Hashing reads the bytes back while they are in memory, so it costs no reading from disk, and it takes a core of its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Event
from types import TracebackType

from abliterate.files.atomic import new_file
from abliterate.files.checkpoint.messages import damaged
from abliterate.files.checkpoint.reading import CALL_LIMIT
from abliterate.files.portable import open_file, open_folder, read_at, set_mode, write_at

_PIECE = 256 * 2**10  # bytes hashed at once: they stay in the core's own cache
_CHUNK = 4 * 2**20  # plain read and write
_TELL = 8 * 2**20  # bytes between two messages to the threads behind
_LAG = 64  # messages that may be on their way: half a gigabyte, which is still in memory
_FLUSH = 64 * 2**20  # bytes after which the disk begins to be kept busy
_UNSUPPORTED = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTSOCK}


class Trail:
    """The SHA-256 of a file, taken in another thread as far as the file is there."""

    def __init__(self, pool: ThreadPoolExecutor, fd: int, path: Path) -> None:
        """Follow the file open as `fd`, which must stay open until the context is left."""
        self._path = path
        self._positions: Queue[int | None] = Queue(_LAG)
        self._left = Event()
        self._digest = pool.submit(self._follow, fd)

    def __enter__(self) -> Trail:
        """Nothing more: the thread runs already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until the thread is done with the file, whether or not it came to the end."""
        self._left.set()
        if not self._digest.cancel():
            self._send(None)
            self._digest.exception()

    def tell(self, position: int) -> None:
        """The file is there up to `position`. Waits where the hash is far behind; raises what stopped it."""
        self._send(position)
        if self._digest.done():
            self._digest.result()

    def end(self) -> None:
        """The file is whole."""
        self._send(None)

    def digest(self) -> str:
        """The hash in hex, when the thread has come to the end."""
        return self._digest.result()

    def _send(self, position: int | None) -> None:
        while not self._digest.done():
            with suppress(Full):
                self._positions.put(position, timeout=0.2)
                return

    def _follow(self, fd: int) -> str:
        digest, done = hashlib.sha256(), 0
        with memoryview(bytearray(_PIECE)) as view:
            while (position := self._positions.get()) is not None:
                while done < position and not self._left.is_set():
                    got = read_at(fd, view[: position - done], done)
                    if not got:
                        raise damaged(self._path, "it became shorter while it was read")
                    digest.update(view[:got])
                    done += got
        return digest.hexdigest()


class GrowingFile:
    """A new file, written front to back. `close` it whatever happens; it is on disk after `sync`."""

    def __init__(self, path: Path, mode: int | None, flusher: ThreadPoolExecutor, step: Callable[[int], None]) -> None:
        """Make the file `path`, which must not exist; `step` is called with the bytes just written."""
        self.path = path
        self.position = 0
        self.fd = new_file(path, 0o666 if mode is None else 0o600)
        self._flusher, self._step = flusher, step
        self._trails: list[Trail] = []
        self._told = self._flushed = 0
        self._flushes: list[Future[None]] = []
        if mode is not None:
            set_mode(self.fd, mode)

    def __enter__(self) -> GrowingFile:
        """Nothing more: the file is open."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file when nobody flushes it any more."""
        for flush in self._flushes:
            if not flush.cancel():
                flush.exception()
        os.close(self.fd)

    def follow(self, trail: Trail) -> None:
        """Tell `trail` from now on how far the file is."""
        self._trails.append(trail)

    def write(self, view: memoryview) -> None:
        """Append bytes."""
        done = 0
        while done < len(view):
            done += write_at(self.fd, view[done : done + CALL_LIMIT], self.position + done)
        self._wrote(len(view))

    def copy(self, src: int, start: int, end: int, path: Path) -> None:
        """Append bytes `start` to `end` of the open file `src`, inside the kernel where it can."""
        while start < end:
            count = copy_some(src, self.fd, start, self.position, min(end - start, _TELL))
            if not count:
                raise damaged(path, "it became shorter while it was read")
            start += count
            self._wrote(count)

    def end(self) -> None:
        """All bytes are written."""
        self._tell()
        for trail in self._trails:
            trail.end()

    def sync(self) -> None:
        """Wait until the file is on disk."""
        for flush in self._flushes:
            flush.result()  # an error is told only to the first who asks
        sync(self.fd)

    def _wrote(self, count: int) -> None:
        self.position += count
        self._step(count)
        if self.position - self._told >= _TELL:
            self._tell()
        if self.position - self._flushed >= _FLUSH and (not self._flushes or self._flushes[-1].done()):
            self._flushed = self.position
            self._flushes.append(self._flusher.submit(sync, self.fd))

    def _tell(self) -> None:
        self._told = self.position
        for trail in self._trails:
            trail.tell(self.position)


def copy_some(src: int, dst: int, start: int, position: int, count: int) -> int:
    """Copy up to `count` bytes from `start` of `src` to `position` of `dst`; how many, 0 at the end of the source."""
    for copy in (by_copy_file_range, by_sendfile):
        try:
            if done := copy(src, dst, start, position, count):
                return done
        except OSError as exc:
            if exc.errno not in _UNSUPPORTED:
                raise
    data = memoryview(bytearray(min(count, _CHUNK)))
    data = data[: read_at(src, data, start)]
    done = 0
    while done < len(data):
        done += write_at(dst, data[done:], position + done)
    return done


def by_copy_file_range(src: int, dst: int, start: int, position: int, count: int) -> int:
    """One `copy_file_range`, 0 where there is none."""
    return os.copy_file_range(src, dst, count, start, position) if hasattr(os, "copy_file_range") else 0


def by_sendfile(src: int, dst: int, start: int, position: int, count: int) -> int:
    """One `sendfile`, 0 where there is none."""
    if not hasattr(os, "sendfile"):
        return 0
    os.lseek(dst, position, os.SEEK_SET)
    return os.sendfile(dst, src, start, count)


def sync(fd: int) -> None:
    """Wait until an open file or folder is on disk."""
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush a folder
            raise


def sync_folders(folder: Path, *, files: bool = False) -> None:
    """Flush `folder` and all folders below it, and with `files` all their files."""
    for place, _, names in os.walk(folder):
        for name in (*names, ".") if files else (".",):
            sync_path(Path(place, name))


def sync_path(path: Path) -> None:
    """Flush one file or folder."""
    fd = open_folder(path) if path.is_dir() else open_file(path, os.O_RDONLY)
    if fd is None:
        return
    try:
        sync(fd)
    finally:
        os.close(fd)
