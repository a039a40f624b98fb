"""A folder that becomes OUT in one step, or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from abliterate.errors import UsageError
from abliterate.files.atomic import new_file
from abliterate.files.checkpoint.growing import sync_folders, sync_path
from abliterate.files.checkpoint.journal import MODEL, SCRATCH, Journal, read_key
from abliterate.files.checkpoint.links import leads_out
from abliterate.files.checkpoint.messages import error, free_bytes, readable_size, write_error
from abliterate.files.checkpoint.outputs import walk
from abliterate.files.interrupts import one_interrupt
from abliterate.files.local import is_sealed, reserved, seal
from abliterate.files.portable import NO_LINK, NO_WAIT, is_own, lives, open_file, open_folder
from abliterate.files.portable import lock as hold
from abliterate.texts import printable

_REPLACED, _SEAL = "replaced", "seal"
_LAYOUT_VERSION = 1  # of the folder beside OUT and of what is written into it
_SETTLED = 60.0  # seconds after which a process that lives has certainly locked its folder


def ensure_space(target_parent: Path, needed_bytes: int) -> None:
    """Check that the disk under `target_parent`, which need not exist yet, has `needed_bytes` free."""
    free = free_bytes(target_parent)
    if free < needed_bytes:
        sizes = f"{readable_size(needed_bytes)} needed, {readable_size(free)} free at {target_parent}"
        raise error(f"not enough disk space: {sizes}; free space or choose another -o")


def left_bytes(out: Path) -> int:
    """Bytes that killed runs left beside `out`: they are used or removed, so they need no new space."""
    out = Path(os.path.abspath(out))
    left = (path for place, _ in _places(out) if _is_ours(place, out) for path in place.rglob("*"))
    return sum(path.stat().st_size for path in left if path.is_file() and not path.is_symlink())


@dataclass(frozen=True, slots=True)
class Staging:
    """The folder that becomes OUT, and what of it is finished already."""

    folder: Path
    journal: Journal


@contextmanager
def staged(out: Path, *, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out`, flushed and in one step, when the body is done.

    If the body fails, nothing is left. If the process is killed, `out` stays as it was, and the next call
    removes what was left. `overwrite` replaces a model or an earlier result. UsageError: `out` exists, overlaps with
    `source` or is being written by another; CheckpointError: it cannot be written, or the disk is full.
    """
    with _staged(out, None, overwrite=overwrite, source=source) as place:
        yield place / MODEL


@contextmanager
def resumable(out: Path, *, identity: bytes, source: Path, overwrite: bool = False) -> Iterator[Staging]:
    """The same as `staged`, but a run that was killed is taken up again by the next one that is the same.

    The same means: the files of `source` have the names, sizes and times they had, and `identity` is equal. It must
    hold all else that decides the bytes to be written: the plan, the settings, the version of the program. What the
    journal holds is still in the folder; all other files of the killed run are removed.
    """
    key = _key(source, identity)
    with _staged(out, key, overwrite=overwrite, source=source) as place:
        try:
            journal = Journal(place, key)
        except OSError as exc:
            raise write_error(exc, place) from exc
        yield Staging(journal.folder, journal)


def _key(source: Path, identity: bytes) -> str:
    found = [(path, os.stat(path)) for path in walk(source) if path.is_file() and not leads_out(path, source)]
    files = [(str(path.relative_to(source)), about.st_size, about.st_mtime_ns) for path, about in found]
    return seal("journal", json.dumps([_LAYOUT_VERSION, files]), identity.hex())


@contextmanager
def _staged(out: Path, key: str | None, *, overwrite: bool, source: Path | None) -> Iterator[Path]:
    """A locked folder beside `out` whose subfolder MODEL becomes `out`; that of a killed run with the same key."""
    out = Path(os.path.abspath(out))
    if not out.name:
        raise UsageError(f"{out} cannot be replaced; give another -o")
    place = out.with_name(f".{out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    made: list[Path] = []
    with reserved(out), one_interrupt() as interrupts, _Lock() as lock:
        try:
            _check_apart(out, source)
            _prepare(out, place, key, made, lock, overwrite=overwrite)
            yield place
            _install(place, out, overwrite=overwrite)
        except BaseException as exc:
            interrupts.wait()
            failure = write_error(exc, out.parent) if isinstance(exc, OSError) and _concerns(exc, place) else exc
            _discard(place, out)
            _remove_empty(made)
            if failure is exc:
                raise
            raise failure from exc


def _concerns(exc: OSError, place: Path) -> bool:
    """Whether `exc` says that something in the staging folder cannot be written."""
    below = exc.filename is not None and Path(os.fsdecode(exc.filename)).is_relative_to(place)
    return below or exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class _Lock:
    """A descriptor that holds the lock of a folder until the context is left; -1 where there is none."""

    def __init__(self) -> None:
        self.fd = -1

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: object) -> None:
        _unlock(self.fd)


def _prepare(out: Path, place: Path, key: str | None, made: list[Path], lock: _Lock, *, overwrite: bool) -> None:
    """Check `out`, make `place` or take it up, and lock it; `made` gets the folders above it that were made."""
    try:
        left = _clear_abandoned(out, key)
        lock.fd = left[1] if left else -1
        _check_free(out, overwrite=overwrite)
        if left:
            with suppress(FileNotFoundError):  # without locks, another run may have been faster
                os.rename(left[0], place)
                return
        made += [parent for parent in out.parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir()
        _put_seal(place, out)
        (place / MODEL).mkdir()
        with suppress(OSError):  # a file system without locks
            lock.fd = _lock(place)
    except OSError as exc:
        raise write_error(exc, out.parent) from exc


def _put_seal(place: Path, out: Path) -> None:
    """Mark a new folder as made by this user, by what nobody else can write."""
    handle = new_file(place / _SEAL, 0o600)
    try:
        os.write(handle, seal(*_identity(place, out)).encode())
    finally:
        os.close(handle)


def _identity(place: Path, out: Path) -> tuple[str, ...]:
    """This very folder, whatever it is called, as that of `out`."""
    about = os.lstat(place)
    return "staging", os.path.realpath(out.parent), out.name, f"{about.st_dev}:{about.st_ino}"


def _is_ours(place: Path, out: Path) -> bool:
    """Whether a staging folder was made by this user on this machine, for `out`, and is made of real folders.

    Anything else that has such a name was put there by somebody: it is neither removed nor gone on with.
    """
    with suppress(OSError, UnicodeDecodeError):
        folders = [place, *(place / name for name in (MODEL, SCRATCH, _REPLACED) if os.path.lexists(place / name))]
        about = [os.lstat(folder) for folder in folders]
        real = all(stat.S_ISDIR(one.st_mode) for one in about) and is_own(about[0])
        if not real or not set(os.listdir(place)) - {_SEAL}:
            return real  # killed before it was sealed: an empty folder, which says nothing
        handle = open_file(place / _SEAL, os.O_RDONLY | NO_LINK | NO_WAIT)
        with open(handle, "rb") as file:
            return is_sealed(file.read(100).decode(), *_identity(place, out))
    return False


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def overlap(out: Path, source: Path) -> bool:
    """Whether one folder is or holds the other, or `out` holds a file that `source` links to."""
    target, model = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    files = [Path(os.path.realpath(path)) for path in source.iterdir()] if source.is_dir() else []
    return target.is_relative_to(model) or any(path.is_relative_to(target) for path in (model, *files))


def check_output(out: Path, *, overwrite: bool = False, source: Path | None = None) -> None:
    """What `staged` would refuse, before hours of work: UsageError when `out` exists or overlaps with `source`."""
    out = Path(os.path.abspath(out))
    _check_apart(out, source)
    with reserved(out), one_interrupt() as interrupts:
        interrupts.wait()
        try:
            _check_free(out, overwrite=overwrite)
            _refuse_second(out)
            made = [parent for parent in out.parents if not parent.exists()]
            out.parent.mkdir(parents=True, exist_ok=True)
            os.rmdir(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            _remove_empty(made)
        except OSError as exc:
            raise write_error(exc, out.parent) from exc


def _check_apart(out: Path, source: Path | None) -> None:
    if source is not None and overlap(out, source):
        raise UsageError(printable(f"{out} overlaps with the model {source}; choose another -o"))


def _check_free(out: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError(printable(f"{out} exists and is not a folder; give another -o"))
    if os.path.ismount(out):
        raise UsageError(printable(f"{out} is a mount point and cannot be replaced; give a folder inside it as -o"))
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(printable(f"{out} exists; give another -o or --overwrite"))
    if not any(os.path.isfile(out / name) for name in ("config.json", "abliteration.json")):
        raise UsageError(printable(f"{out} exists and holds no model, so --overwrite is refused; give another -o"))


def _install(place: Path, out: Path, *, overwrite: bool) -> None:
    """Rename the finished folder to `out`; with `overwrite`, what is there goes aside first."""
    try:
        sync_folders(place / MODEL, files=True)
        if overwrite and out.exists():
            os.rename(out, place / _REPLACED)
        os.rename(place / MODEL, out)
    except OSError as exc:
        raise error(f"cannot move the finished model to {out}: {exc.strerror}; choose another -o") from exc
    sync_path(out.parent)
    shutil.rmtree(place, ignore_errors=True)


def _put_back(place: Path, out: Path) -> None:
    """Put a folder that was set aside back in its place, if nothing else is there."""
    if (place / _REPLACED).exists() and not os.path.lexists(out):
        os.rename(place / _REPLACED, out)


def _discard(place: Path, out: Path) -> None:
    """Remove a staging folder, but never the only copy of what was at `out`."""
    with suppress(OSError):
        _put_back(place, out)
        for _ in range(3):  # threads that were broken off may still have put something there
            shutil.rmtree(place, ignore_errors=True)


def _places(out: Path) -> Iterator[tuple[Path, int]]:
    """Whatever beside `out` is named like a staging folder of it, with the process in its name."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.partial-(\d{{1,9}})-[0-9a-f]{{8}}")
    for path in sorted(out.parent.iterdir()) if out.parent.is_dir() else ():
        if match := pattern.fullmatch(path.name):
            yield path, int(match[1])


def _refuse_second(out: Path) -> None:
    """Raise `UsageError` when somebody is writing `out`: this user elsewhere, or in another thread."""
    for place, _ in _places(out):
        if _is_ours(place, out):
            try:
                _unlock(_lock(place))
            except BlockingIOError:
                said = f"{out}: another abliterate is writing it now, in {place}; wait for it or give another -o"
                raise UsageError(printable(said)) from None
            except OSError:
                continue


def _clear_abandoned(out: Path, key: str | None) -> tuple[Path, int] | None:
    """Remove what killed runs left beside `out`, but for a folder with this key: it is returned with its lock."""
    _refuse_second(out)
    found: tuple[Path, int] | None = None
    for place, pid in _places(out):
        if not _is_ours(place, out) or (lock := _claim(place, pid)) is None:
            continue
        _put_back(place, out)
        if found is None and key is not None and read_key(place) == key and (place / MODEL).is_dir():
            found = place, lock
            continue
        _discard(place, out)
        _unlock(lock)
    return found


def _claim(folder: Path, pid: int) -> int | None:
    """The lock of a folder whose process is gone (-1 where there are no locks), None if it is not gone.

    The lock tells where process ids mean nothing: they are used again, and another container has others.
    """
    try:
        lock = _lock(folder)
    except BlockingIOError:
        return None
    except OSError:
        return None if pid == os.getpid() or lives(pid) else -1
    young = time.time() - os.fstat(lock).st_mtime < _SETTLED
    if young and pid != os.getpid() and lives(pid):  # it may be about to lock it
        _unlock(lock)
        return None
    return lock


def _lock(folder: Path) -> int:
    """A descriptor that holds the lock of `folder` until it is closed; BlockingIOError if another has it.

    OSError where folders have no locks: that of OUT in the cache folder is left (`local.reserved`).
    """
    if (fd := open_folder(folder)) is None:
        raise OSError(errno.ENOTSUP, "folders have no locks here")
    try:
        hold(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def _unlock(lock: int) -> None:
    if lock >= 0:
        os.close(lock)
