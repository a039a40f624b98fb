"""Safetensors files as bytes: what is accepted, what is refused, and that only what should change does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from abliterate.errors import AbliterateError, CheckpointError, UsageError
from abliterate.files import checkpoint as ck
from abliterate.files.checkpoint import growing, reading, staging

SRC = Path(ck.__file__).parents[3]


def raw_file(header: bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one_line(error: pytest.ExceptionInfo[AbliterateError], *parts: str) -> str:
    message = str(error.value)
    assert message
    assert message.isprintable(), message
    for part in parts:
        assert part in message, message
    return message


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def negate(reader: ck.TensorReader) -> Iterator[bytes]:
    """Flip every bit, seven bytes at a time."""
    for start in range(0, reader.info.nbytes, 7):
        chunk = reader.read(start, min(7, reader.info.nbytes - start))
        yield bytes(255 - value for value in chunk)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = tmp_path / "single"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "a": rng.normal(size=(5, 3)).astype(np.float32),
        "b": rng.integers(0, 255, (4, 7)).astype(np.uint8),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, np.float16),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "ü": "ß"})
    (folder / "config.json").write_text('{"model_type": "none"}')
    (folder / "tokenizer.json").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number in (1, 2, 3):
        name = f"model-{number:05d}-of-00003.safetensors"
        tensors = {f"layer.{number}.{k}": np.arange(40, dtype=np.int16) + number for k in "xyz"}
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 720.0}, "weight_map": weight_map}
    (folder / ck.INDEX_NAME).write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


# ------------------------------------------------------------------------------------------------ read_shard

U8 = entry()
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "length 0": (raw_file(b"{}", length=0), "header length is 0"),
    "length past the end": (raw_file(b"{}", length=3), "header length is 3"),
    "length huge": (raw_file(b"{}", length=2**64 - 1), "header length"),
    "a pickle": (b"\x80\x02" + b"pickle" * 9, "header length"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "header length"),
    "not utf-8": (raw_file(b'{"\xff":1}'), "UTF-8"),
    "lone surrogate": (raw_file(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "UTF-8"),
    "not json": (raw_file(b"{'a': 1}"), "JSON"),
    "cut json": (raw_file(b'{"a":'), "JSON"),
    "nul after json": (raw_file(b"{}\0"), "JSON"),
    "deep nesting": (raw_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested"),
    "list": (raw_file(b"[1, 2]"), "object"),
    "string": (raw_file(b'"abc"'), "object"),
    "null": (raw_file(b"null"), "object"),
    "duplicate tensor": (raw_file(b'{"a":{"x":1},"a":{"x":1}}'), "twice"),
    "duplicate key": (raw_file(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "twice"),
    "metadata list": (raw_file({"__metadata__": []}), "__metadata__"),
    "metadata null": (raw_file({"__metadata__": None}), "__metadata__"),
    "metadata number": (raw_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry list": (raw_file({"a": ["U8", [4], [0, 4]]}, b"1234"), "'a'"),
    "entry null": (raw_file({"a": None}), "'a'"),
    "no dtype": (raw_file({"a": {"shape": [4], "data_offsets": [0, 4]}}, b"1234"), "dtype None"),
    "no shape": (raw_file({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234"), "shape None"),
    "no offsets": (raw_file({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), "data_offsets None"),
    "unknown dtype": (raw_file({"a": entry("BF17")}, b"1234"), "BF17"),
    "dtype number": (raw_file({"a": entry(8)}, b"1234"), "dtype 8"),
    "dtype list": (raw_file({"a": entry(["U8"])}, b"1234"), "dtype"),
    "shape number": (raw_file({"a": entry(shape=4)}, b"1234"), "shape"),
    "shape bool": (raw_file({"a": entry(shape=[True, 4])}, b"1234"), "shape"),
    "shape float": (raw_file({"a": entry(shape=[4.0])}, b"1234"), "whole numbers"),
    "shape nan": (raw_file({"a": entry(shape=[float("nan")])}, b"1234"), "whole numbers"),
    "shape string": (raw_file({"a": entry(shape="4")}, b"1234"), "shape"),
    "shape negative": (raw_file({"a": entry(shape=[-2, -2])}, b"1234"), "whole numbers"),
    "shape minus zero": (raw_file(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "whole"),
    "shape over u64": (raw_file({"a": entry(shape=[2**64])}, b"1234"), "2**64"),
    "shape over int": (raw_file({"a": entry(shape=[10**18 * 10**18])}, b"1234"), "2**64"),
    "product overflow": (raw_file({"a": entry(shape=[2**40, 2**40])}, b"1234"), "2**64"),
    "bits overflow": (raw_file({"a": entry("F64", [2**60])}, b"1234"), "2**64"),
    "overflow before 0": (raw_file({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}), "2**64"),
    "five thousand digits": (raw_file(b'{"a":{"shape":[' + b"1" * 5000 + b"]}}"), "whole numbers"),
    "offsets one": (raw_file({"a": entry(offsets=[4])}, b"1234"), "data_offsets"),
    "offsets three": (raw_file({"a": entry(offsets=[0, 4, 4])}, b"1234"), "data_offsets"),
    "offsets bool": (raw_file({"a": entry(shape=[1], offsets=[False, True])}, b"1"), "data_offsets"),
    "offsets swapped": (raw_file({"a": entry(offsets=[4, 0])}, b"1234"), "data_offsets"),
    "too short for shape": (raw_file({"a": entry("F32")}, b"1234"), "takes 16 bytes"),
    "half a byte": (raw_file({"a": entry("F4", [3], [0, 2])}, b"12"), "takes 1.5 bytes"),
    "overlap": (raw_file({"a": U8, "b": entry(offsets=[2, 6])}, b"123456"), "overlaps"),
    "same place twice": (raw_file({"a": U8, "b": U8}, b"1234"), "overlaps"),
    "hole": (raw_file({"a": U8, "b": entry(offsets=[5, 9])}, b"123456789"), "hole"),
    "hole at the start": (raw_file({"a": entry(offsets=[1, 5])}, b"12345"), "hole"),
    "past the end": (raw_file({"a": entry(shape=[9], offsets=[0, 9])}, b"1234"), "the file has"),
    "trailing byte": (raw_file({"a": U8}, b"12345"), "the file has"),
    "data without tensors": (raw_file({}, b"1"), "the file has"),
    "newline in the name": (raw_file({"a\nb\x1b[31m": entry(7)}, b"1234"), "dtype"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, part = BAD[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        ck.read_shard(path)
    assert len(one_line(error, str(path), part)) < 700


def test_headers_over_the_limit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 200_000_000)  # sparse
    with pytest.raises(CheckpointError) as error:
        ck.read_shard(path)
    one_line(error, "100000001", "100000000")


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("missing", "pipe", "dangling", ".", "line\nbreak"):
        with pytest.raises(CheckpointError) as error:
            ck.read_shard(tmp_path / name)
        one_line(error, str(tmp_path))


@pytest.mark.parametrize("dtype", ck.BITS)
def test_every_dtype_has_the_size_of_the_reference(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = ck.BITS[dtype]
    path.write_bytes(raw_file({"a": entry(dtype, [2, 4], [0, size])}, bytes(size)))
    assert ck.read_shard(path).tensors["a"].nbytes == size
    with safe_open(path, "np") as file:
        assert list(file.keys()) == ["a"]


def test_the_layout_is_the_one_of_the_file(single: Path) -> None:
    path = single / "model.safetensors"
    shard = ck.read_shard(path)
    content = path.read_bytes()
    assert shard.metadata == {"format": "pt", "ü": "ß"}
    assert shard.header_bytes == 8 + struct.unpack("<Q", content[:8])[0]
    assert shard.file_bytes == len(content)
    positions = [(info.start, info.end) for info in shard.tensors.values()]
    assert positions == sorted(positions)
    with safe_open(path, "np") as file:
        for name, info in shard.tensors.items():
            array = file.get_tensor(name)
            assert content[info.start : info.end] == array.tobytes()
            assert info.shape == array.shape
            assert info.file == path


def test_unusual_but_valid_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for header, data, names in (
        (b"{}", b"", []),
        (b' {"__metadata__":{}}  \n', b"", []),
        (json.dumps({"z": entry(offsets=[4, 8]), "a": U8}).encode(), b"12345678", ["a", "z"]),
        (json.dumps({"z": entry(shape=[0, 2**40], offsets=[4, 4]), "a": U8}).encode(), b"1234", ["a", "z"]),
        (json.dumps({"\n'\"": entry(shape=[], offsets=[0, 1])}).encode(), b"1", ["\n'\""]),
    ):
        path.write_bytes(raw_file(header, data))
        assert list(ck.read_shard(path).tensors) == names


VALID = raw_file({"__metadata__": {"a": "b"}, "x": U8, "y": entry("F16", [1, 2], [4, 8])}, b"12345678")


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with a few bytes replaced, removed or put in, mostly by bytes that mean something."""
    content = bytearray(VALID)
    pieces = [b"0", b"1", b"-", b".", b"e", b'"', b",", b"[", b"]", b"{", b"}", b":", b" ", b"8", b"\\u0000"]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        piece = draw(st.one_of(st.sampled_from(pieces), st.binary(max_size=3)))
        content[at : at + draw(st.integers(0, 3))] = piece
    if draw(st.booleans()) and len(content) >= 8:  # a length that fits, so that the JSON is reached
        content[:8] = struct.pack("<Q", max(0, len(content) - 16))
    return bytes(content)


@settings(max_examples=600, deadline=None)
@given(mutated())
def test_any_file_is_read_as_the_reference_reads_it_or_refused(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
        file.write(content)
        file.flush()
        try:
            shard = ck.read_shard(Path(file.name))
        except CheckpointError:
            return
        with safe_open(file.name, "np") as reference:
            assert set(reference.keys()) == set(shard.tensors)
            assert (reference.metadata() or {}) == shard.metadata
            for name, info in shard.tensors.items():
                part = reference.get_slice(name)
                assert (part.get_dtype(), tuple(part.get_shape())) == (info.dtype, info.shape)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-2, 9) | st.text(max_size=3) | st.sampled_from(["U8", "F4"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"]), inner)
        ),
        max_leaves=12,
    )
)
def test_any_json_header_is_accepted_or_refused(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.safetensors"
        path.write_bytes(raw_file(json.dumps(value).encode(), b"more than any header here can cover"))
        with pytest.raises(CheckpointError) as error:
            ck.read_shard(path)
        one_line(error, str(path))


# ------------------------------------------------------------------------------------------- open_checkpoint


def test_single_file(single: Path) -> None:
    found = ck.open_checkpoint(single)
    assert found.index is None
    assert [shard.path.name for shard in found.shards] == ["model.safetensors"]
    (single / "model.safetensors").rename(single / "other.safetensors")
    (single / "direction.safetensors").write_bytes(b"not even one")
    assert ck.open_checkpoint(single).tensors.keys() == found.tensors.keys()


def test_shards_with_an_index(sharded: Path) -> None:
    found = ck.open_checkpoint(sharded)
    assert found.index == sharded / ck.INDEX_NAME
    assert len(found.shards) == 3
    assert len(found.tensors) == 9
    assert found.tensors["layer.2.x"].file == sharded / "model-00002-of-00003.safetensors"


def test_the_single_file_comes_before_an_index_of_others_as_in_transformers(sharded: Path, tmp_path: Path) -> None:
    save_file({"w": np.zeros(3, np.float32)}, sharded / "model.safetensors")
    found = ck.open_checkpoint(sharded)
    assert (list(found.tensors), found.index) == (["w"], None)
    (tmp_path / "t").mkdir()
    left_out = ck.write_edited(found, tmp_path / "t", {}).left_out
    assert set(left_out) == {ck.INDEX_NAME, *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))}


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / ck.INDEX_NAME
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    [
        "/etc/x.safetensors",
        "../x.safetensors",
        "sub/../../x.safetensors",
        "sub\\x.safetensors",
        "C:/x.safetensors",
        "a\n.safetensors",
        "",
        ".",
        "weights.bin",
        5,
        None,
        ["x.safetensors"],
    ],
)
def test_index_names_must_stay_inside(name: object, sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"layer.1.x": name}))
    with pytest.raises(CheckpointError) as error:
        ck.open_checkpoint(sharded)
    one_line(error, ck.INDEX_NAME, "layer.1.x")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"a": 1, "a": 1}', "\ufeff{}"],
)
def test_an_index_must_be_one(content: str, sharded: Path) -> None:
    (sharded / ck.INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError) as error:
        ck.open_checkpoint(sharded)
    one_line(error, ck.INDEX_NAME)


def test_an_index_must_fit_its_files(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    edit_index(sharded, lambda index: index["weight_map"].update({"layer.1.x": second.name}))
    with pytest.raises(CheckpointError) as error:
        ck.open_checkpoint(sharded)
    one_line(error, "layer.1.x", second.name)
    edit_index(sharded, lambda index: index["weight_map"].update({"layer.1.x": first.name, "gone": first.name}))
    with pytest.raises(CheckpointError) as error:
        ck.open_checkpoint(sharded)
    one_line(error, "gone", first.name)
    edit_index(sharded, lambda index: index["weight_map"].pop("gone"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError) as error:
        ck.open_checkpoint(sharded)
    one_line(error, "two files", first.name, second.name)
    first.unlink()
    with pytest.raises(CheckpointError) as error:
        ck.open_checkpoint(sharded)
    one_line(error, first.name, "does not exist")
    first.write_bytes(content)
    assert len(ck.open_checkpoint(sharded).tensors) == 9


def test_folders_without_a_checkpoint_say_what_they_have(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    expected = "is not a folder"
    for name in ("", "pytorch_model.bin", "a.safetensors", "b.safetensors"):
        if name == "":
            with pytest.raises(CheckpointError, match=expected):
                ck.open_checkpoint(folder)
            folder.mkdir()
            expected = "has no safetensors"
        elif name == "pytorch_model.bin":
            (folder / name).touch()
            expected = "convert them"
        else:
            (folder / name).write_bytes(raw_file({}))
            expected = "2 safetensors files"
            if name == "a.safetensors":
                continue
        with pytest.raises(CheckpointError, match=expected) as error:
            ck.open_checkpoint(folder)
        one_line(error, str(folder))


# ---------------------------------------------------------------------------------------------- write_edited


def target(tmp_path: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=tmp_path))


def test_without_rewriters_every_file_comes_along_unchanged(sharded: Path, tmp_path: Path) -> None:
    (sharded / "sub").mkdir()
    (sharded / "sub" / "chat_template.jinja").write_text("{{ x }}")
    (sharded / ".gitattributes").write_text("x")
    before = tree(sharded)
    seen: list[int] = []
    source = ck.open_checkpoint(sharded)
    out = target(tmp_path)
    result = ck.write_edited(source, out, {}, progress=seen.append)
    assert tree(out) == tree(sharded) == before
    assert set(result.written) == set(before)
    assert result.left_out == ()
    assert sum(seen) == result.nbytes == ck.bytes_to_write(source) == sum(map(len, before.values()))


def test_a_rewriter_changes_its_own_range_only(single: Path, tmp_path: Path) -> None:
    source = ck.open_checkpoint(single)
    out = target(tmp_path)
    seen: list[int] = []
    ck.write_edited(source, out, {"b": negate, "empty": negate, "scalar": negate}, progress=seen.append)
    before, after = (folder.joinpath("model.safetensors").read_bytes() for folder in (single, out))
    expected = bytearray(before)
    for name in ("b", "scalar"):
        info = source.tensors[name]
        expected[info.start : info.end] = bytes(255 - value for value in before[info.start : info.end])
    assert after == expected
    assert sum(seen) == ck.bytes_to_write(source)
    assert ck.read_shard(out / "model.safetensors").metadata == {"format": "pt", "ü": "ß"}


def test_rewriters_work_across_shards_and_read_the_source(sharded: Path, tmp_path: Path) -> None:
    source = ck.open_checkpoint(sharded)

    def double(reader: ck.TensorReader) -> Iterator[memoryview]:
        old = np.frombuffer(reader.read(0, reader.info.nbytes), np.int16)
        yield (2 * old[:10]).reshape(2, 5).data
        yield memoryview(b"")
        assert np.array_equal(old, np.frombuffer(reader.read(0, reader.info.nbytes), np.int16))
        yield (2 * old[10:]).data

    out = target(tmp_path)
    ck.write_edited(source, out, dict.fromkeys(("layer.1.x", "layer.1.z", "layer.3.y"), double))
    for name, info in ck.open_checkpoint(out).tensors.items():
        factor = 2 if name in ("layer.1.x", "layer.1.z", "layer.3.y") else 1
        with ck.open_tensor(info) as new, ck.open_tensor(source.tensors[name]) as old:
            values = [np.frombuffer(r.read(0, info.nbytes), np.int16) for r in (new, old)]
        assert np.array_equal(values[0], factor * values[1])


@pytest.mark.parametrize(("given_bytes", "found"), [(0, "0 given"), (27, "27 given"), (29, "more given")])
def test_rewriters_must_give_every_byte(given_bytes: int, found: str, single: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        ck.write_edited(ck.open_checkpoint(single), target(tmp_path), {"b": lambda _: [bytes(given_bytes)]})
    one_line(error, "model.safetensors", "'b'", "28 bytes", found)


def test_reads_are_checked(single: Path) -> None:
    with ck.open_tensor(ck.open_checkpoint(single).tensors["b"]) as reader:
        assert len(reader.read(28, 0)) == 0
        assert reader.read(3, 4) == reader.read(0, 28)[3:7]
        for offset, length in ((-1, 2), (0, 29), (28, 1), (3, -1)):
            with pytest.raises(CheckpointError) as error:
                reader.read(offset, length)
            one_line(error, "model.safetensors", "'b'")


def test_unknown_tensors_and_full_targets_are_refused(single: Path, tmp_path: Path) -> None:
    source = ck.open_checkpoint(single)
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        ck.write_edited(source, target(tmp_path), {"nope": negate})
    out = target(tmp_path)
    (out / "x").touch()
    with pytest.raises(CheckpointError, match="not an empty folder"):
        ck.write_edited(source, out, {})
    (single / "inside").mkdir()
    with pytest.raises(UsageError, match="overlaps"):
        ck.write_edited(source, single / "inside", {})


def test_nothing_is_written_through_a_link(single: Path, tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", target(tmp_path)
    victim.write_text("precious")

    def plant(reader: ck.TensorReader) -> Iterator[bytearray]:
        (out / "config.json").symlink_to(victim)
        yield reader.read(0, reader.info.nbytes)

    with pytest.raises(CheckpointError) as error:
        ck.write_edited(ck.open_checkpoint(single), out, {"a": plant})
    one_line(error, "config.json", "File exists")
    assert victim.read_text() == "precious"


def test_a_source_that_changed_is_refused(single: Path, tmp_path: Path) -> None:
    source = ck.open_checkpoint(single)
    os.truncate(single / "model.safetensors", source.shards[0].file_bytes - 1)
    with pytest.raises(CheckpointError) as error:
        ck.write_edited(source, target(tmp_path), {})
    one_line(error, "model.safetensors", "now has")
    with ck.open_tensor(max(source.tensors.values(), key=lambda info: info.end)) as reader:
        with pytest.raises(CheckpointError) as error:
            reader.read(0, reader.info.nbytes)
        one_line(error, "became shorter")


def test_other_weights_and_earlier_results_are_left_out(single: Path, tmp_path: Path) -> None:
    left_out = {
        "pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", "consolidated.safetensors",
        "model.Q4_K_M.gguf", "tf_model.h5", "flax_model.msgpack", "optimizer.pt", "x.PTH", "rust_model.ot",
        "old.safetensors.index.json", "model.ckpt.data-00000-of-00001", "abliteration.json",
        "direction.safetensors", "report.html", "original/consolidated.00.pth", "onnx/model.onnx",
        "onnx/model.onnx_data", "x.pkl",
    }  # fmt: skip
    kept = {
        "original/params.json",
        "original/tokenizer.model",
        "LICENSE",
        "README.pt.md",
        "bin",
        "a.binary.txt",
    }
    hidden = {".git/config", ".cache/huggingface/x.json", "sub/.git/config"}
    for name in left_out | kept | hidden:
        (single / name).parent.mkdir(parents=True, exist_ok=True)
        (single / name).write_text(name)
    before = tree(single)
    out = target(tmp_path)
    result = ck.write_edited(ck.open_checkpoint(single), out, {})
    assert set(result.left_out) == left_out
    assert tree(out) == {name: content for name, content in before.items() if name not in left_out | hidden}
    assert tree(single) == before


def test_modes_are_kept_but_the_copy_can_be_removed(single: Path, tmp_path: Path) -> None:
    for name, mode in (("config.json", 0o444), ("tokenizer.json", 0o4755)):
        (single / name).chmod(mode)
    out = target(tmp_path)
    ck.write_edited(ck.open_checkpoint(single), out, {})
    assert stat.S_IMODE((out / "config.json").stat().st_mode) == 0o644
    assert stat.S_IMODE((out / "tokenizer.json").stat().st_mode) == 0o755


def test_a_hub_cache_of_links_is_read_and_never_changed(single: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    expected = tree(single)
    for name in expected:
        (single / name).rename(blobs / f"blob-{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"blob-{name}")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "note.txt").write_text("n")
    (snapshot / "linked").symlink_to(tmp_path / "more")
    (snapshot / "inside").mkdir()
    (snapshot / "inside" / "note.txt").write_text("n")
    (snapshot / "again").symlink_to("inside")
    blobs_before = tree(blobs)
    out = tmp_path / "models--x" / "out"
    with ck.staged(out, source=snapshot) as folder:
        files = ck.write_edited(ck.open_checkpoint(snapshot), folder, {"a": negate})
    assert tree(blobs) == blobs_before
    assert all(path.is_symlink() for path in snapshot.iterdir() if path.name != "inside")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert tree(out).keys() == expected.keys() | {"inside/note.txt", "again/note.txt"}
    assert files.links == files.left_out == ("linked",)
    with pytest.raises(UsageError, match="overlaps"), ck.staged(blobs, overwrite=True, source=snapshot):
        pass


@pytest.mark.parametrize("link", ["nowhere", "."])
def test_links_that_cannot_be_copied_are_named(link: str, single: Path, tmp_path: Path) -> None:
    (single / "strange").symlink_to(link)
    with pytest.raises(CheckpointError) as error:
        ck.write_edited(ck.open_checkpoint(single), target(tmp_path), {})
    one_line(error, str(single / "strange"))


@pytest.mark.parametrize("method", ["copy_file_range", "sendfile", "read and write"])
def test_every_way_to_copy_gives_the_same(
    method: str, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> int:
        raise OSError(errno.EXDEV, "no")

    if method != "copy_file_range":
        monkeypatch.setattr(os, "copy_file_range", unsupported)
    if method == "read and write":
        monkeypatch.setattr(os, "sendfile", unsupported)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:5], at))  # short writes
    monkeypatch.setattr(growing, "CALL_LIMIT", 11)
    monkeypatch.setattr(reading, "CALL_LIMIT", 11)
    monkeypatch.setattr(growing, "_TELL", 10)
    monkeypatch.setattr(growing, "_FLUSH", 30)
    monkeypatch.setattr(growing, "_CHUNK", 9)
    monkeypatch.setattr(growing, "_PIECE", 7)
    out = target(tmp_path)
    ck.write_edited(ck.open_checkpoint(single), out, {"a": lambda reader: [reader.read(0, 60)]})
    assert tree(out) == tree(single)


def test_offsets_over_four_gigabytes(tmp_path: Path) -> None:
    start = 5 * 2**30 + 1
    path, copy = tmp_path / "sparse.safetensors", tmp_path / "copy"
    header = {"big": entry(shape=[start], offsets=[0, start]), "x": entry(offsets=[start, start + 4])}
    path.write_bytes(raw_file(header))
    size = path.stat().st_size + start + 4
    os.truncate(path, size)
    if path.stat().st_blocks > 1000:
        pytest.skip("no sparse files here")
    with path.open("r+b") as file:
        file.seek(size - 4)
        file.write(b"edge")
    info = ck.read_shard(path).tensors["x"]
    with ck.open_tensor(info) as reader:
        assert reader.read(0, 4) == b"edge"
    for way in (growing.by_copy_file_range, growing.by_sendfile, growing.copy_some):
        with path.open("rb") as src, copy.open("wb") as dst:
            assert way(src.fileno(), dst.fileno(), info.start - 2, info.start - 2, 6) == 6
        assert copy.stat().st_size == size
        with copy.open("rb") as file:
            file.seek(size - 6)
            assert file.read() == b"\0\0edge"


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert ck.sha256(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


# --------------------------------------------------------------------------------- hashes, other files and shards


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """All tensors of a checkpoint as the reference reader sees them."""
    found = {}
    for shard in ck.open_checkpoint(folder).shards:
        with safe_open(shard.path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = part.get_dtype(), tuple(part.get_shape()), file.get_tensor(name).tobytes()
    return found


@pytest.mark.parametrize("rewritten", [[], ["layer.1.x"], ["layer.2.x", "layer.2.z", "layer.3.y"]])
@pytest.mark.parametrize("shard_bytes", [None, 300])
def test_hashes_are_those_of_the_files(
    rewritten: list[str], shard_bytes: int | None, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "_TELL", 20)
    monkeypatch.setattr(growing, "_PIECE", 50)
    out, changes = target(tmp_path), ck.Changes(shard_bytes=shard_bytes)
    result = ck.write_edited(ck.open_checkpoint(sharded), out, dict.fromkeys(rewritten, negate), changes=changes)
    assert list(result.sha256) == list(result.written)
    assert result.sha256 == {name: ck.sha256(out / name) for name in tree(out)}
    shards = sorted(sharded.glob("*.safetensors"))
    assert result.source_sha256 == {path.name: ck.sha256(path) for path in shards}


def test_notes_are_taken_file_by_file(sharded: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, tuple[str, ...]]] = []

    def note(file: str, tensors: tuple[str, ...]) -> ck.Note:
        seen.append((file, tensors))
        return ck.Note({"tensors": tensors, "number": 0.1})

    rewriters = dict.fromkeys(("layer.3.y", "layer.1.x", "layer.1.z"), negate)
    result = ck.write_edited(ck.open_checkpoint(sharded), target(tmp_path), rewriters, note=note)
    first, _, third = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert seen == [(first, ("layer.1.x", "layer.1.z")), (third, ("layer.3.y",))]
    assert result.notes == (
        {"tensors": ["layer.1.x", "layer.1.z"], "number": 0.1},
        {"tensors": ["layer.3.y"], "number": 0.1},
    )


def test_hashing_that_falls_behind_is_waited_for(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": np.zeros(300_000, np.uint8), "b": np.zeros(9, np.uint8)}, single / "model.safetensors")
    monkeypatch.setattr(growing, "_TELL", 1000)
    monkeypatch.setattr(growing, "_LAG", 3)
    preadv = os.preadv

    def slow(fd: int, views: Any, at: int) -> int:
        time.sleep(0.0005)
        return preadv(fd, views, at)

    monkeypatch.setattr(os, "preadv", slow)
    out = target(tmp_path)
    result = ck.write_edited(ck.open_checkpoint(single), out, {"b": negate})
    assert result.sha256["model.safetensors"] == ck.sha256(out / "model.safetensors")


def test_a_failure_while_hashing_ends_the_run(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ck.open_checkpoint(single)
    monkeypatch.setattr(os, "preadv", fail_with(errno.EIO))
    with pytest.raises(CheckpointError, match="Input/output"), ck.staged(tmp_path / "out") as folder:
        ck.write_edited(source, folder, {})
    assert not (tmp_path / "out").exists()


def test_a_failed_early_flush_is_not_forgotten(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells an error of writing once: whoever flushed first must pass it on."""
    fsync, calls = os.fsync, []

    def fail_once(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(growing, "_TELL", 40)
    monkeypatch.setattr(growing, "_FLUSH", 40)
    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(CheckpointError, match="Input/output"), ck.staged(tmp_path / "out") as folder:
        ck.write_edited(ck.open_checkpoint(single), folder, {})
    assert len(calls) > 1


def test_other_files_can_be_replaced(single: Path, tmp_path: Path) -> None:
    (single / "config.json").chmod(0o640)
    source, out = ck.open_checkpoint(single), target(tmp_path)
    changes = ck.Changes(replaced={"config.json": b"{1}", "new.json": b"{2}"})
    result = ck.write_edited(source, out, {}, changes=changes)
    assert tree(out) == {**tree(single), "config.json": b"{1}", "new.json": b"{2}"}
    assert stat.S_IMODE((out / "config.json").stat().st_mode) == 0o640
    assert result.nbytes == ck.bytes_to_write(source, changes) == sum(map(len, tree(out).values()))
    assert result.sha256 == {name: ck.sha256(out / name) for name in tree(out)}


@pytest.mark.parametrize("many", [False, True])
def test_extra_tensors_have_the_original_bytes(many: bool, single: Path, sharded: Path, tmp_path: Path) -> None:
    folder = sharded if many else single
    source, out = ck.open_checkpoint(folder), target(tmp_path)
    name = "layer.1.x" if many else "a"
    changes = ck.Changes(extra={"head": source.tensors[name]})
    result = ck.write_edited(source, out, {name: negate}, changes=changes)
    before, after = stored(folder), stored(out)
    assert after.keys() == before.keys() | {"head"}
    assert after["head"] == before[name]
    assert after[name] == (*before[name][:2], bytes(255 - value for value in before[name][2]))
    assert all(after[other] == before[other] for other in before if other != name)
    assert result.nbytes == ck.bytes_to_write(source, changes) == sum(map(len, tree(out).values()))
    last = source.shards[-1].path.name
    assert ck.open_checkpoint(out).shards[-1].metadata == source.shards[-1].metadata
    if many:
        index = json.loads((out / ck.INDEX_NAME).read_text())
        assert index["metadata"] == {"total_size": 800}
        assert index["weight_map"]["head"] == last
        same = {path.name for path in sharded.glob("*.safetensors")} - {last, "model-00001-of-00003.safetensors"}
        assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in same)
    assert result.source_sha256 == {shard.path.name: ck.sha256(shard.path) for shard in source.shards}
    with pytest.raises(CheckpointError, match="already has"):
        ck.write_edited(source, target(tmp_path), {}, changes=ck.Changes(extra={name: source.tensors[name]}))


@pytest.mark.parametrize("shard_bytes", [1, 130, 300, 500, 10**6])
def test_shards_have_at_most_the_size_asked_for(shard_bytes: int, sharded: Path, tmp_path: Path) -> None:
    edit_index(sharded, lambda index: index.update({"more": {"kept": 1}}))
    source, out = ck.open_checkpoint(sharded), target(tmp_path)
    changes = ck.Changes(shard_bytes=shard_bytes)
    result = ck.write_edited(source, out, {"layer.2.y": negate}, changes=changes)
    found, before, after = ck.open_checkpoint(out), stored(sharded), stored(out)
    assert after == before | {"layer.2.y": after["layer.2.y"]} != before
    assert list(found.tensors) == list(source.tensors)
    for shard in found.shards:
        assert shard.file_bytes <= shard_bytes or len(shard.tensors) == 1
    count = len(found.shards)
    if count == 1:
        assert names(out) == ["config.json", "model.safetensors"]
    else:
        index = json.loads((out / ck.INDEX_NAME).read_text())
        assert index["metadata"] == {"total_size": 720}
        assert index["more"] == {"kept": 1}
        assert [s.path.name for s in found.shards] == [
            f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
        ]
    assert result.nbytes == ck.bytes_to_write(source, changes) == sum(map(len, tree(out).values()))


@pytest.mark.parametrize("shard_bytes", [None, 10**6])
def test_a_single_file_gets_an_index_when_asked(shard_bytes: int | None, single: Path, tmp_path: Path) -> None:
    """Of all its tensors, in place of one that names other files; without being asked for there is none."""
    (single / ck.INDEX_NAME).write_text('{"weight_map": {"a": "old.safetensors"}}')
    source, out = ck.open_checkpoint(single), target(tmp_path)
    changes = ck.Changes(shard_bytes=shard_bytes, indexed=True)
    result = ck.write_edited(source, out, {"a": negate}, changes=changes)
    index = json.loads((out / ck.INDEX_NAME).read_text())
    assert index == {"metadata": {"total_size": 90}, "weight_map": dict.fromkeys(source.tensors, "model.safetensors")}
    assert result.nbytes == ck.bytes_to_write(source, changes) == sum(map(len, tree(out).values()))
    assert result.left_out == ()
    found = ck.open_checkpoint(out)
    assert (found.index, found.tensors.keys()) == (out / ck.INDEX_NAME, source.tensors.keys())
    bare = ck.write_edited(source, target(tmp_path), {"a": negate}, changes=ck.Changes(shard_bytes=shard_bytes))
    assert bare.left_out == (ck.INDEX_NAME,)
    assert ck.INDEX_NAME not in bare.written


def test_an_index_of_the_source_is_kept_when_one_is_asked_for(sharded: Path, tmp_path: Path) -> None:
    out = target(tmp_path)
    ck.write_edited(ck.open_checkpoint(sharded), out, {}, changes=ck.Changes(indexed=True))
    assert tree(out) == tree(sharded)


@pytest.mark.parametrize("size", [0, -1])
def test_shards_need_a_size(size: int, single: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--shard-size"):
        ck.write_edited(ck.open_checkpoint(single), target(tmp_path), {}, changes=ck.Changes(shard_bytes=size))


DTYPES = [np.float64, np.float32, np.float16, np.uint8, np.bool_]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=12),
    st.integers(1, 700),
    st.booleans(),
)
def test_dealing_out_anew_keeps_every_tensor_and_aligns_it(
    tensors: list[tuple[Any, list[int]]], shard_bytes: int, extra: bool
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place, "in"), Path(place, "out")
        folder.mkdir()
        out.mkdir()
        values = {f't.{i} "ü': np.ones(shape, kind) for i, (kind, shape) in enumerate(tensors)}
        save_file(values, folder / "model.safetensors", metadata={"format": "pt", "é": "\n"})
        source = ck.open_checkpoint(folder)
        added = {"head": source.tensors['t.0 "ü']} if extra else {}
        changes = ck.Changes(shard_bytes=shard_bytes, extra=added)
        ck.write_edited(source, out, {}, changes=changes)
        found = ck.open_checkpoint(out)
        before, after = stored(folder), stored(out)
        assert after == before | ({"head": before['t.0 "ü']} if extra else {})
        for info in found.tensors.values():
            assert info.start % max(1, ck.BITS[info.dtype] // 8) == 0
        for shard in found.shards:
            assert shard.metadata == {"format": "pt", "é": "\n"}
            assert shard.file_bytes <= shard_bytes or len(shard.tensors) == 1


def test_space_counts_what_is_there_already(sharded: Path, tmp_path: Path) -> None:
    source = ck.open_checkpoint(sharded)
    with ck.resumable(tmp_path / "out", identity=b"", source=sharded) as stage:
        assert stage.journal.kept_bytes == 0
        ck.write_edited(source, stage.folder, {}, journal=stage.journal)
        assert stage.journal.kept_bytes == ck.bytes_to_write(source)


def test_a_source_that_cannot_be_written_is_enough(single: Path, tmp_path: Path) -> None:
    expected = tree(single)
    for path in single.iterdir():
        path.chmod(0o444)
    single.chmod(0o555)
    try:
        with ck.resumable(tmp_path / "out", identity=b"", source=single) as stage:
            ck.write_edited(ck.open_checkpoint(single), stage.folder, {"a": negate}, journal=stage.journal)
        assert tree(tmp_path / "out").keys() == expected.keys()
        assert tree(single) == expected
        assert os.access(tmp_path / "out" / "model.safetensors", os.W_OK)
    finally:
        single.chmod(0o755)


# ---------------------------------------------------------------------------------------------------- staged


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_success_moves_everything_in_one_step(single: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "out"
    with ck.staged(out, source=single) as folder:
        assert not out.exists()
        assert re.fullmatch(rf"\.out\.partial-{os.getpid()}-[0-9a-f]{{8}}", folder.parent.name)
        ck.write_edited(ck.open_checkpoint(single), folder, {})
        (folder / "README.md").write_text("hello")
    assert names(out.parent) == ["out"]
    assert names(out) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, CheckpointError])
def test_failure_leaves_nothing(raised: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(raised, match="stop"), ck.staged(tmp_path / "new" / "out") as folder:  # noqa: PT012
        (folder / "x").write_text("x")
        raise raised("stop")
    assert names(tmp_path) == []


def test_what_may_be_overwritten(single: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(*, overwrite: bool) -> None:
        with ck.staged(out, overwrite=overwrite, source=single) as folder:
            ck.write_edited(ck.open_checkpoint(single), folder, {})

    out.mkdir()
    write(overwrite=False)  # an empty folder is free
    (out / "extra").write_text("of the old one")
    with pytest.raises(UsageError, match="exists; give another -o or --overwrite"):
        write(overwrite=False)
    assert (out / "extra").exists()
    write(overwrite=True)
    assert names(out) == ["config.json", "model.safetensors", "tokenizer.json"]
    with pytest.raises(ValueError, match="stop"), ck.staged(out, overwrite=True):
        raise ValueError("stop")
    assert tree(out) == tree(single)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (out / name).unlink()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds no model"):
        write(overwrite=True)
    (out / "abliteration.json").write_text("{}")
    write(overwrite=True)
    assert names(tmp_path) == ["out", "single"]


def test_out_must_be_a_place_of_its_own(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(single)
    (tmp_path / "broken").symlink_to("nowhere")
    before = names(tmp_path)
    monkeypatch.chdir(single)
    for out, part in (
        (single, "overlaps"),
        (single / "in" / "side", "overlaps"),
        (tmp_path, "overlaps"),
        (Path("sub"), "overlaps"),
        (Path(), "overlaps"),
        (tmp_path / "link" / "x", "overlaps"),
        (tmp_path / "link", "overlaps"),
        (tmp_path / "file", "not a folder"),
        (tmp_path / "broken", "not a folder"),
        (Path("/proc"), "mount point"),
        (Path("/"), "replaced"),
    ):
        with pytest.raises(UsageError) as error, ck.staged(out, overwrite=True, source=single):
            pytest.fail("must not start")
        one_line(error, part)
    assert names(tmp_path) == before


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for out in (
        tmp_path / "file" / "out",
        tmp_path / "file" / "x" / "out",
        Path("/proc/out"),
        Path("/proc/a/b"),
    ):
        with pytest.raises(CheckpointError) as error, ck.staged(out):
            pytest.fail("must not start")
        one_line(error, "cannot write", "-o")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError) as error, ck.staged(tmp_path / "out"):
        pytest.fail("must not start")
    one_line(error, "Permission denied", str(tmp_path))


@pytest.mark.parametrize("both", [False, True])
def test_a_failed_move_loses_nothing(both: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = os.rename

    def fail(a: Path, b: Path) -> None:
        if b == out and (both or a.name == "model"):
            raise OSError(errno.EIO, "Input/output error")
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(CheckpointError) as error, ck.staged(out, overwrite=True):
            pass
    one_line(error, "cannot move", str(out))
    assert out.exists() != both
    if both:  # not even the way back: the old folder stays beside it until the next run
        with pytest.raises(UsageError, match="exists"), ck.staged(out):
            pass
    assert tree(tmp_path) == {"out/config.json": b"old"}


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot move"), ck.staged(tmp_path / "out"):
        (tmp_path / "out" / "precious").mkdir(parents=True)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["precious"]


KILLED = """
import os, signal, sys
from pathlib import Path
from abliterate.files import checkpoint as ck
source, out = Path(sys.argv[1]), Path(sys.argv[2])
def stop(reader):
    yield reader.read(0, 8)
    print("writing", flush=True)
    signal.pause()
with ck.staged(out, source=source, overwrite=True) as folder:
    ck.write_edited(ck.open_checkpoint(source), folder, {"a": stop})
"""


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "writing\n"
    return process


def finish(process: subprocess.Popen[str], number: int) -> str:
    process.send_signal(number)
    return process.communicate(timeout=20)[1]


def test_a_killed_run_leaves_no_result_and_the_next_one_cleans_up(single: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    process = start(single, work / "out")
    assert len(names(work)) == 1
    with pytest.raises(UsageError, match="another abliterate is writing it now"), ck.staged(work / "out"):
        pytest.fail("must not start")
    assert len(names(work)) == 1
    finish(process, signal.SIGKILL)
    assert [name.startswith(".out.partial-") for name in names(work)] == [True]
    others = [".out.partial-x", f".other.partial-{process.pid}-00000000", ".out.partial-1-00000000.txt"]
    for name in others:
        (work / name).mkdir()
    with ck.staged(work / "out", source=single) as folder:
        ck.write_edited(ck.open_checkpoint(single), folder, {})
    assert names(work) == sorted([*others, "out"])
    assert tree(work / "out") == tree(single)


def test_ctrl_c_leaves_nothing(single: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert "KeyboardInterrupt" in finish(start(single, work / "out"), signal.SIGINT)
    assert not work.exists()


def test_a_run_killed_between_the_two_renames_is_undone(single: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    process = start(single, out)
    finish(process, signal.SIGKILL)
    (partial,) = (path for path in tmp_path.iterdir() if ".partial-" in path.name)
    out.rename(partial / "replaced")
    with pytest.raises(UsageError, match="exists"), ck.staged(out):
        pass
    assert tree(out) == {"config.json": b"old"}
    assert names(tmp_path) == ["out", "single"]


def test_a_folder_is_claimed_when_its_process_is_gone_and_the_lock_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    def free(pid: int) -> bool:
        lock = staging._claim(tmp_path, pid)
        staging._unlock(-1 if lock is None else lock)
        return lock is not None

    assert free(gone.pid)
    assert free(os.getpid())
    assert not free(os.getppid())
    os.utime(tmp_path, (0, 0))
    assert free(os.getppid())  # that process would long have locked it: its number was used again
    lock = staging._lock(tmp_path)
    assert not free(gone.pid)
    assert not free(os.getpid())
    os.close(lock)

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert free(gone.pid)
    assert not free(os.getppid())
    assert not free(os.getpid())
    with ck.staged(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------ full disks


def fail_with(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("code", "part"),
    [
        (errno.ENOSPC, "disk full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "Read-only"),
        (errno.EACCES, "denied"),
        (errno.EFBIG, "large"),
        (errno.EIO, "Input/output"),
    ],
)
@pytest.mark.parametrize("place", ["copy_file_range", "fsync"])
def test_failed_writes_are_one_line_and_leave_nothing(
    code: int, part: str, place: str, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, source = tmp_path / "work", ck.open_checkpoint(single)
    monkeypatch.setattr(os, place, fail_with(code))
    with pytest.raises(CheckpointError) as error, ck.staged(work / "out") as folder:
        ck.write_edited(source, folder, {})
    one_line(error, part, str(work), "choose another -o")
    assert isinstance(error.value.__cause__, OSError)
    assert not work.exists()
    assert all("flush" not in thread.name for thread in threading.enumerate())


def test_writes_of_the_body_are_one_line_too_but_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="disk full"), ck.staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(CheckpointError, match="cannot write"), ck.staged(tmp_path / "out") as folder:
        (folder / "no" / "such").write_text("x")
    with pytest.raises(FileNotFoundError), ck.staged(tmp_path / "out"):
        (tmp_path / "elsewhere").read_text()
    assert names(tmp_path) == []


def test_a_disk_that_is_really_full(single: Path, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        save_file({"a": np.zeros(50_000, np.float32)}, single / "model.safetensors")
        with pytest.raises(CheckpointError) as error, ck.staged(mount / "out", source=single) as folder:
            ck.write_edited(ck.open_checkpoint(single), folder, {"a": negate})
        one_line(error, "disk full", "needed", "free at", str(mount))
        assert names(mount) == []
        with pytest.raises(UsageError, match="mount point"), ck.staged(mount):
            pass
        with ck.staged(mount / "out") as folder:  # small enough, and across file systems
            (single / "model.safetensors").write_bytes(raw_file({"a": U8}, b"1234"))
            ck.write_edited(ck.open_checkpoint(single), folder, {})
        assert tree(mount / "out") == tree(single)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)  # at once, even if busy


def test_a_limit_on_file_sizes(single: Path, tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from abliterate.files import checkpoint as ck
from abliterate.files.checkpoint import growing, reading, staging
from abliterate.errors import CheckpointError
source = ck.open_checkpoint(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    with ck.staged(Path(sys.argv[2])) as folder:
        ck.write_edited(source, folder, {})
except CheckpointError as error:
    print(error)
"""
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    command = [sys.executable, "-c", code, str(single), str(tmp_path / "work" / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "files this large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_ensure_space(tmp_path: Path) -> None:
    ck.ensure_space(tmp_path / "not" / "there", 1)
    with pytest.raises(CheckpointError) as error:
        ck.ensure_space(tmp_path / "not" / "there", 2**62)
    one_line(error, "4611686018.43 GB needed", "free at", str(tmp_path))


def test_no_descriptor_is_left_open(single: Path, sharded: Path, tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    before = len(os.listdir("/proc/self/fd"))
    for folder in (single, sharded):
        source = ck.open_checkpoint(folder)
        ck.write_edited(source, target(tmp_path), {})
        bad = {next(iter(source.tensors)): lambda _: [b"1" * 1000]}
        with pytest.raises(CheckpointError), ck.staged(tmp_path / "out") as out:
            ck.write_edited(source, out, bad)
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, abliterate.files.checkpoint; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
