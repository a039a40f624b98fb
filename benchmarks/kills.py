"""Commands that are killed at random moments: what they leave never looks finished, and the next run mends it.

Run `python benchmarks/kills.py [--kills 500] [--interrupts 0] [--seed 0] [--only apply undo …]`. A small model (that
of the tests) is made in a temporary folder; `apply`, `run`, `search`, `inspect -o` and `undo` take turns on it, each in
a fresh process that is forked when everything is imported, so that a moment is one of work. A process is killed
(SIGKILL), or interrupted several times in a row (SIGINT), after a time drawn evenly from zero to what the command took.
Then

- the model that was read is as it was, byte for byte;
- what stands in OUT is what stood there, or the finished result: a model that `check` proves, a record to be read;
- the same command, started again, comes to its end, and nothing else is left beside OUT;
- after interrupts nothing is left beside OUT at once.

The last line says how many processes were stopped, and how many of them before they were done.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

#: Interrupts in a row, and seconds between them.
PRESSES, PAUSE = 5, 0.02


@dataclass(frozen=True, slots=True)
class Job:
    """A command, the folder it writes, what makes that folder as it is before, and whether it is finished."""

    name: str
    arguments: tuple[str, ...]
    again: tuple[str, ...]
    out: Path
    prepare: Callable[[], None]
    done: Callable[[], bool]


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def child(arguments: tuple[str, ...], log: Path) -> int:
    """The process id of a fork that runs a command of abliterate; what it says goes into `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream in (1, 2):
            os.dup2(handle, stream)
        sys.argv = ["abliterate", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from abliterate.cli.app import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stop(pid: int, after: float, interrupts: bool) -> int:
    """Stop a child after some seconds; its exit code."""
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        if not interrupts:
            os.kill(pid, signal.SIGKILL)
        for _ in range(PRESSES if interrupts else 0):
            os.kill(pid, signal.SIGINT)
            time.sleep(PAUSE)
    return finish(pid)


def jobs(place: Path) -> list[Job]:
    """The commands, once what they need is there: a model, prompts, a direction, and an edited model to take back."""
    from abliterate.edit.direction import Direction, save_direction
    from abliterate.edit.undo import verify_files
    from abliterate.record import read_record
    from planted import plant

    planted = plant(place / "in", shards=3)
    model, work = str(planted.folder), place / "work"
    save_direction(place / "in" / "d.safetensors", Direction(planted.direction[None]))
    direction = ("--direction", str(place / "in" / "d.safetensors"))
    sets = ("harmful", "harmless", "borderline")
    prompts = tuple(part for name in sets for part in (f"--{name}", str(getattr(planted, name))))
    prompts = (*prompts, "--limit", "12", "--device", "cpu")
    quick = ("--refusal-tokens", "I", "--max-new-tokens", "4", "--all-prompts")
    out, edited = work / "out", place / "in" / "edited"
    assert finish(child(("apply", model, *direction, "-o", str(edited), "-q"), place / "log")) == 0

    def proved() -> bool:
        return out.is_dir() and verify_files(out).intact

    def recorded() -> bool:
        return (out / "abliteration.json").is_file() and bool(read_record(out).created)

    def restored() -> bool:
        return tree(out) == tree(planted.folder)

    def nothing() -> None:
        work.mkdir()

    def copied() -> None:
        work.mkdir()
        shutil.copytree(edited, out)

    def job(name: str, *arguments: str, again: tuple[str, ...] = (), undone: bool = False) -> Job:
        done = restored if undone else proved if name in ("apply", "run") else recorded
        return Job(name, (*arguments, "-q"), (*arguments, *again, "-q"), out, copied if undone else nothing, done)

    to = ("-o", str(out))
    search = ("search", model, *prompts, *quick, "--points", "2", "--steps", "4", "--held-out", "none", "--force", *to)
    return [
        job("apply", "apply", model, *direction, *to),
        job("run", "run", model, *prompts, *quick, "--search", "closed-form", "--force", *to),
        job("search", *search, again=("--overwrite",)),
        job("inspect", "inspect", str(edited), *to),
        job("undo", "undo", str(out), undone=True),
    ]


def whole(job: Job, before: dict[str, str], log: Path) -> None:
    """Raise where what stands in OUT is neither what stood there nor finished."""
    if job.out.exists() and tree(job.out) != before and not job.done():
        record = job.out / "abliteration.json"
        # `search` and `inspect -o` write file after file into OUT: the record comes last.
        if job.name in ("search", "inspect") and not record.exists():
            return
        raise AssertionError(f"{job.name}: OUT holds something unfinished\n{log.read_text()[-2000:]}")


def trial(job: Job, seconds: float, place: Path, *, interrupts: bool) -> bool:
    """Stop a command, check what it left, and let it finish; whether it was stopped before it was done."""
    work, log = place / "work", place / "log"
    shutil.rmtree(work, ignore_errors=True)
    job.prepare()
    before = tree(job.out) if job.out.exists() else {}
    code = stop(child(job.arguments, log), seconds, interrupts)
    whole(job, before, log)
    left = sorted(path.name for path in work.iterdir() if path != job.out)
    if interrupts and left:
        raise AssertionError(f"{job.name}: interrupts left {left}\n{log.read_text()[-2000:]}")
    if not (job.out.exists() and job.done()):
        end = finish(child(job.again if job.out.exists() else job.arguments, log))
        if end not in (0, 3) or not job.done():
            raise AssertionError(f"{job.name}: the next run ended with {end}\n{log.read_text()[-2000:]}")
        left = sorted(path.name for path in work.iterdir() if path != job.out)
        if left:
            raise AssertionError(f"{job.name}: the next run left {left}")
    return code not in (0, 3)


def timed(job: Job, place: Path) -> float:
    """Seconds that a command takes when nobody stops it."""
    shutil.rmtree(place / "work", ignore_errors=True)
    job.prepare()
    started = time.perf_counter()
    code = finish(child(job.arguments, place / "log"))
    if code not in (0, 3) or not job.done():
        raise AssertionError(f"{job.name} ended with {code}\n{(place / 'log').read_text()[-3000:]}")
    return time.perf_counter() - started


def stopped(place: Path, kills: int, interrupts: int, seed: int, only: list[str] | None = None) -> dict[str, int]:
    """Stop commands in the folder `place`, by turns; how many of each were stopped before they were done."""
    import torch
    import transformers  # noqa: F401

    import abliterate.forensics.inspect
    import abliterate.pipeline  # noqa: F401

    torch.set_num_threads(1)
    os.environ["ABLITERATE_CACHE"] = str(place / "cache")
    chosen = [job for job in jobs(place) if not only or job.name in only]
    took = {job.name: timed(job, place) for job in chosen}
    source = tree(place / "in")
    generator, counted = random.Random(seed), Counter[str]()
    for number in range(kills + interrupts):
        job = chosen[number % len(chosen)]
        hurried = number >= kills
        counted[job.name] += trial(job, generator.uniform(0, took[job.name]), place, interrupts=hurried)
        if tree(place / "in") != source:
            raise AssertionError(f"{job.name}: changed what it reads")
        if number % 20 == 19:
            sys.stderr.write(f"{number + 1} stopped\n")
    return dict(counted)


def main() -> None:
    """Stop many processes and say how many."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--interrupts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+")
    given = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        early = stopped(Path(folder), given.kills, given.interrupts, given.seed, given.only)
    print(
        json.dumps(
            {
                "kills": given.kills,
                "interrupts": given.interrupts,
                "stopped before they were done": early,
                "seconds": round(time.perf_counter() - started),
            }
        )
    )


if __name__ == "__main__":
    main()
