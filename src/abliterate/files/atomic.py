"""Files written whole or not at all, and never through a link that somebody left in their place."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from abliterate.errors import CheckpointError
from abliterate.files.interrupts import one_interrupt
from abliterate.files.portable import NO_LINK, open_file, open_folder, set_mode


@contextlib.contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A draft beside `path` to write to; it takes the place of `path`, flushed and in one step, when the body is done.

    The draft has a name that nobody can foresee and did not exist before, so that no link is followed; a link at `path`
    is replaced, what it leads to stays as it is. When the body fails nothing is left of it. Missing folders are made. A
    `private` file is readable by its owner only.

    Raises `CheckpointError` when `path` cannot be written, or is something other than a file.
    """
    draft: Path | None = None
    with one_interrupt() as interrupts:
        try:
            path.parent.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
            refuse_other_kinds(path)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")  # mode 0600
            draft = Path(name)
            os.close(handle)
            yield draft
            _settle(draft, None if private else 0o666 & ~_umask())
            draft.replace(path)
            draft = None
            _flush(path.parent)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
        finally:
            interrupts.wait()
            if draft is not None:
                with contextlib.suppress(OSError):
                    draft.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write `content` (text as UTF-8) to `path`, whole or not at all; see `replacing`.

    Raises `CheckpointError` when it cannot be written.
    """
    with replacing(path, private=private) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def new_file(path: Path, mode: int = 0o666) -> int:
    """A descriptor to read and write the file `path`, which must not exist, not even as a link."""
    return open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, mode)


def real_folder(path: Path) -> Path:
    """`path` as a folder, made when it is missing.

    Raises `CheckpointError` for a link, which would let what is written land elsewhere, and for anything else.
    """
    try:
        path.mkdir(exist_ok=True)
        if stat.S_ISDIR(os.lstat(path).st_mode):
            return path
    except OSError as error:
        raise CheckpointError(f"{path}: expected a folder to write to, found {error.strerror or error}") from error
    raise CheckpointError(f"{path}: expected a folder to write to, found a link; remove it")


def refuse_other_kinds(path: Path) -> None:
    """Raise `CheckpointError` when `path` is there and no file could take its place: a folder, a pipe, a device.

    A link is no such thing, unless it leads to a pipe or a device (as /dev/stdout does).
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            with contextlib.suppress(OSError):
                target = os.stat(path).st_mode
                mode = mode if stat.S_ISREG(target) or stat.S_ISDIR(target) else target
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            found = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
            raise CheckpointError(
                f"{path}: expected a file or nothing, found {found}; it cannot be written: remove that or choose "
                "another place"
            )


def _settle(draft: Path, mode: int | None) -> None:
    """Give a draft its mode and wait until it is on disk."""
    handle = open_file(draft, os.O_RDWR | NO_LINK)
    try:
        if mode is not None:
            set_mode(handle, mode)
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush(folder: Path) -> None:
    """Wait until the names in a folder are on disk, where folders can be flushed."""
    with contextlib.suppress(OSError):
        if (handle := open_folder(folder)) is not None:
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _umask() -> int:
    """The mask of this process, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
