"""Pipes, devices, folders and absurd contents wherever a file is named: one line and an exit code, at once."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from commandline import abliterate
from records import full_record


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**13)  # a hole, which takes no room


def _bytes(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


ODD: dict[str, Callable[[Path], None]] = {
    "pipe": _pipe,
    "socket": _socket,
    "zeros": _zeros,
    "loop": lambda path: path.symlink_to(path.name),
    "folder": lambda path: path.mkdir(),
    "huge": _huge,
    "empty": _bytes(b""),
    "not UTF-8": _bytes(b"\xff\xfe{}"),
    "NUL": _bytes(b'{"prompt": "a\0", "response": ""}'),
    "deep": _bytes(b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nested": _bytes(b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}"),
    "digits": _bytes(b'{"prompt": ' + b"9" * 10_000 + b"}"),
    "beyond": _bytes(b'{"prompt": 1e999}'),
    "constant": _bytes(b'{"prompt": NaN, "response": Infinity}'),
    "half a letter": _bytes(b'{"prompt": "\\ud800", "response": "\\udc00"}'),
    "twice": _bytes(b'{"prompt": "a", "prompt": 1, "response": "c"}'),
    "list": _bytes(b"[1]"),
}

#: Commands by the name of the odd file; PLACE is the folder that it is in.
COMMANDS: dict[str, tuple[str, ...]] = {
    "show": ("abliteration.json", "show", "PLACE"),
    "report": ("abliteration.json", "report", "PLACE"),
    "undo": ("abliteration.json", "undo", "PLACE"),
    "check": ("abliteration.json", "check", "PLACE"),
    "apply": ("d.safetensors", "apply", "PLACE/model", "--direction", "PLACE/d.safetensors", "-o", "PLACE/out", "-q"),
    "verify": ("d.safetensors", "verify", "PLACE/model", "--direction", "PLACE/d.safetensors", "-q"),
    "judge": ("replies.jsonl", "judge", "PLACE/replies.jsonl"),
    "judge csv": ("replies.csv", "judge", "PLACE/replies.csv"),
    "judge --calibrate": ("replies.jsonl", "judge", "--calibrate", "PLACE/replies.jsonl"),
    "eval": ("config.json", "eval", "PLACE", "-q"),
    "eval index": ("model.safetensors.index.json", "eval", "PLACE", "-q"),
    "run tasks": ("t.jsonl", "run", "PLACE/model", "-o", "PLACE/out", "--capability", "PLACE/t.jsonl", "-q"),
    "repair": ("adapter_config.json", "repair", "PLACE/model", "-o", "PLACE/out", "--adapter", "PLACE", "-q"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which nothing is to be loaded."""
    folder: Path = tmp_path_factory.mktemp("model")
    save_file({"model.embed_tokens.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return folder


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Iterator[Path]:
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copytree(model, folder / "model")
    (folder / "adapter_model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    yield folder
    assert not (folder / "out").exists()


@pytest.mark.parametrize("what", ODD)
def test_every_command_says_so_in_one_line(what: str, place: Path) -> None:
    for name, *arguments in COMMANDS.values():
        ODD[what](place / name)
        done = abliterate(*(argument.replace("PLACE", str(place)) for argument in arguments))
        done.failed()
        assert len(done.err) < 2500
        (place / name).rmdir() if (place / name).is_dir() else (place / name).unlink()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", [123]),
        ("architectures", "LlamaForCausalLM"),
        ("model_type", 5),
        ("model_type", []),
        ("num_hidden_layers", 10**30),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 1.5),
        ("num_hidden_layers", "2"),
        ("hidden_size", {}),
        ("vocab_size", True),
        ("text_config", [1]),
        ("text_config", {"hidden_size": "8"}),
        ("quantization_config", "fp8"),
        ("tie_word_embeddings", "no"),
        ("dtype", 16),
    ],
)
def test_a_configuration_of_other_types_is_named_by_its_field(
    field: str, value: object, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    config = json.loads((model / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    abliterate("eval", tmp_path, "-q").failed("config.json", field if value != {"hidden_size": "8"} else "hidden_size")


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("model", "layers", -1),
        ("model", "layers", 10**30),
        ("model", "d_model", 1.5),
        ("anatomy", "writers", None),
        ("plan", "edits", {}),
        ("selection", "candidates", 5),
        ("prompts", "counts", [1]),
    ],
)
def test_a_record_of_other_types_is_named_by_its_field(part: str, field: str, value: object, tmp_path: Path) -> None:
    record = json.loads(full_record().model_dump_json())
    record[part][field] = value
    (tmp_path / "abliteration.json").write_text(json.dumps(record))
    for command in ("show", "report"):
        abliterate(command, tmp_path).failed("abliteration.json", field)


@pytest.mark.parametrize(
    "options",
    [
        *(("--seed", "9" * 30), ("--seed", "-1"), ("--seed", "9" * 5000), ("--limit", "-3"), ("--limit", "9" * 5000)),
        *(("--batch-size", "9" * 5000), ("--pick", "9" * 5000), ("--max-kl", "nan"), ("--max-kl", "inf")),
        *(("--strength", "1e400"), ("--strength", "nan"), ("--shard-size", "9" * 5000 + "GB"), ("--trials", "9" * 11)),
        *(("--max-new-tokens", "0"), ("--min-induce", "-inf"), ("--positions", "99999999"), ("--rank", "-5")),
    ],
)
def test_numbers_beyond_all_sense_are_one_line(options: tuple[str, str], model: Path, tmp_path: Path) -> None:
    done = abliterate("run", model, "-o", tmp_path / "out", *options)
    done.failed(options[0])
    assert len(done.err) < 500


@pytest.mark.parametrize("site", ["9" * 5000 + ":-1", "1:-" + "9" * 5000, "1:1", "1", ":", "1:--1", "-1:-1"])
def test_a_site_that_is_none_is_one_line(site: str, model: Path, tmp_path: Path) -> None:
    save_file({"basis": torch.eye(4)[:1]}, tmp_path / "d.safetensors")
    arguments = ("apply", model, "--direction", tmp_path / "d.safetensors", "-o", tmp_path / "out", f"--site={site}")
    abliterate(*arguments).failed("--site")
