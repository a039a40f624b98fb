"""What lies beside OUT, or in it, may be anybody's: nothing is written through it, removed or gone on with."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from abliterate.cli.app import app
from abliterate.config import FolderSettings, InspectSettings, cache_folder
from abliterate.errors import CheckpointError, UsageError
from abliterate.files import checkpoint as ck
from abliterate.files.atomic import new_file, real_folder, replacing, write_atomically
from abliterate.files.checkpoint import staging
from abliterate.files.interrupts import one_interrupt
from abliterate.files.local import is_sealed, reserved, seal
from abliterate.lab.serving import free_port
from abliterate.record import read_record
from abliterate.report.assemble import check_beside, check_results

PRECIOUS = "precious"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of two tensors with the files that come with one."""
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"a": torch.arange(64.0), "b": torch.ones(8)}, folder / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A folder elsewhere with a file; both are as they were when the test is over."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "diary.txt").write_text(PRECIOUS)
    yield folder
    assert tree(folder) == {"diary.txt": PRECIOUS.encode()}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy(source: Path, out: Path, **how: Any) -> ck.EditedFiles:
    with ck.resumable(out, identity=b"plan", source=source, **how) as stage:
        return ck.write_edited(ck.open_checkpoint(source), stage.folder, {}, journal=stage.journal)


def partials(out: Path) -> list[Path]:
    return sorted(path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}."))


# --- one writer


@pytest.mark.parametrize("write", [write_atomically, lambda path, text: replaced(path, text)], ids=["whole", "draft"])
def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(
    write: Callable[[Path, str], None], victim: Path, tmp_path: Path
) -> None:
    for name, to in (("report.html", victim / "diary.txt"), ("abliteration.json", "nowhere"), ("loop", "loop")):
        (tmp_path / name).symlink_to(to)
        write(tmp_path / name, "ours")
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text() == "ours"
    assert partials(tmp_path / "report.html") == []


def replaced(path: Path, text: str) -> None:
    with replacing(path) as draft:
        draft.write_text(text)


def test_a_hard_link_in_the_place_of_a_file_keeps_its_other_name(victim: Path, tmp_path: Path) -> None:
    os.link(victim / "diary.txt", tmp_path / "report.html")
    write_atomically(tmp_path / "report.html", "ours")
    assert (tmp_path / "report.html").read_text() == "ours"


def test_a_link_to_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for number, target in enumerate((Path("/dev/null"), tmp_path / "pipe")):
        link = tmp_path / f"{number}.csv"
        link.symlink_to(target)
        with pytest.raises(CheckpointError, match="expected a file or nothing, found a pipe, socket or device"):
            write_atomically(link, "x")
        assert link.is_symlink()


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_no_file_can_replace_is_named_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    for attempt in (
        lambda: write_atomically(path, "x"),
        lambda: check_results(tmp_path),
        lambda: check_beside(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=rf"report\.html: expected a file or nothing, found a {kind}"):
            attempt()
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_link_is_not_written_into(victim: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "front").symlink_to(victim)
    for attempt in (lambda: real_folder(out / "front"), lambda: check_results(out)):
        with pytest.raises(CheckpointError, match="front: expected a folder to write to, found a link"):
            attempt()
    assert real_folder(out / "new").is_dir()


def test_a_new_file_is_new(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(victim / "diary.txt")
    (tmp_path / "dangling").symlink_to(victim / "new.txt")
    for name in ("link", "dangling"):
        with pytest.raises(FileExistsError):
            new_file(tmp_path / name)
    os.close(new_file(tmp_path / "free"))


def test_every_file_is_written_by_the_one_writer() -> None:
    """What opens, copies or makes files for writing is in few places, each of which makes new files only."""
    root = Path(ck.__file__).parents[2]
    writers = (
        ".write_text(",
        ".write_bytes(",
        '"wb")',
        '"w")',
        '"w+b")',
        "save_file(",
        "copyfile(",
        "copy2(",
        "copytree(",
    )
    allowed = {"files/atomic.py", "monitor/__init__.py"}
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if any(call in line for call in writers) and "new_file(" not in line
    }
    assert found <= allowed


# --- staging folders


def plant(out: Path, source: Path, victim: Path, how: str) -> Path:
    """What somebody may leave beside `out`, who knows how names and journals are made."""
    place = out.with_name(f".{out.name}.partial-{os.getpid()}-00000000")
    if how == "link":
        place.symlink_to(victim)
        return place
    place.mkdir()
    key = seal("journal", json.dumps([1, []])) if how == "own seal elsewhere" else "0" * 64
    (place / "journal.jsonl").write_text(json.dumps({"key": key}) + "\n")
    if how == "links inside":
        for name in ("model", "scratch", "replaced"):
            (place / name).symlink_to(victim)
    else:
        (place / "model").mkdir()
        (place / "model" / "config.json").write_text("his")
    if how == "own seal elsewhere":
        (place / "seal").write_text(seal("staging", str(out.parent), "other", "1:1"))
    return place


@pytest.mark.parametrize("how", ["plain", "link", "links inside", "own seal elsewhere"])
def test_a_planted_staging_folder_is_neither_removed_nor_gone_on_with(
    how: str, source: Path, victim: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    place = plant(out, source, victim, how)
    assert ck.left_bytes(out) == 0
    assert copy(source, out).kept == ()
    assert tree(out) == tree(source)
    assert partials(out) == [place]


def test_a_real_staging_folder_of_another_place_is_no_ones_here(source: Path, tmp_path: Path) -> None:
    """A folder that this user's run left, unpacked or copied elsewhere, is not the folder that was sealed."""
    left = killed(source, tmp_path / "out")
    shutil.copytree(left, tmp_path / "copied" / left.name)
    (tmp_path / "moved").mkdir()
    for out in (tmp_path / "copied" / "out", tmp_path / "moved" / "out"):
        if out.parent.name == "moved":
            left.rename(tmp_path / "moved" / left.name)
        assert copy(source, out).kept == ()
        assert len(partials(out)) == 1


def test_an_own_staging_folder_is_still_gone_on_with(source: Path, tmp_path: Path) -> None:
    left = killed(source, tmp_path / "out")
    assert ck.left_bytes(tmp_path / "out") > 0
    assert copy(source, tmp_path / "out").kept == ("model.safetensors", "config.json", "tokenizer.json")
    assert not left.exists()
    assert partials(tmp_path / "out") == []


def killed(source: Path, out: Path) -> Path:
    """What a run leaves that is killed just before its folder becomes OUT."""
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_die_at_the_end, args=(source, out))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    (left,) = partials(out)
    return left


def _die_at_the_end(source: Path, out: Path) -> None:
    staging._install = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    copy(source, out)


def test_a_key_that_others_can_read_or_that_is_a_link_is_not_used(
    victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ABLITERATE_CACHE", str(folder))
    mark = seal("a", "b")
    assert is_sealed(mark, "a", "b")
    assert not is_sealed(mark, "ab", "")
    assert not is_sealed(None, "a", "b")
    assert (folder / "key").stat().st_mode & 0o777 == 0o600
    for number, spoil in enumerate((_readable, _link_to(victim / "diary.txt"), _empty)):
        other = tmp_path / f"cache-{number}"
        other.mkdir()
        spoil(other / "key")
        monkeypatch.setenv("ABLITERATE_CACHE", str(other))
        assert not is_sealed(mark, "a", "b")
        assert is_sealed(seal("a"), "a")
        assert (other / "key").stat().st_mode & 0o777 == 0o600


def _readable(path: Path) -> None:
    path.write_bytes(b"k" * 32)
    path.chmod(0o644)


def _empty(path: Path) -> None:
    path.touch(0o600)


def _link_to(target: Path) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


# --- two writers


def test_the_second_writer_is_told_at_the_start(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fork = multiprocessing.get_context("fork")
    begun, done = fork.Event(), fork.Event()
    first = fork.Process(target=_hold, args=(source, out, begun, done))
    first.start()
    assert begun.wait(30)
    for attempt in (lambda: copy(source, out), lambda: ck.check_output(out), lambda: _reserve(out)):
        with pytest.raises(UsageError, match="another abliterate is writing it now"):
            attempt()
    assert len(partials(out)) <= 1
    done.set()
    first.join(30)
    assert first.exitcode == 0
    assert tree(out) == tree(source)
    ck.check_output(out, overwrite=True)


def _hold(source: Path, out: Path, begun: Any, done: Any) -> None:
    with reserved(out):
        begun.set()
        with ck.staged(out) as folder:
            ck.write_edited(ck.open_checkpoint(source), folder, {})
            done.wait(30)


def _reserve(out: Path) -> None:
    with reserved(out):
        pass


def test_a_reservation_ends_with_its_process_and_leaves_no_file(tmp_path: Path) -> None:
    before = set((cache_folder() / "locks").iterdir()) if (cache_folder() / "locks").is_dir() else set()
    with reserved(tmp_path / "out"), reserved(tmp_path / "out"), reserved(tmp_path / "other"):
        pass
    assert set((cache_folder() / "locks").iterdir()) <= before


# --- links in a model's folder


@pytest.mark.parametrize("name", ["notes.txt", "LICENSE", "figures"])
def test_a_link_out_of_the_source_is_not_followed(name: str, source: Path, victim: Path, tmp_path: Path) -> None:
    (source / name).symlink_to(victim if name == "figures" else victim / "diary.txt")
    files = copy(source, tmp_path / "out")
    assert files.links == (name,)
    assert PRECIOUS.encode() not in b"".join(tree(tmp_path / "out").values())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja", "code.py", "vocab.txt"])
def test_a_link_out_of_the_source_that_the_model_needs_is_refused(
    name: str, source: Path, victim: Path, tmp_path: Path
) -> None:
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(victim / "diary.txt")
    with pytest.raises(CheckpointError, match=rf"{name} is a link out of the folder and is not followed"):
        copy(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "source"]


def test_a_folder_made_like_the_hubs_cache_leads_nowhere_else(source: Path, victim: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--x--y"
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(source, snapshot)
    (repository / "blobs").symlink_to(victim)
    (snapshot / "notes.txt").symlink_to("../../blobs/diary.txt")
    assert copy(snapshot, tmp_path / "one").links == ("notes.txt",)
    (repository / "blobs").unlink()
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1").symlink_to(victim / "diary.txt")
    (repository / "blobs" / "2").write_text("its own")
    (snapshot / "more").symlink_to("../../blobs/2")
    (snapshot / "notes.txt").unlink()
    (snapshot / "notes.txt").symlink_to("../../blobs/1")
    assert copy(snapshot, tmp_path / "two").links == ("notes.txt",)
    assert (tmp_path / "two" / "more").read_text() == "its own"


@pytest.mark.parametrize("name", ["README.md", "report.html", "abliteration.json", "front", "undo.safetensors"])
def test_what_lies_in_the_source_under_our_names_is_not_in_the_way(name: str, source: Path, tmp_path: Path) -> None:
    (source / name).mkdir()
    (source / name / "inside.txt").write_text("x")
    files = copy(source, tmp_path / "out")
    assert files.left_out == (f"{name}/inside.txt",)
    assert not (tmp_path / "out" / name).exists()


# --- interrupts


def test_many_interrupts_are_one_and_leave_nothing(source: Path, tmp_path: Path) -> None:
    code = """
import os, signal, sys, threading, time
from pathlib import Path
from abliterate.files.checkpoint import staging, staged
signal.signal(signal.SIGINT, signal.default_int_handler)
remove = staging.shutil.rmtree
def slow(*given, **how):
    time.sleep(0.1)
    remove(*given, **how)
staging.shutil.rmtree = slow
def press():
    for _ in range(30):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
try:
    with staged(Path(sys.argv[1])) as folder:
        for number in range(50):
            (folder / str(number)).touch()
        presses = threading.Thread(target=press)
        presses.start()
        time.sleep(10)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "new" / "out")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "interrupted\n"
    assert not (tmp_path / "new").exists()


def test_an_interrupt_that_has_to_wait_is_heeded_at_the_end() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), one_interrupt() as interrupts:  # noqa: PT012
        interrupts.wait()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        reached.append(True)
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- names that a shell would have made others


def test_paths_at_home_and_an_empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FolderSettings(out=Path("~/x")).out == tmp_path / "x"
    assert InspectSettings(save=Path("~/d.safetensors")).save == tmp_path / "d.safetensors"
    assert FolderSettings(out=Path("x~/~")).out == Path("x~/~")
    for empty in ("", None):
        monkeypatch.delenv("ABLITERATE_CACHE", raising=False)
        if empty is not None:
            monkeypatch.setenv("ABLITERATE_CACHE", empty)
        assert cache_folder() == tmp_path / ".cache" / "abliterate"


def test_commands_take_paths_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (["show", "~/out"], ["undo", "~/out"], ["report", "~/out"]):
        result = CliRunner().invoke(app, given)
        assert str(tmp_path / "out" / "abliteration.json") in str(result.exception)


def test_a_record_that_is_a_link_elsewhere_is_not_read(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "abliteration.json").symlink_to(victim / "diary.txt")
    with pytest.raises(UsageError, match=r"abliteration\.json is a link out of the folder"):
        read_record(tmp_path / "out")
    with pytest.raises(UsageError, match=r"abliteration\.json is a link out of the folder"):
        check_beside(tmp_path / "out")


def test_low_ports_are_one_line() -> None:
    for port in (1, 80, 1023):
        with pytest.raises(UsageError, match=f"--port {port}: expected one from 1024 up"):
            free_port(port)
