"""Damaged files for every reader: seeded mutations of a good one, and what may come of them.

Whatever a file holds, a reader gives its content or raises an error of this package, on one line, soon, and touches
nothing outside the folder of the case. In full:

    PYTHONPATH=src:tests python tests/fuzzing.py --cases 20000 [--seed 0] [KIND …]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.errors import AbliterateError
from abliterate.texts import printable

#: Seconds that one case may take; ordinary ones take a thousandth.
PATIENCE = 10.0
#: Characters of an error.
LONGEST = 2000

Reader = Callable[[Path], object]
#: Bytes of a good file → bytes of a damaged one.
Damage = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file: what it is called on disk, a good one, what reads it, and how its structure is damaged."""

    name: str
    specimen: bytes
    read: Reader
    structure: Damage | None = None
    beside: dict[str, bytes] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------- damage

TOKENS = (
    *(b"0", b"9" * 30, b"9" * 5000, b"-1", b"1e999", b"NaN", b"Infinity", b"null", b"true", b"{}", b"[]", b'""'),
    *(b"\xff", b"\xc0\x80", b"\xef\xbb\xbf", b"\0", b"\n", b"\r", b"\x1b[31m", b"\\ud800", b"\\u0000", b'"', b","),
    *(b"[" * 200, b'{"a":' * 200, b"[" * 5000, b"A" * 3000, b"../../x", b"/etc/passwd", b"{{", b"{%", b"%}", b":"),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "a", "0", "\ud800", "\0", "\x1b]0;x\x07", "[/]", "x" * 5000, "../../x", "/etc/passwd"),
    *([], [[]], [None], [1, 2, 3], {}, {"a": 1}, {"": None}, "NaN", "1e999", "9" * 5000),
)


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Some bits turned."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def spliced(rng: random.Random, data: bytes) -> bytes:
    """Pieces cut off, left out, doubled, moved, or something else put in."""
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    piece = data[a:b]
    token = rng.choice(TOKENS)
    return rng.choice(
        (
            data[:a],
            data[:a] + data[b:],
            data[:b] + piece + data[b:],
            data[b:] + data[:b],
            data[:a] + token + data[a:],
            data[:a] + token + data[b:],
            data[:a] + token * rng.randint(2, 50) + data[a:],
            data[:a] + rng.randbytes(min(b - a, 64)) + data[b:],
        )
    )


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys."""
    keys: Sequence[Any] = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield value, key
        yield from _places(value[key])


def changed_json(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with a few of its parts replaced, left out, doubled or swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            return rng.choice(ODD)
        inside, key = rng.choice(places)
        how = rng.randrange(6)
        if how < 3:
            inside[key] = copy.deepcopy(rng.choice(ODD))
        elif how == 3:
            del inside[key]
        elif how == 4:
            other, name = rng.choice(places)
            inside[key] = copy.deepcopy(other[name]) if name in other or isinstance(other, list) else None
        elif isinstance(inside, dict):
            inside[rng.choice(("", "surprise", "\ud800", "x" * 300, key + "2"))] = inside.pop(key)
        else:
            inside[key] = [inside[key]] * rng.choice((2, 70))
        if rng.random() < 0.02:
            for _ in range(rng.choice((70, 300))):
                value = [value]
    return value


def in_json(rng: random.Random, data: bytes) -> bytes:
    """A file of JSON with another structure."""
    return json.dumps(changed_json(rng, json.loads(data))).encode(errors="replace")


def in_lines(rng: random.Random, data: bytes) -> bytes:
    """A file of JSON lines, one of them with another structure."""
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = in_json(rng, lines[number])
    return b"\n".join(lines)


def in_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, or with another structure in what it says of itself."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    said = header.get("__metadata__", {})
    if "abliterate" in said and rng.random() < 0.8:
        said["abliterate"] = json.dumps(changed_json(rng, json.loads(said["abliterate"])))
    else:
        header = changed_json(rng, header)
    raw = json.dumps(header).encode(errors="replace")
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def damaged(rng: random.Random, kind: Kind) -> bytes:
    """A damaged file of a kind."""
    ways: list[Damage] = [flipped, spliced] + ([kind.structure] * 3 if kind.structure else [])
    try:
        data = rng.choice(ways)(rng, kind.specimen)
    except (ValueError, RecursionError, IndexError, KeyError, TypeError):  # what was changed holds no more changes
        data = spliced(rng, kind.specimen)
    return spliced(rng, data) if data and rng.random() < 0.1 else data


# ------------------------------------------------------------------------------------------------------ the watch

#: Files that readers may look at: what Python and its libraries consist of, and the kernel's word on this process.
_OURS = tuple({sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "/proc/", "/sys/", "/dev/null"})
_WRITING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")


class Watch:
    """Notes what is opened, made, removed or asked for outside of `folder` while it is on. There is one a process."""

    folder: str | None = None
    found: tuple[str, ...] = ()

    def __init__(self) -> None:
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.fork"):
            self.found += (event,)
        if event != "open" and event not in _WRITING:
            return
        for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
            if not isinstance(path, str | bytes | os.PathLike):
                continue
            if event != "open" and not os.path.isabs(path) and -1 not in arguments[1:]:
                continue  # within a folder that was opened, which was seen
            place = os.path.abspath(os.fsdecode(path))
            reading = event == "open" and not (
                isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if not f"{place}{os.sep}".startswith(self.folder) and not (reading and place.startswith(_OURS)):
                self.found += (f"{event} {place}",)

    @contextlib.contextmanager
    def on(self, folder: Path) -> Iterator[None]:
        """Watch, inside."""
        self.folder, self.found = f"{folder}{os.sep}", ()
        try:
            yield
        finally:
            self.folder = None


_watch: list[Watch] = []


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the cases of a kind: read, refused, and what should not have been, with the number of the case."""

    kind: str
    read: int
    refused: int
    slowest: float
    faults: tuple[tuple[int, str], ...]


def fuzz(kind: Kind, cases: int, seed: int = 0) -> Outcome:
    """Read `cases` damaged files of a kind, of which the first is not damaged."""
    if not _watch:
        _watch.append(Watch())
    count, faults, slowest = Counter[str](), list[tuple[int, str]](), 0.0
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        for beside, content in kind.beside.items():
            (folder / beside).parent.mkdir(parents=True, exist_ok=True)
            (folder / beside).write_bytes(content)
        path = folder / kind.name
        kind.read(_written(path, kind.specimen))  # the control; and whatever is loaded on first use is loaded
        for case in range(cases):
            data = damaged(random.Random(f"{kind.name} {seed} {case}"), kind)
            start = time.perf_counter()
            fault = _fault(kind, _written(path, data), count)
            seconds = time.perf_counter() - start
            slowest = max(slowest, seconds)
            if fault or seconds > PATIENCE:
                faults.append((case, fault or f"took {seconds:.1f} s"))
    return Outcome(kind.name, count["read"], count["refused"], slowest, tuple(faults))


def _written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _fault(kind: Kind, path: Path, count: Counter[str]) -> str:
    """What a reader did that it must not do; "" when it did nothing such."""
    root = path.parent if kind.name.count("/") == 0 else path.parents[kind.name.count("/")]
    try:
        with _watch[0].on(root):
            kind.read(path)
        count["read"] += 1
    except AbliterateError as error:
        count["refused"] += 1
        said = str(error)
        if not said or "\n" in said or said != printable(said) or len(said) > LONGEST:
            return f"says {said[:300]!r} ({len(said)} characters)"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "abliterate" in frame.filename] or where
        return f"{type(error).__name__}: {str(error)[:200]} at {ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}"
    return f"touches {', '.join(sorted(set(_watch[0].found)))}" if _watch[0].found else ""


def main() -> None:
    """All kinds, or those that are named, in full."""
    from fuzzed_kinds import kinds

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="names of files; default: all")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    wrong = 0
    for kind in kinds():
        if given.kinds and kind.name not in given.kinds:
            continue
        start = time.perf_counter()
        found = fuzz(kind, given.cases, given.seed)
        seconds = time.perf_counter() - start
        print(
            f"{kind.name:28} {given.cases} files: {found.read} read, {found.refused} refused, "
            f"{len(found.faults)} faults; slowest {1000 * found.slowest:.0f} ms, {seconds:.0f} s in all",
            flush=True,
        )
        several = Counter(fault for _, fault in found.faults)
        for fault, times in several.most_common(12):
            case = next(case for case, other in found.faults if other == fault)
            print(f"    {times} x {fault} (first: case {case})")
        wrong += len(found.faults)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
