"""What an edit changed, and that one flipped bit anywhere is seen."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from abliterate.errors import CheckpointError, UsageError
from abliterate.files import checkpoint as ck
from abliterate.files.integrity import Integrity, check, has_own_index

PLANNED = ("a.down", "b.down")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def compared(out: Path, source: Path, planned: Sequence[str], **options: Any) -> Integrity:
    return check(ck.open_checkpoint(out), ck.open_checkpoint(source), planned, **options)


def make_source(folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for letter, file in zip("ab", SHARDS, strict=True):
        tensors: dict[str, np.ndarray[Any, Any]] = {
            f"{letter}.down": generator.normal(size=(6, 4)).astype(np.float16),
            f"{letter}.up": generator.normal(size=(4, 6)).astype(np.float32),
            f"{letter}.norm": np.ones(4, np.float16),
            f"{letter}.none": np.ones((0, 4), np.float16),
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 304}, "weight_map": weight_map}
    (folder / ck.INDEX_NAME).write_text(json.dumps(index))
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def flip_signs(reader: ck.TensorReader) -> Iterator[bytearray]:
    data = reader.read(0, reader.info.nbytes)
    data[1::2] = bytes(value ^ 0x80 for value in data[1::2])
    yield data


def edit(source: Path, out: Path, changes: ck.Changes | None = None) -> ck.EditedFiles:
    out.mkdir()
    return ck.write_edited(ck.open_checkpoint(source), out, dict.fromkeys(PLANNED, flip_signs), changes=changes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A source, its edited copy, and the hashes that were recorded when it was written."""
    place = tmp_path_factory.mktemp("integrity")
    files = edit(make_source(place / "source"), place / "out")
    return place / "source", place / "out", {name: files.sha256[name] for name in SHARDS}


CLEAN = Integrity(
    changed=PLANNED,
    unchanged=(),
    damaged=(),
    reshaped=(),
    missing=(),
    extra=(),
    headers=(),
    sha256={},
    wrong_hashes=(),
    other_files=dict.fromkeys(("config.json", ck.INDEX_NAME, "tokenizer.json"), "equal"),
)


def without_hashes(found: Integrity) -> Integrity:
    return dataclasses.replace(found, sha256={})


def test_a_clean_edit(pair: tuple[Path, Path, dict[str, str]]) -> None:
    source, out, recorded = pair
    found = compared(out, source, PLANNED, recorded=recorded)
    assert found.ok
    assert without_hashes(found) == CLEAN
    assert found.sha256 == recorded == {name: ck.sha256(out / name) for name in SHARDS}


def test_a_copy_has_nothing_changed_and_an_unplanned_edit_is_damage(pair: tuple[Path, Path, dict[str, str]]) -> None:
    source, out, _ = pair
    same = compared(source, source, PLANNED)
    assert same.ok
    assert (same.changed, same.unchanged) == ((), PLANNED)
    found = compared(out, source, ["a.down"])
    assert not found.ok
    assert (found.changed, found.damaged) == (("a.down",), ("b.down",))
    with pytest.raises(UsageError, match=r"'c\.down'"):
        compared(out, source, ["c.down"])


@pytest.mark.parametrize("shard_bytes", [1, 300, 500, 10**9])
def test_any_sharding_is_compared(shard_bytes: int, pair: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    source = pair[0]
    changes = ck.Changes(
        shard_bytes=shard_bytes,
        extra={"head": ck.open_checkpoint(source).tensors["a.down"]},
        replaced={"config.json": b"{}"},
    )
    files = edit(source, tmp_path / "out", changes)
    recorded = {name: digest for name, digest in files.sha256.items() if name.endswith(".safetensors")}
    found = compared(tmp_path / "out", source, PLANNED, extra={"head": "a.down"}, recorded=recorded)
    assert found.ok
    assert found.changed == PLANNED
    assert found.other_files["config.json"] == "different"
    assert found.other_files["tokenizer.json"] == "equal"
    assert compared(tmp_path / "out", source, PLANNED).extra == ("head",)
    assert compared(source, tmp_path / "out", PLANNED).missing == ("head",)
    wrong = compared(tmp_path / "out", source, PLANNED, extra={"head": "b.down"})
    assert wrong.damaged == ("head",)
    assert compared(source, source, PLANNED, extra={"head": "a.down"}).missing == ("head",)


@pytest.fixture
def indexed(tmp_path: Path) -> tuple[Path, Path]:
    """A source of one file without an index, and its copy with one."""
    (tmp_path / "source").mkdir()
    tensors: dict[str, np.ndarray[Any, Any]] = {name: np.ones((6, 4), np.float16) for name in PLANNED}
    save_file(tensors, tmp_path / "source" / ck.SINGLE_NAME)
    edit(tmp_path / "source", tmp_path / "out", ck.Changes(indexed=True))
    return tmp_path / "source", tmp_path / "out"


def test_an_index_that_was_added_is_no_fault(indexed: tuple[Path, Path]) -> None:
    source, out = indexed
    found = compared(out, source, PLANNED, indexed=True)
    assert found.ok
    assert found.other_files == {ck.INDEX_NAME: "extra"}
    assert has_own_index(ck.open_checkpoint(out))
    assert not has_own_index(ck.open_checkpoint(source))


@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (lambda text: text.replace('"total_size": 96', '"total_size": 97'), "different"),
        (lambda text: text.replace('    "a.down": "model.safetensors",\n', ""), "different"),
        (lambda text: text.replace("model.safetensors", "other.safetensors"), "different"),
        (lambda _: None, "missing"),
    ],
    ids=["size", "a tensor less", "another file", "gone"],
)
def test_an_index_that_was_added_is_checked(
    indexed: tuple[Path, Path], damage: Callable[[str], str | None], state: str
) -> None:
    source, out = indexed
    before, after = (out / ck.INDEX_NAME).read_text(), damage((out / ck.INDEX_NAME).read_text())
    assert after != before
    (out / ck.INDEX_NAME).unlink() if after is None else (out / ck.INDEX_NAME).write_text(after)
    assert compared(out, source, PLANNED, indexed=True).other_files == {ck.INDEX_NAME: state}


def test_shapes_and_types_must_stay(pair: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    source = pair[0]
    shutil.copytree(source, tmp_path / "out")
    path = tmp_path / "out" / SHARDS[0]
    content = path.read_bytes()
    assert content.count(b'"shape":[6,4]') == 1
    path.write_bytes(content.replace(b'"shape":[6,4]', b'"shape":[4,6]'))
    assert compared(tmp_path / "out", source, PLANNED).reshaped == ("a.down",)
    path.write_bytes(content.replace(b'"F32"', b'"I32"'))
    found = compared(tmp_path / "out", source, PLANNED)
    assert found.reshaped == ("a.up",)
    assert not found.ok


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_seen(data: st.DataObject, pair: tuple[Path, Path, dict[str, str]]) -> None:
    source, out, recorded = pair
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        copy = Path(shutil.copytree(out, Path(place) / "out"))
        path = data.draw(st.sampled_from(sorted(copy.iterdir())))
        content = bytearray(path.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        info = find(copy, path, bit // 8)
        try:
            found = compared(copy, source, PLANNED, recorded=recorded)
            bare = compared(copy, source, PLANNED)
        except CheckpointError:
            assert info is None  # no longer a checkpoint
            return
        if path.name in SHARDS:
            assert not found.ok
            assert found.wrong_hashes == (path.name,)
            assert bare.ok == (info in PLANNED)  # the hash alone can tell that of a planned tensor
            assert info in (None, *PLANNED) or bare.damaged == (info,)
        else:
            assert found.other_files[path.name] == "different"


def find(folder: Path, path: Path, byte: int) -> str | None:
    """The tensor that holds a byte of a file."""
    try:
        tensors = ck.open_checkpoint(folder).tensors.values()
    except CheckpointError:
        return None
    return next((info.name for info in tensors if info.file == path and info.start <= byte < info.end), None)


def test_hashes_must_be_of_all_shards(pair: tuple[Path, Path, dict[str, str]]) -> None:
    source, out, recorded = pair
    some = {SHARDS[0]: recorded[SHARDS[0]], "gone.safetensors": "0"}
    assert compared(out, source, PLANNED, recorded=some).wrong_hashes == ("gone.safetensors", SHARDS[1])


def test_memory_stays_small(tmp_path: Path) -> None:
    """100 MB are compared within a few megabytes."""
    for name in ("source", "out"):
        (tmp_path / name).mkdir()
        header = json.dumps({"a": {"dtype": "U8", "shape": [10**8], "data_offsets": [0, 10**8]}}).encode()
        path = tmp_path / name / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + 10**8)
    code = """
import sys
from pathlib import Path
from abliterate.files.checkpoint import open_checkpoint
from abliterate.files.integrity import check
from abliterate.monitor import peak_memory
before = peak_memory() // 1024
assert check(open_checkpoint(Path(sys.argv[1])), open_checkpoint(Path(sys.argv[2])), ["a"]).unchanged == ("a",)
print(peak_memory() // 1024 - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "source")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 10_000  # kilobytes
