"""A hundred thousand malformed files: each is refused with CheckpointError, or read as the reference reads it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from abliterate.errors import AbliterateError, CheckpointError
from abliterate.files import checkpoint as ck
from abliterate.files.checkpoint import reading

FILES = 100_000
DATA = bytes(range(64))

Header = dict[str, Any]

# ------------------------------------------------------------------------------------------------ what is made up

NUMBERS: tuple[object, ...] = (
    0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 64, 255, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    10**30, -1, -8, 0.0, 1.5, 1e308, float("nan"), float("inf"), True, False, None, "4", "", [], [4], {}, {"a": 1},
)  # fmt: skip
TEXTS = (
    "", "a", "basis", "__metadata__", "dtype", "shape", "data_offsets", "\0", "\n", "\u202e", "\ufeff", "é", "e\u0301",
    "\U0001f600", "\ud800", "../x", "a" * 300, "'\"\\", "F32", "f32", "BF16",
)  # fmt: skip
TOKENS = (
    b"0", b"1", b"9", b"-", b".", b"e5", b'"', b",", b"[", b"]", b"{", b"}", b":", b" ", b"\\", b"\\u0000", b"\\ud83d",
    b"null", b"true", b"NaN", b"-0", b"00", b"1e999", b"\xff", b"\xc0\x80", b"\xef\xbb\xbf", b"\0", b"\t", b"\n",
)  # fmt: skip


def valid(rng: random.Random) -> Header:
    """A header that describes the first bytes of the data without a hole."""
    header: Header = {"__metadata__": {"format": "pt"}} if rng.random() < 0.5 else {}
    position = 0
    for number in range(rng.randint(1, 4)):
        dtype = rng.choice(("F64", "F32", "F16", "BF16", "U8", "BOOL", "F8_E4M3"))
        shape = [rng.choice((0, 1, 2, 4)) for _ in range(rng.randint(0, 2))]
        elements = shape[0] * shape[-1] if len(shape) == 2 else sum(shape) if shape else 1
        size = elements * ck.BITS[dtype] // 8
        header["basis" if not number else f"t{number}"] = entry(dtype, shape, position, position + size)
        position += size
    return header


def entry(dtype: object, shape: object, start: object, end: object) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def odd(rng: random.Random) -> object:
    """A value that is mostly out of place, as a copy of its own."""
    return copy.deepcopy(rng.choice(NUMBERS))


def encode(header: object) -> bytes:
    return json.dumps(header).encode()


def file_of(raw: bytes, length: int | None = None, data: bytes | None = None) -> bytes:
    """A file with the header `raw`; as much data as its tensors ask for, where that can be known."""
    size = (len(raw) if length is None else length) & 0xFFFF_FFFF_FFFF_FFFF
    return size.to_bytes(8, "little") + raw + (DATA if data is None else data)


def end_of(header: Header) -> int:
    ends: list[int] = [value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"]
    return max(ends)


def some_bytes(rng: random.Random) -> bytes:
    """Bytes of a valid file replaced, removed, put in or flipped."""
    header = valid(rng)
    content = bytearray(file_of(encode(header), data=DATA[: end_of(header)]))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        kind = rng.random()
        if kind < 0.4 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        else:
            content[at : at + rng.randint(0, 3)] = rng.choice(TOKENS)
    if rng.random() < 0.6:  # a length that fits, so that the JSON is reached
        content[:8] = max(0, len(content) - 8 - end_of(header)).to_bytes(8, "little")
    return bytes(content)


def some_places(rng: random.Random) -> bytes:
    """Values anywhere in the JSON of a valid header replaced by strange ones."""
    header = valid(rng)
    data = DATA[: end_of(header)]
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(list(header))
        if not isinstance(header[name], dict) or rng.random() < 0.1:
            header[name] = odd(rng)
            continue
        key = rng.choice(("dtype", "shape", "data_offsets", rng.choice(TEXTS)))
        old = header[name].get(key)
        if isinstance(old, list) and old and rng.random() < 0.7:
            old[rng.randrange(len(old))] = odd(rng)
        else:
            header[name][key] = rng.choice((odd(rng), rng.choice(TEXTS)))
        if rng.random() < 0.1:
            del header[name][key]
    return file_of(encode(header), data=data)


def some_offsets(rng: random.Random) -> bytes:
    """Tensors that overlap, leave holes, swap places or lie about where they are."""
    header = valid(rng)
    size = end_of(header)
    for value in header.values():
        if "data_offsets" in value and rng.random() < 0.6:
            shift = rng.choice((-8, -1, 1, 2, 4, 8, 2**32, 2**63))
            value["data_offsets"] = [
                value["data_offsets"][0] + shift,
                value["data_offsets"][1] + rng.choice((shift, 0)),
            ]
            if rng.random() < 0.2:
                value["data_offsets"].reverse()
    return file_of(encode(header), data=DATA[: max(0, size + rng.choice((0, 0, 0, 1, -1, 8)))])


def some_shapes(rng: random.Random) -> bytes:
    """Shapes and types that may or may not fit the bytes; factors whose product overflows."""
    shape = [rng.choice((0, 1, 2, 3, 2**16, 2**32, 2**61, 2**63, 2**64 - 1)) for _ in range(rng.randint(0, 5))]
    product = 1
    for factor in shape:
        product = product * factor % 2**64
    dtype = rng.choice((*ck.BITS, "F33", "f32", ""))
    size = product * ck.BITS.get(dtype, 8) // 8 % 2**64
    return file_of(encode({"a": entry(dtype, shape, 0, rng.choice((size, size, 4)))}), data=DATA[: min(size, 64)])


def some_lengths(rng: random.Random) -> bytes:
    """A length of the header that lies, or a file that is cut."""
    header = valid(rng)
    raw = encode(header) + b" " * rng.randint(0, 3)
    content = file_of(raw, len(raw) + rng.choice((0, -1, 1, -8, 8, 100, 2**31, 2**62, -(2**62))))
    return content[: rng.randint(0, len(content))] if rng.random() < 0.5 else content


def some_keys(rng: random.Random) -> bytes:
    """Keys that come twice, names that are strange, orders that are unusual."""
    header = valid(rng)
    data = DATA[: end_of(header)]
    parts = [f"{json.dumps(rng.choice(TEXTS) if rng.random() < 0.5 else k)}:{json.dumps(v)}" for k, v in header.items()]
    if rng.random() < 0.5:
        parts.append(rng.choice(parts))
    if rng.random() < 0.3:
        parts[0] = parts[0].replace('"dtype"', '"dtype":"U8","dtype"')
    rng.shuffle(parts)
    return file_of(("{" + ",".join(parts) + "}").encode("utf-8", "surrogatepass"), data=data)


def some_depth(rng: random.Random) -> bytes:
    """JSON nested deeply, or of another kind altogether."""
    depth = rng.choice((2, 30, 127, 128, 1000, 5000))
    kind = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"shape":', b"}]"), (b"[", b"")))
    inside = kind[0] * depth + b"1" + kind[1] * depth
    where = rng.choice(
        (b"%s", b'{"a":%s}', b'{"__metadata__":%s}', b'{"a":{"dtype":"U8","shape":%s,"data_offsets":[0,1]}}')
    )
    return file_of(where.replace(b"%s", inside), data=DATA[:1])


def some_noise(rng: random.Random) -> bytes:
    """Bytes without meaning, or an entirely made-up JSON value."""
    if rng.random() < 0.5:
        return rng.randbytes(rng.randint(0, 80))

    def value(depth: int) -> object:
        kind = rng.random()
        if depth > 3 or kind < 0.4:
            return odd(rng) if rng.random() < 0.6 else rng.choice(TEXTS)
        if kind < 0.6:
            return [value(depth + 1) for _ in range(rng.randint(0, 3))]
        return {rng.choice(TEXTS): value(depth + 1) for _ in range(rng.randint(0, 3))}

    return file_of(encode(value(0)), data=DATA[: rng.choice((0, 4, 64))])


MAKERS: tuple[tuple[Callable[[random.Random], bytes], float], ...] = (
    (some_bytes, 0.3), (some_places, 0.2), (some_offsets, 0.1), (some_shapes, 0.12), (some_lengths, 0.1),
    (some_keys, 0.1), (some_depth, 0.01), (some_noise, 0.07),
)  # fmt: skip

# -------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder in memory, where there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


class Probe:
    """Reads one made-up file after the other and counts what came of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.accepted = self.refused = self.stricter = 0
        self.slowest = 0.0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT)

    def close(self) -> None:
        os.close(self._fd)

    def see(self, content: bytes) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, content, 0)
        started = time.perf_counter()
        shard: ck.Shard | None = None
        try:
            shard = ck.read_shard(self.path)
        except CheckpointError as error:
            message = str(error)
            assert message.isprintable(), message
            assert len(message) < 1000, message
        self.slowest = max(self.slowest, time.perf_counter() - started)
        self.refused += shard is None
        if shard is not None:
            self.accepted += 1
            self.agree(shard, len(content))

    def agree(self, shard: ck.Shard, size: int) -> None:
        """What was accepted lies inside the file and is what the reference reader finds."""
        assert shard.file_bytes == size
        position = shard.header_bytes
        for info in shard.tensors.values():
            assert info.start == position
            position = info.end
        assert position == size
        with safe_open(self.path, "np") as reference:
            assert set(reference.keys()) == shard.tensors.keys()
            assert (reference.metadata() or {}) == shard.metadata
            for name, info in shard.tensors.items():
                part = reference.get_slice(name)
                assert (part.get_dtype(), tuple(part.get_shape())) == (info.dtype, info.shape)


@pytest.mark.parametrize(("maker", "share"), MAKERS, ids=[maker.__name__ for maker, _ in MAKERS])
def test_made_up_files_are_refused_or_read_as_the_reference_reads_them(
    maker: Callable[[random.Random], bytes], share: float, place: Path
) -> None:
    probe, rng, content = Probe(place / "model.safetensors"), random.Random(f"{maker.__name__} 0"), b""
    try:
        for _ in range(round(FILES * share)):
            content = maker(rng)
            probe.see(content)
    except BaseException as error:
        error.add_note(f"with the file {content!r}")
        raise
    finally:
        probe.close()
    assert probe.refused > 0.2 * FILES * share
    assert probe.slowest < 1


def test_the_makers_start_from_files_that_are_accepted(place: Path) -> None:
    probe, rng = Probe(place / "model.safetensors"), random.Random(1)
    for _ in range(300):
        header = valid(rng)
        probe.see(file_of(encode(header), data=DATA[: end_of(header)]))
    probe.close()
    assert probe.accepted > 290  # an odd number of F4 has no whole bytes
    assert sum(share for _, share in MAKERS) == pytest.approx(1)


def test_folders_with_a_made_up_index_or_shard_are_opened_or_refused(place: Path) -> None:
    folder = place / "folder"
    folder.mkdir()
    rng = random.Random(2)
    opened, messages = 0, set()
    for _ in range(3000):
        header = valid(rng)
        (folder / "a.safetensors").write_bytes(file_of(encode(header), data=DATA[: end_of(header)]))
        index: Any = {"metadata": {}, "weight_map": {name: "a.safetensors" for name in header if name[0] != "_"}}
        for _ in range(rng.randint(0, 2)):
            target = index if rng.random() < 0.3 else index["weight_map"]
            if isinstance(target, dict):
                key = rng.choice([*target, rng.choice(TEXTS)])
                target[key] = rng.choice((rng.choice(TEXTS), odd(rng), "a.safetensors", "/a.safetensors"))
            if not isinstance(index.get("weight_map"), dict):
                break
        raw = bytearray(encode(index))
        if rng.random() < 0.3:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        (folder / ck.INDEX_NAME).write_bytes(raw)
        try:
            found = ck.open_checkpoint(folder)
        except CheckpointError as error:
            messages.add(str(error))
            continue
        opened += 1
        assert [shard.path for shard in found.shards] == [folder / "a.safetensors"]
    assert 500 < opened < 2500
    assert all(map(str.isprintable, messages))


def test_direction_files_are_loaded_or_refused(place: Path) -> None:
    from abliterate.edit.direction import load_direction

    rng, path, loaded = random.Random(3), place / "direction.safetensors", 0
    makers = [maker for maker, _ in MAKERS]
    for _ in range(4000):
        path.write_bytes(rng.choice(makers)(rng))
        try:
            basis = load_direction(path).basis
        except AbliterateError:
            continue
        loaded += 1
        assert basis.ndim == 2
        assert bool(basis.isfinite().all())
    assert loaded > 0


def test_the_reference_refuses_what_is_refused_for_its_layout(place: Path) -> None:
    """The other direction, as a control: strictness beyond the reference is for a few known things only."""
    path, rng, both, stricter = place / "model.safetensors", random.Random(4), 0, set()
    for _ in range(3000):
        path.write_bytes(rng.choice((some_offsets, some_shapes, some_lengths))(rng))
        try:
            ck.read_shard(path)
        except CheckpointError as error:
            try:
                with safe_open(path, "np"):
                    stricter.add(str(error).split(": ", 1)[1])
            except (SafetensorError, OSError):
                both += 1
    assert both > 1000
    assert not stricter, stricter


def test_nothing_is_read_before_it_is_checked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that lies is refused by looking at the size of the file, not by trying to read that much."""
    path = place / "model.safetensors"
    asked: list[int] = []

    class Watched:
        def __init__(self, fd: int, mode: str) -> None:
            self._file = real(fd, mode)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def fileno(self) -> int:
            return int(self._file.fileno())

        def read(self, count: int) -> Any:
            asked.append(count)
            return self._file.read(count)

    real: Callable[..., Any] = open
    monkeypatch.setattr(reading, "open", Watched, raising=False)
    rng = random.Random(5)
    for _ in range(500):
        content = some_lengths(rng)
        path.write_bytes(content)
        asked.clear()
        with contextlib.suppress(CheckpointError):
            ck.read_shard(path)
        assert sum(asked) <= max(8, len(content))
