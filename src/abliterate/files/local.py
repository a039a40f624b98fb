"""What this user did on this machine: a key that nobody else has, and which results are being written now."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from abliterate.config import cache_folder
from abliterate.errors import UsageError
from abliterate.files.atomic import new_file
from abliterate.files.portable import NO_LINK, NO_WAIT, is_private, lock, open_file

_KEY, _LOCKS = "key", "locks"
_KEY_BYTES = 32

_reserved: set[tuple[int, Path]] = set()


def seal(*parts: str) -> str:
    """What only this user on this machine can make of `parts` (hex): HMAC-SHA256 with a key kept in the cache folder.

    Where no key can be kept, it is one of this process: what it sealed is then foreign to the next.
    """
    text = b"".join(len(_encoded(part)).to_bytes(8, "big") + _encoded(part) for part in parts)
    return hmac.new(_key(cache_folder()), text, hashlib.sha256).hexdigest()


def is_sealed(mark: str | None, *parts: str) -> bool:
    """Whether `mark` is the seal of `parts`, and so of this user on this machine."""
    return mark is not None and hmac.compare_digest(_encoded(mark), seal(*parts).encode())


@contextlib.contextmanager
def reserved(out: Path, *, wait: bool = False) -> Iterator[None]:
    """`out` for this thread alone, from now until the context is left; a second time by the same thread is free.

    It is a lock in the cache folder that ends with the process, however that ends; where there can be none, nothing
    is reserved. When another process or thread of this user is writing `out`, `wait` for it.

    Raises `UsageError` when another is writing `out` and waiting was not asked for.
    """
    place = Path(os.path.realpath(out))
    mine = threading.get_ident(), place
    if mine in _reserved:
        yield
        return
    held = _locked(cache_folder() / _LOCKS / hashlib.sha256(os.fsencode(place)).hexdigest(), out, wait)
    _reserved.add(mine)
    try:
        yield
    finally:
        _reserved.discard(mine)
        if held is not None:
            path, handle = held
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)


def _locked(path: Path, out: Path, wait: bool) -> tuple[Path, int] | None:
    """A lock file that is ours until it is closed; None where there are no locks."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            handle = open_file(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o600)
            try:
                lock(handle, wait=wait)
                if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                    return path, handle  # else its last owner has just removed it
            except BlockingIOError:
                os.close(handle)
                raise
            os.close(handle)
    except BlockingIOError:
        raise UsageError(f"{out}: another abliterate is writing it now; wait for it or give another -o") from None
    except OSError:
        return None


@functools.cache
def _key(folder: Path) -> bytes:
    """The key kept in `folder`; a new one where there is none that only this user can read."""
    path = folder / _KEY
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (found := _read(path)) is None:
            _make(path)
            found = _read(path)
        if found is not None:
            return found
    return secrets.token_bytes(_KEY_BYTES)


def _read(path: Path) -> bytes | None:
    """The key in a file of this user that nobody else can read or write."""
    try:
        handle = open_file(path, os.O_RDONLY | NO_LINK | NO_WAIT)
    except OSError:
        return None
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or not is_private(about):
            return None
        found = os.read(handle, _KEY_BYTES + 1)
    finally:
        os.close(handle)
    return found if len(found) == _KEY_BYTES else None


def _make(path: Path) -> None:
    """Put a new key in place; one that another process has put there meanwhile stays."""
    draft = path.with_name(f".{_KEY}.{secrets.token_hex(8)}")
    handle = new_file(draft, 0o600)
    try:
        os.write(handle, secrets.token_bytes(_KEY_BYTES))
        os.fsync(handle)
    finally:
        os.close(handle)
    try:
        if os.path.lexists(path) and _read(path) is None:  # damaged, or not ours alone
            os.replace(draft, path)
        else:
            os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
