"""The errors of this package: one line each, with what is wrong, what was expected and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from abliterate.errors import CheckpointError
from abliterate.files.bounded import readable_size as readable_size
from abliterate.files.bounded import short as short
from abliterate.texts import printable

OUR_FAULT = "this is a fault of the program, please report it"


def error(text: str) -> CheckpointError:
    """The error with `text` on one line, whatever the names in it hold."""
    return CheckpointError(printable(text))


def damaged(path: Path, reason: str) -> CheckpointError:
    """The error for a file that is no whole safetensors file."""
    return error(f"{path} is not a whole safetensors file: {reason}; download or convert it again")


def write_error(exc: OSError, where: Path, needed: int | None = None) -> CheckpointError:
    """The one-line error for a failed write below the folder `where`, `needed` bytes before the end."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "disk full" if exc.errno == errno.ENOSPC else "disk quota used up"
        need = f"{readable_size(needed)} more needed, " if needed is not None else ""
        return error(
            f"{what}: {need}{readable_size(free_bytes(where))} free at {where}; free space or choose another -o"
        )
    if exc.errno == errno.EFBIG:
        return error(f"{where}: this file system or a limit forbids files this large; choose another -o")
    reason = exc.strerror or str(exc)
    return error(f"cannot write {exc.filename or where}: {reason}; check permissions or choose another -o")


def free_bytes(where: Path) -> int:
    """Free bytes of the disk that holds, or will hold, `where`."""
    place = Path(os.path.abspath(where))
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
