"""Build llama.cpp with its Python bindings for the tests that run it, in an environment of its own.

    export ABLITERATE_LLAMA_PYTHON=$(python scripts/llama_cpp.py ~/.cache/abliterate/llama-cpp)
    pytest -m llama_cpp

For the CPU, with what the tests need and no more; takes some minutes and a C++ compiler. Prints the path of the
environment's interpreter on stdout. Run again, it only checks what is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

#: The version that the tests were written with.
VERSION = "0.3.36"

OPTIONS = ("LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER", "LLAVA_BUILD", "GGML_OPENMP")


def main() -> int:
    """Build unless it is there, and print the interpreter."""
    parser = argparse.ArgumentParser(description="Build llama.cpp with its Python bindings.")
    parser.add_argument("folder", type=Path, help="where the environment goes")
    folder: Path = parser.parse_args().folder.expanduser().absolute()
    python = folder / "bin" / "python"
    if not works(python):
        venv.create(folder, with_pip=True)
        install(python)
        if not works(python):
            print(f"{folder}: llama_cpp was installed and cannot be imported", file=sys.stderr)
            return 1
    print(python)
    return 0


def works(python: Path) -> bool:
    """Whether that interpreter is there and has llama.cpp."""
    return python.exists() and not subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode


def install(python: Path) -> None:
    """Compile from the source distribution."""
    options = " ".join(f"-D{option}=OFF" for option in OPTIONS)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", f"llama-cpp-python=={VERSION}"]
    subprocess.run(command, env={**os.environ, "CMAKE_ARGS": options}, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
