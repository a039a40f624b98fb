"""Systems without POSIX: every module is there, and files are written, locked and read in another way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from abliterate.edit.direction import Direction, save_direction
from abliterate.files import portable
from abliterate.files.atomic import write_atomically
from abliterate.files.local import reserved
from planted import Planted, plant

#: What Windows has not: modules, and names of `os`.
MODULES = ("fcntl", "resource", "grp", "pwd", "termios", "tty", "pty", "posix_ipc", "syslog")
NAMES = (
    *("O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK", "O_NOCTTY", "preadv", "pwritev", "pread", "pwrite"),
    *("fchmod", "fchown", "geteuid", "getuid", "sendfile", "copy_file_range", "posix_fadvise", "sysconf", "fork"),
    *("getpgid", "killpg", "setsid", "fdatasync", "mkfifo"),
)
#: Torch and others do need some of these here: they are imported first, and what is theirs is gone afterwards.
_WITHOUT = f"""
import importlib, os, pkgutil, sys
import {{first}}
for name in {MODULES!r}:
    sys.modules[name] = None
for name in {NAMES!r}:
    if hasattr(os, name):
        delattr(os, name)
import abliterate
"""
_EDITED_AND_UNDONE = """
from abliterate.cli import main
def called(*arguments):
    sys.argv = ["abliterate", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{arguments[0]}: {end.code}")
model, direction, out, back = sys.argv[1:]
called("apply", model, "--direction", direction, "--out", out)
called("undo", out, "--out", back)
"""
_IMPORT_ALL = """
failed = []
for found in pkgutil.walk_packages(abliterate.__path__, "abliterate."):
    if found.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(found.name)
    except ImportError as error:
        if error.name not in ("gradio", "optuna", "lm_eval", "matplotlib", "pandas", "gguf"):
            failed.append(f"{found.name}: {error}")
    except Exception as error:
        failed.append(f"{found.name}: {type(error).__name__}: {error}")
print("imported:", *failed, sep="\\n")
"""
#: Imported while the system still has everything: their own imports are not what is tested.
FIRST = (
    "torch, transformers, accelerate, numpy, safetensors, typer, rich, pydantic, peft, datasets, huggingface_hub, "
    "gradio, optuna, lm_eval, gguf, matplotlib, pandas"
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def without_posix(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Where one process without POSIX has edited a model and undone it, and what it could not import afterwards."""
    place = tmp_path_factory.mktemp("work")
    save_direction(place / "direction.safetensors", Direction(planted.direction[None]))
    places = (planted.folder, place / "direction.safetensors", place / "out", place / "back")
    code = _WITHOUT.format(first=FIRST) + _EDITED_AND_UNDONE + _IMPORT_ALL
    command = [sys.executable, "-c", code, *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return place, done.stdout.split("imported:")[-1].split("\n")[1:-1]


def test_every_module_can_be_imported(without_posix: tuple[Path, list[str]]) -> None:
    assert without_posix[1] == []


def test_a_model_is_edited_and_undone(planted: Planted, without_posix: tuple[Path, list[str]]) -> None:
    out, back = (without_posix[0] / name for name in ("out", "back"))
    edited, before = (load_file(folder / "model.safetensors") for folder in (out, planted.folder))
    weight = edited["model.layers.2.mlp.down_proj.weight"]
    assert float((planted.direction @ weight).abs().max()) < 1e-5
    assert not torch.equal(weight, before["model.layers.2.mlp.down_proj.weight"])
    assert (back / "model.safetensors").read_bytes() == (planted.folder / "model.safetensors").read_bytes()


# --- the calls themselves, in both ways


@pytest.mark.parametrize("posix", [True, False])
def test_bytes_are_read_and_written_at_positions(tmp_path: Path, posix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not posix:
        for name in ("preadv", "pwrite"):
            monkeypatch.delattr(os, name)
    fd = portable.open_file(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert portable.write_at(fd, b"abcdef", 2) == 6
        buffer = memoryview(bytearray(4))
        assert portable.read_at(fd, buffer, 3) == 4
        assert bytes(buffer) == b"bcde"
        assert portable.read_at(fd, buffer, 6) == 2
        assert portable.read_at(fd, buffer, 100) == 0
    finally:
        os.close(fd)


def test_a_lock_is_anothers_until_its_file_is_closed(tmp_path: Path) -> None:
    one, other = (portable.open_file(tmp_path / "file", os.O_RDWR | os.O_CREAT) for _ in range(2))
    portable.lock(one)
    with pytest.raises(BlockingIOError):
        portable.lock(other)
    os.close(one)
    portable.lock(other)
    os.close(other)


def test_without_locks_nothing_is_locked_and_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "fcntl", None)
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    with reserved(tmp_path / "out"):
        write_atomically(tmp_path / "out" / "file", "text")
    assert (tmp_path / "out" / "file").read_text() == "text"


def test_owners_and_modes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    path.chmod(0o600)
    assert portable.is_own(path.stat())
    assert portable.is_private(path.stat())
    path.chmod(0o644)
    assert portable.is_own(path.stat())
    assert not portable.is_private(path.stat())
    assert portable.lives(os.getpid())
    assert not portable.lives(2**22 + 12345)
