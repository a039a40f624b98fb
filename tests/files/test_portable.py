"""Systems without POSIX: every module is there, and files are written, locked and read in another way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from abliterate.files import portable
from abliterate.files.atomic import write_atomically
from abliterate.files.local import reserved
from planted import plant

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
sys.exit("\\n".join(failed) or 0)
"""
_APPLY = """
from abliterate.cli import main
sys.argv = ["abliterate", *sys.argv[1:]]
main()
"""
#: Imported while the system still has everything: their own imports are not what is tested.
FIRST = "torch, transformers, accelerate, numpy, safetensors, typer, rich, pydantic, peft, datasets, huggingface_hub"


def without_posix(code: str, *arguments: str, first: str = FIRST) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT.format(first=first) + code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_every_module_can_be_imported() -> None:
    done = without_posix(_IMPORT_ALL, first=FIRST + ", gradio, optuna, lm_eval, gguf, matplotlib, pandas")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_model_is_edited_and_undone(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    direction = tmp_path / "direction.safetensors"
    from abliterate.edit.direction import Direction, save_direction

    save_direction(direction, Direction(planted.direction[None]))
    out, back = tmp_path / "out", tmp_path / "back"
    done = without_posix(_APPLY, "apply", str(planted.folder), "--direction", str(direction), "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    edited, before = (load_file(folder / "model.safetensors") for folder in (out, planted.folder))
    weight = edited["model.layers.2.mlp.down_proj.weight"]
    assert float((planted.direction @ weight).abs().max()) < 1e-5
    assert not torch.equal(weight, before["model.layers.2.mlp.down_proj.weight"])
    done = without_posix(_APPLY, "undo", str(out), "--out", str(back))
    assert done.returncode == 0, done.stderr[-2000:]
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
