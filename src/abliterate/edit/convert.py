"""A folder of safetensors as one GGUF file, by llama.cpp's own converter and quantiser, where they are installed.

They are looked for in the folder that `ABLITERATE_LLAMA_CPP` names (a checkout of llama.cpp, built or not, or an
installed one), then on the PATH. The converter is a Python program: it is run by this interpreter, offline, and never
on a folder with code of its own (see `without_code`), which it would run unasked.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.errors import ModelError, UsageError
from abliterate.files.atomic import write_atomically
from abliterate.files.bounded import open_regular
from abliterate.files.configuration import DESCRIPTION

#: The environment variable that names the folder of llama.cpp.
FOLDER = "ABLITERATE_LLAMA_CPP"

_CONVERTER, _QUANTISER = "convert_hf_to_gguf.py", "llama-quantize"
#: Where they lie in such a folder: a checkout, what cmake builds there, an installed one.
_INSIDE = ("", "bin", "build/bin", "build/bin/Release")
#: What describes a model, beside its weights.
_DESCRIBING = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")
#: How the converter itself can store numbers; everything else is the quantiser's.
_CONVERTED = ("F32", "F16", "BF16", "Q8_0")


@dataclass(frozen=True, slots=True)
class Tools:
    """The programs that make a GGUF file; `quantiser` is None where the converter does it alone."""

    converter: Path
    quantiser: Path | None


def find_tools(gguf_type: str | None) -> Tools:
    """What is needed for `gguf_type` (None: 16 bits), found where llama.cpp may be.

    Raises `UsageError`, with what to do instead, when it is not installed.
    """
    needed = _quantised(gguf_type)
    converter, quantiser = _found(_CONVERTER), _found(_QUANTISER) if needed else None
    missing = _CONVERTER if converter is None else _QUANTISER
    if converter is None or (needed and quantiser is None):
        more = f" && llama-quantize model.gguf model-{gguf_type}.gguf {gguf_type}" if needed else ""
        raise UsageError(
            f"--as gguf: expected llama.cpp's {missing} in the folder that {FOLDER} names or on the PATH, found none; "
            "install llama.cpp (https://github.com/ggml-org/llama.cpp), or write weights and convert them where it "
            f"is: `python convert_hf_to_gguf.py OUT --outfile model.gguf{more}`"
        )
    return Tools(converter, quantiser)


def _quantised(gguf_type: str | None) -> bool:
    return gguf_type is not None and gguf_type not in _CONVERTED


def _found(name: str) -> Path | None:
    paths = (folder / f"{name}{end}" for folder in _folders() for end in ("", ".exe"))
    return next((path for path in paths if path.is_file()), None)


def _folders() -> Iterator[Path]:
    """Where programs are looked for. Never the current folder, which may hold somebody's model."""
    if named := os.environ.get(FOLDER):
        yield from (Path(os.path.expanduser(named)).absolute() / inside for inside in _INSIDE)
    yield from (path for path in map(Path, os.get_exec_path()) if path.is_absolute())


def check_converts(tools: Tools, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raise, before any work, where the converter does not run, or not on the model in `folder`.

    All but the weights is converted for that: what it imports, the kind of model, the tokenizer. Raises `ModelError`
    with its last words.
    """
    with tempfile.TemporaryDirectory(prefix="abliterate-") as place:
        copy = Path(place, folder.name or "model")
        copy.mkdir()
        for path in folder.iterdir():
            if path.suffix == ".safetensors":  # of these the converter reads names only
                with contextlib.suppress(OSError):  # systems without links
                    (copy / path.name).symlink_to(path.resolve())
            elif path.suffix in _DESCRIBING and path.is_file():
                shutil.copy(path, copy)
        if not trust_remote_code:
            without_code(copy)
        _run([sys.executable, tools.converter, copy, f"--outfile={place}/vocabulary.gguf", "--vocab-only"])


def convert(tools: Tools, folder: Path, target: Path, *, gguf_type: str | None, name: str) -> None:
    """Write the model in `folder` to the file `target`, called `name` inside, its numbers stored as `gguf_type`.

    `folder` and that of `target` must be this process's own. Raises `ModelError` with the last words of a program
    that fails.
    """
    quantised = _quantised(gguf_type)
    first = target.with_suffix(".16-bit.gguf") if quantised else target
    stored = "auto" if quantised or gguf_type is None else gguf_type.lower()
    _run([sys.executable, tools.converter, folder, f"--outfile={first}", f"--outtype={stored}", f"--model-name={name}"])
    _check_written(first, tools.converter)
    if tools.quantiser is not None and gguf_type is not None:
        _run([tools.quantiser, first, target, gguf_type])
        _check_written(target, tools.quantiser)
        first.unlink()


def without_code(folder: Path) -> None:
    """Take out of a folder of this process's own what makes the converter run code that came with a model."""
    for path in folder.rglob("*.py"):
        path.unlink()
    for path in folder.glob("*config.json"):
        settings = DESCRIPTION.fields(path)
        if settings.pop("auto_map", None) is not None:
            write_atomically(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _run(command: Sequence[str | Path]) -> str:
    """What a program prints, on either stream. Interrupted, it ends with this process.

    Raises `ModelError` when it cannot be started or fails.
    """
    program = Path(command[1 if command[0] == sys.executable else 0]).name
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    try:
        done = subprocess.run(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    except OSError as error:
        raise ModelError(f"llama.cpp's {program} cannot be started ({error.strerror}): {command[0]}") from error
    said = done.stdout.decode(errors="replace")
    if done.returncode:
        raise ModelError(
            f"llama.cpp's {program} failed (exit code {done.returncode}): {_last_words(said.splitlines())}; where it "
            "wants other packages than this environment has, write weights and convert them in one of its own"
        )
    return said


def _last_words(lines: Iterable[str]) -> str:
    kept = [" ".join(line.split()) for line in lines if line.strip()]
    return " / ".join(kept[-2:])[-400:] or "it says nothing"


def _check_written(path: Path, program: Path) -> None:
    if path.is_file():
        with open(open_regular(path), "rb") as file:
            if file.read(4) == b"GGUF":
                return
    raise ModelError(f"{program}: expected a GGUF file from it, found none, though it ended well; is it llama.cpp's?")
