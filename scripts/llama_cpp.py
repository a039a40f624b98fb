"""Build llama.cpp with its Python bindings and its quantiser for the tests that run it, in a folder of its own.

    export ABLITERATE_LLAMA_PYTHON=$(python scripts/llama_cpp.py ~/.cache/abliterate/llama-cpp)
    export ABLITERATE_LLAMA_CPP=~/.cache/abliterate/llama-cpp/llama.cpp
    pytest -m llama_cpp

For the CPU, with what the tests need and no more; takes some minutes, a C++ compiler and CMake. Prints the path of the
environment's interpreter on stdout. Run again, it only checks what is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
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
    python, checkout = folder / "bin" / "python", folder / "llama.cpp"
    if not works(python):
        venv.create(folder, with_pip=True)
        install(python)
        if not works(python):
            print(f"{folder}: llama_cpp was installed and cannot be imported", file=sys.stderr)
            return 1
    if not (checkout / "build" / "bin" / "llama-quantize").is_file():
        unpack(python, checkout)
        build(checkout)
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


def unpack(python: Path, checkout: Path) -> None:
    """Take the source of llama.cpp, with its converter, out of the source distribution."""
    shutil.rmtree(checkout, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=checkout.parent) as place:
        command = [str(python), "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", place]
        subprocess.run([*command, f"llama-cpp-python=={VERSION}"], check=True, stdout=sys.stderr)
        (archive,) = Path(place).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(place, filter="data")
        (vendored,) = Path(place).glob("*/vendor/llama.cpp")
        vendored.rename(checkout)


def build(checkout: Path) -> None:
    """Compile the quantiser."""
    options = [
        f"-D{option}=OFF" for option in ("LLAMA_OPENSSL", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_TESTS", "GGML_OPENMP")
    ]
    configure = ["cmake", "-S", ".", "-B", "build", "-DCMAKE_BUILD_TYPE=Release", *options]
    jobs = str(os.cpu_count() or 1)
    for command in (configure, ["cmake", "--build", "build", "--target", "llama-quantize", "--parallel", jobs]):
        subprocess.run(command, cwd=checkout, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
