"""Small files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from abliterate.errors import CheckpointError


@contextlib.contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A draft beside `path` to write to; it takes the place of `path`, flushed and in one step, when the body is done.

    The draft has a name that nobody can foresee and did not exist before, so that no link is followed. When the body
    fails nothing is left of it. Missing folders are made. A `private` file is readable by its owner only.

    Raises `CheckpointError` when `path` cannot be written.
    """
    draft: Path | None = None
    try:
        path.parent.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")  # mode 0600
        draft = Path(name)
        os.close(handle)
        yield draft
        if not private:
            draft.chmod(0o666 & ~_umask())
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
        draft = None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if draft is not None:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write `content` (text as UTF-8) to `path`, whole or not at all; see `replacing`.

    Raises `CheckpointError` when it cannot be written.
    """
    with replacing(path, private=private) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def _umask() -> int:
    """The mask of this process, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
