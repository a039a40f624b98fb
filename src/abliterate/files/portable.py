"""What not every system has, done in the nearest way there is: flags, positions, locks, owners, modes, folders.

On POSIX systems each is the call of that name. Elsewhere (Windows) files are opened as bytes, positions are sought,
locks are those of its C library, and what cannot be had is left out: refusing links, modes, folders on disk and locked.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None
msvcrt: ModuleType | None
try:
    import msvcrt
except ImportError:
    msvcrt = None

#: No process that is started gets the file, and bytes are bytes.
_ALWAYS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0) | getattr(os, "O_BINARY", 0)
#: No link is followed; nobody is waited for at the other end of a pipe; no terminal becomes this process's.
NO_LINK, NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_FOLDER = getattr(os, "O_DIRECTORY", 0)

#: The byte that is locked where locks are of bytes: behind all that is written.
_LOCKED_BYTE = 2**30
_SEEKING = threading.Lock()


def open_file(path: Path, flags: int, mode: int = 0o666) -> int:
    """A descriptor of a file that no other process inherits."""
    return os.open(path, flags | _ALWAYS, mode)


def open_folder(path: Path) -> int | None:
    """A descriptor of a folder, which is no link; None where folders have none."""
    return os.open(path, os.O_RDONLY | _FOLDER | NO_LINK | _ALWAYS) if _FOLDER else None


def lock(fd: int, *, wait: bool = False) -> None:
    """Lock an open file until it is closed; nothing is locked where a system has no locks.

    Raises `BlockingIOError` when another has it, unless told to `wait`.
    """
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    elif msvcrt is not None:
        library: Any = msvcrt
        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        try:
            library.locking(fd, library.LK_LOCK if wait else library.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
        finally:
            os.lseek(fd, 0, os.SEEK_SET)


def read_at(fd: int, view: memoryview, position: int) -> int:
    """Fill `view` from `position` of a file as far as it goes; how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], position)
    with _SEEKING:
        os.lseek(fd, position, os.SEEK_SET)
        found = os.read(fd, len(view))
    view[: len(found)] = found
    return len(found)


def write_at(fd: int, data: bytes | memoryview, position: int) -> int:
    """Write to `position` of a file; how many bytes were."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, position)
    with _SEEKING:
        os.lseek(fd, position, os.SEEK_SET)
        return os.write(fd, data)


def set_mode(fd: int, mode: int) -> None:
    """Give an open file its mode, where files have one."""
    if hasattr(os, "fchmod"):
        try:
            os.fchmod(fd, mode)
        except PermissionError:  # file systems without modes
            return


def is_own(about: os.stat_result) -> bool:
    """Whether a file is this user's; where files have no such owner, a user's cache folder is."""
    return not hasattr(os, "geteuid") or about.st_uid == os.geteuid()


def is_private(about: os.stat_result) -> bool:
    """Whether nobody else can read or write a file of this user, as far as modes say."""
    return not hasattr(os, "geteuid") or (is_own(about) and not about.st_mode & 0o077)


def lives(pid: int) -> bool:
    """Whether a process is there; where asking would end it, it is taken to be."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
