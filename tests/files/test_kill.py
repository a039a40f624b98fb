"""Runs that are killed: what they leave never looks complete, and the next run goes on where they stopped.

This file is also the program that is killed: `python test_kill.py work FOLDER …` forks, and kills its children.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from abliterate.errors import UsageError
from abliterate.files import checkpoint as ck
from abliterate.files.checkpoint import growing, staging

CALLS = (
    "open", "close", "mkdir", "rmdir", "unlink", "rename", "replace", "fsync", "fchmod", "pwrite", "preadv",
    "copy_file_range", "lstat", "listdir",
)  # fmt: skip
SIZES = {"a.0": 70_000, "a.1": 30_000, "b.0": 20_000, "b.1": 50_000, "c.0": 40_000, "c.1": 10}


def make_source(folder: Path) -> Path:
    """Three shards of two tensors each; the first tensor of a shard is rewritten."""
    folder.mkdir()
    pool = random.Random(0).randbytes(110_000)
    weight_map: dict[str, str] = {}
    for number, letter in enumerate("abc", 1):
        names = [name for name in SIZES if name.startswith(letter)]
        sizes = [SIZES[name] for name in names]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        header = json.dumps(
            {
                name: {"dtype": "U8", "shape": [size], "data_offsets": [end - size, end]}
                for name, size, end in zip(names, sizes, ends, strict=True)
            }
        ).encode()
        file = f"model-{number:05d}-of-00003.safetensors"
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header + pool[number:][: ends[-1]])
        weight_map |= dict.fromkeys(names, file)
    (folder / ck.INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "tokenizer.json").write_bytes(pool[:5000])
    return folder


def job(source: Path, out: Path, *, overwrite: bool = False) -> ck.EditedFiles:
    """The work, in many small steps."""
    with mock.patch.multiple(growing, _TELL=4096, _FLUSH=8192, _PIECE=1000):
        return in_small_steps(source, out, overwrite=overwrite)


def in_small_steps(source: Path, out: Path, *, overwrite: bool) -> ck.EditedFiles:
    """Rewrite tensors, gather something from each, note it shard by shard, join it at the end."""
    gathered: dict[str, int] = {}

    def rewrite(reader: ck.TensorReader) -> Iterator[bytearray]:
        gathered[reader.info.name] = 0
        for start in range(0, reader.info.nbytes, 10_000):
            data = reader.read(start, min(10_000, reader.info.nbytes - start))
            gathered[reader.info.name] += sum(data)
            yield bytearray(255 - value for value in data)

    with ck.resumable(out, identity=b"the plan", source=source, overwrite=overwrite) as stage:

        def note(file: str, tensors: tuple[str, ...]) -> ck.Note:
            part = stage.journal.scratch / f"{file}.part"
            part.write_text(str(sorted(gathered)))
            beside = stage.folder / "undo" / file
            beside.parent.mkdir(exist_ok=True)
            beside.write_text(str(gathered))
            value = {name: gathered.pop(name) for name in tensors}
            assert not gathered, "what is noted with a file is of this file alone"
            return ck.Note(value, (part, beside))

        rewriters = dict.fromkeys(("a.0", "b.0", "c.0"), rewrite)
        checkpoint = ck.open_checkpoint(source)
        files = ck.write_edited(checkpoint, stage.folder, rewriters, journal=stage.journal, note=note)
        parts = sorted(stage.journal.scratch.iterdir())
        (stage.folder / "undo.txt").write_text("".join(path.read_text() for path in parts))
        record = {"notes": files.notes, "sha256": files.sha256, "source": files.source_sha256}
        (stage.folder / "abliteration.json").write_text(json.dumps(record))
    return files


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(out: Path) -> list[Path]:
    return sorted(path for path in out.parent.iterdir() if path.name.startswith("."))


# ------------------------------------------------------------------------------------- the program that is killed


def die_at(number: int) -> None:
    """Let this process kill itself at the `number`-th call of the system; a write is half done then."""
    left = number

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if name == "pwrite":
                    call(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def child(source: Path, out: Path, *, overwrite: bool, call: int | None = None, seconds: float | None = None) -> bool:
    """Run `job` in a child that dies at a call, or is killed after some time; whether it came to its end."""
    pid = os.fork()
    if not pid:
        try:
            if call:
                die_at(call)
            job(source, out, overwrite=overwrite)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def finished_files(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the files that a killed run had noted as finished, if the next run can use them."""
    if not (left := leftovers(out)) or not (left[0] / "model").exists():
        return {}
    lines = (left[0] / "journal.jsonl").read_bytes().splitlines() if (left[0] / "journal.jsonl").exists() else []
    about = {}
    for line in lines[1:]:
        name = json.loads(line)["file"]
        stat = (left[0] / "model" / name).stat()
        about[name] = (stat.st_ino, stat.st_mtime_ns)
    return about


def run_until_done(
    source: Path, out: Path, expected: dict[str, bytes], old: dict[str, bytes], **kill: Any
) -> tuple[bool, int]:
    """Kill a run, check what it left, let the next one finish; was it not killed, and what did the next one find?"""
    if old:
        out.mkdir()
        for name, content in old.items():
            (out / name).write_bytes(content)
    done = child(source, out, overwrite=bool(old), **kill)
    if out.exists():
        found = tree(out)
        assert found == expected or (found == old and not done), sorted(found)
    before: dict[str, tuple[int, int]] = {}
    if out.exists() and tree(out) == expected:
        staging._clear_abandoned(out, None)  # what the next run does first
    else:
        before = finished_files(out)
        assert child(source, out, overwrite=bool(old))
        after = {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in before}
        assert before == after, "a finished file was written again"
    assert tree(out) == expected
    assert leftovers(out) == []
    return done, len(before)


def work(place: Path, seed: int, how: str) -> None:
    """Kill many runs in the folder `place` and print how many files were kept in all."""
    source = make_source(place / "source")
    before = tree(source)
    job(source, place / "expected")
    expected = tree(place / "expected")
    generator = random.Random(seed)
    old = {"config.json": b"old", "model.safetensors": b"older"}
    kept = runs = 0
    if how == "calls":
        cases: list[dict[str, Any]] = [{"call": number} for number in range(1 + 4 * seed, 10_000, 8)]
    else:
        started = time.perf_counter()
        child(source, place / "timed", overwrite=False)
        longest = time.perf_counter() - started
        cases = [{"seconds": generator.uniform(0, longest)} for _ in range(40)]
    for number, case in enumerate(cases):
        out = place / f"{number}" / "out"
        out.parent.mkdir()
        done, files = run_until_done(source, out, expected, old if generator.random() < 0.3 else {}, **case)
        kept += files
        runs += not done
        if how == "calls" and done:
            break  # there are no more calls than that
    assert tree(source) == before
    print(json.dumps({"runs": runs, "kept": kept}))


# -------------------------------------------------------------------------------------------------------- tests


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: flushing is what takes the time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize(("how", "seed"), [("calls", 0), ("calls", 1), ("moments", 0)])
def test_a_killed_run_is_taken_up_again(how: str, seed: int, place: Path) -> None:
    command = [sys.executable, __file__, "work", str(place), str(seed), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    if how == "calls":  # else nothing was tried
        assert said["runs"] > 60
        assert said["kept"] > 20


def killed(source: Path, out: Path) -> Path:
    """What a run left that was killed when two shards were finished."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_kill as t; from pathlib import Path as P; "
    code += f"t.die_after(P({str(source)!r}), P({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = leftovers(out)
    return left


def die_after(source: Path, out: Path) -> None:
    """Run the job and die when two files are in the journal."""
    add = ck.Journal.add

    def count(self: ck.Journal, name: str, finished: ck.Finished) -> None:
        add(self, name, finished)
        if len(self.finished) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    ck.Journal.add = count  # type: ignore[method-assign]
    job(source, out)


FIRST, SECOND, THIRD = (f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))


def test_what_is_kept_is_said_and_not_rewritten(place: Path) -> None:
    source = make_source(place / "source")
    fresh = job(source, place / "expected")
    assert fresh.kept == ()
    left = killed(source, place / "out")
    with ck.resumable(place / "out", identity=b"the plan", source=source) as stage:
        assert not left.exists()  # it is this folder now
        assert stage.journal.kept_bytes == sum(fresh_size(place, name) for name in (FIRST, SECOND))
        assert set(tree(stage.folder)) == {FIRST, SECOND, f"undo/{FIRST}", f"undo/{SECOND}"}
        assert {path.name for path in stage.journal.scratch.iterdir()} == {f"{FIRST}.part", f"{SECOND}.part"}
        seen: list[int] = []
        again = ck.write_edited(
            ck.open_checkpoint(source),
            stage.folder,
            {"a.0": refuse, "b.0": refuse, "c.0": invert},
            journal=stage.journal,
            progress=seen.append,
        )
    assert again.kept == (FIRST, SECOND)
    assert again.sha256 == {**fresh.sha256}
    assert again.source_sha256 == fresh.source_sha256
    assert again.notes[:2] == fresh.notes[:2]
    assert sum(seen) == again.nbytes == fresh.nbytes
    for name, digest in again.sha256.items():
        assert ck.sha256(place / "out" / name) == digest
    for name, digest in again.source_sha256.items():
        assert ck.sha256(source / name) == digest


def fresh_size(place: Path, name: str) -> int:
    return (place / "expected" / name).stat().st_size


def refuse(reader: ck.TensorReader) -> Iterator[bytes]:
    raise AssertionError(f"{reader.info.name} is finished already")


def invert(reader: ck.TensorReader) -> list[bytes]:
    return [bytes(255 - value for value in reader.read(0, reader.info.nbytes))]


def cut_first(left: Path) -> None:
    os.truncate(left / "model" / FIRST, 1000)


def link_first(left: Path) -> None:
    (left / "model" / FIRST).rename(left.parent / "elsewhere")
    (left / "model" / FIRST).symlink_to(left.parent / "elsewhere")


def cut_part(left: Path) -> None:
    (left / "scratch" / f"{FIRST}.part").unlink()


def tear_journal(left: Path) -> None:
    path = left / "journal.jsonl"
    os.truncate(path, path.stat().st_size - 1)


def spoil_journal(left: Path) -> None:
    (left / "journal.jsonl").write_bytes(b"\0" * 100)


def foreign_journal(left: Path) -> None:
    path = left / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"nbytes"', b'"bytes"'))


def add_rubbish(left: Path) -> None:
    (left / "model" / "rubbish").mkdir()
    (left / "model" / "rubbish" / "x").write_text("x")
    (left / "scratch" / "y").write_text("y")
    (left / "journal.jsonl.new").write_text("z")


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (cut_first, (SECOND,)),
        (link_first, (SECOND,)),
        (cut_part, (SECOND,)),
        (tear_journal, (FIRST,)),
        (spoil_journal, ()),
        (foreign_journal, ()),
        (add_rubbish, (FIRST, SECOND)),
    ],
)
def test_only_what_is_whole_is_kept(damage: Callable[[Path], None], kept: tuple[str, ...], place: Path) -> None:
    source = make_source(place / "source")
    job(source, place / "expected")
    damage(killed(source, place / "out"))
    assert job(source, place / "out").kept == kept
    assert tree(place / "out") == tree(place / "expected")
    assert leftovers(place / "out") == []


def test_a_journal_can_be_taken_up_again_and_again(place: Path) -> None:
    (place / "model").mkdir()
    ck.Journal(place, "key")
    for number in range(4):
        (place / "journal.jsonl.new").write_text("left by a run that was killed")
        journal = ck.Journal(place, "key")
        assert list(journal.finished) == [f"{i}" for i in range(number)]
        (place / "model" / f"{number}").write_bytes(bytes(number))
        journal.add(f"{number}", ck.Finished(number, "hash", note={"x": 0.1}))
    assert ck.Journal(place, "key").finished["3"] == ck.Finished(3, "hash", note={"x": 0.1})
    assert ck.Journal(place, "other").finished == {}
    assert tree(place / "model") == {}


@pytest.mark.parametrize("other", ["identity", "time", "file", "plain"])
def test_another_run_starts_anew(other: str, place: Path) -> None:
    source = make_source(place / "source")
    left = killed(source, place / "out")
    if other == "time":
        os.utime(source / SECOND, (1, 1))
    if other == "file":
        (source / "new.txt").touch()
    if other == "plain":
        with ck.staged(place / "out", source=source) as folder:
            assert tree(folder) == {}
    else:
        identity = b"another plan" if other == "identity" else b"the plan"
        with ck.resumable(place / "out", identity=identity, source=source) as stage:
            assert stage.journal.finished == {}
            assert tree(stage.folder) == {}
    assert not left.exists()


def test_a_refused_start_keeps_what_is_there(place: Path) -> None:
    source = make_source(place / "source")
    left = killed(source, place / "out")
    (place / "out").mkdir()
    (place / "out" / "config.json").touch()
    with pytest.raises(UsageError, match="exists"):
        job(source, place / "out")
    assert leftovers(place / "out") == [left]
    assert job(source, place / "out", overwrite=True).kept == (FIRST, SECOND)


def test_a_run_that_lives_is_not_disturbed_by_the_same_run(place: Path) -> None:
    source, out = make_source(place / "source"), place / "out"
    killed(source, out)
    with ck.resumable(out, identity=b"the plan", source=source) as a:
        assert len(a.journal.finished) == 2
        before = tree(a.folder)
        with pytest.raises(UsageError, match="another abliterate is writing it now"):
            job(source, out)
        assert tree(a.folder) == before
        assert tree(place / "source") == tree(source)
    assert leftovers(out) == []


def test_a_failure_still_leaves_nothing(place: Path) -> None:
    source = make_source(place / "source")
    killed(source, place / "out")
    with pytest.raises(ValueError, match="stop"), ck.resumable(place / "out", identity=b"the plan", source=source):
        raise ValueError("stop")
    assert [path.name for path in place.iterdir()] == ["source"]


if __name__ == "__main__":
    work(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
