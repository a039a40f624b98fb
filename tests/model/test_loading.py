"""Where a model comes from, what is refused at the door, and what it is measured in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from abliterate.config import cache_folder
from abliterate.errors import CheckpointError, ModelError, UsageError
from abliterate.model.loading import load, locate
from abliterate.model.on_disk import ModelOnDisk
from families import BY_NAME, byte_tokenizer, save

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(BY_NAME["llama"].model(), tmp_path_factory.mktemp("models") / "llama")


def configure(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A model folder that may be changed."""
    target = tmp_path / "copy"
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# --- locate


def test_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(folder)) == ModelOnDisk(str(folder), "folder", folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("~/llama").folder == folder
    monkeypatch.chdir(folder.parent)
    assert locate("llama").folder == Path("llama")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> SimpleNamespace:
    """A hub that gives the same model for every id and remembers what it was asked for."""
    seen = SimpleNamespace(asked=[], error=None)

    def snapshot_download(
        identifier: str,
        *,
        allow_patterns: list[str],
        ignore_patterns: list[str],
        revision: str | None = None,
        tqdm_class: type,
    ) -> str:
        seen.left_out, seen.revision = ignore_patterns, revision
        seen.asked.append((identifier, allow_patterns))
        if seen.error:
            raise seen.error
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return seen


def test_a_revision_is_asked_of_the_hub_and_of_nobody_else(hub: SimpleNamespace, folder: Path) -> None:
    assert locate("owner/name", revision="v1.0").folder == folder
    assert hub.revision == "v1.0"
    locate("owner/name")
    assert hub.revision is None
    with pytest.raises(UsageError, match=r"--revision v1.0: expected a hub id with it, found the folder"):
        locate(str(folder), revision="v1.0")


def test_hub_id_is_fetched_without_pickles_and_without_code(hub: SimpleNamespace, folder: Path) -> None:
    assert locate("owner/name") == ModelOnDisk("owner/name", "hub", folder)
    ((identifier, patterns),) = hub.asked
    assert identifier == "owner/name"
    assert "*.safetensors" in patterns
    assert not {"*.py", "*.bin", "*.pt", "*"} & set(patterns)
    locate("owner/name", trust_remote_code=True)
    assert "*.py" in hub.asked[1][1]


def test_folder_here_comes_before_the_hub(hub: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    assert locate(f"{folder.parent.name}/llama").kind == "folder"
    assert hub.asked == []


def test_hub_error_is_one_line(hub: SimpleNamespace) -> None:
    hub.error = OSError("401 Client Error\n\nRepository Not Found for url: …\n" + "x" * 5000)
    with pytest.raises(ModelError, match="model 'owner/name': not a folder here and cannot be fetched") as caught:
        locate("owner/name")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("spec", ["nothing", "./owner/name", "/owner/name", "~/owner", "a/b/c", ""])
def test_what_is_no_model_is_refused_without_asking_the_hub(
    hub: SimpleNamespace, spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        locate(spec)
    assert hub.asked == []


def test_other_files_and_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"a hub id, a folder or a \.gguf file, found another file"):
        locate(str(tmp_path / "model.bin"))
    with pytest.raises(ModelError, match=r"expected a folder with config\.json, found none"):
        locate(str(tmp_path))


def test_folder_with_pickles_only_is_refused_with_advice(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"\(pytorch_model\.bin\); convert them to safetensors first"):
        locate(str(copy))


def test_damaged_shard_is_found_before_anything_is_loaded(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        locate(str(copy))


# --- GGUF


def test_gguf_is_dequantised_once_per_file_and_dtype(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    made: list[torch.dtype] = []

    def dequantise(path: Path, target: Path, dtype: torch.dtype) -> None:
        made.append(dtype)
        for source in folder.iterdir():
            (target / source.name).write_bytes(source.read_bytes())

    monkeypatch.setattr("abliterate.model.loading._dequantise", dequantise)
    file = tmp_path / "model.Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    first, again = locate(str(file)), locate(str(file))
    assert first == again
    assert first.kind == "gguf"
    assert first.folder.is_relative_to(tmp_path / "cache")
    assert made == [torch.bfloat16]
    assert locate(str(file), dtype="float32").folder != first.folder
    os.utime(file, ns=(1, 1))
    assert locate(str(file)).folder != first.folder, "another file of the same name"
    assert made == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_a_gguf_file_in_a_folder_beside_is_a_file_and_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`out/model.gguf` could be an owner and a name."""
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.gguf").write_bytes(b"GGUF and nothing")
    with pytest.raises(ModelError, match=r"out/model\.gguf': it cannot be dequantised"):
        locate("out/model.gguf")
    fetch = mock.Mock(side_effect=RuntimeError("asked"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(ModelError, match=r"cannot be fetched from the hub \(.*asked\)"):
        locate("owner/model.gguf")


def test_damaged_gguf_is_one_line_and_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF and nothing")
    with pytest.raises(ModelError, match="cannot be dequantised") as caught:
        locate(str(tmp_path / "x.gguf"))
    assert str(caught.value).isprintable()
    assert not [path for path in (tmp_path / "cache" / "gguf").rglob("*") if path.is_file()]
    with pytest.raises(ModelError, match="expected a GGUF file, found no such file"):
        locate(str(tmp_path / "none.gguf"))


# --- load


@pytest.mark.parametrize(
    ("stored", "asked", "measured"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float16", "auto", torch.bfloat16),
        ("float16", "float16", torch.float16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
    ],
)
def test_model_is_measured_in_its_stored_dtype_except_float16_on_a_cpu(
    tmp_path: Path, stored: str, asked: str, measured: torch.dtype
) -> None:
    save(BY_NAME["llama"].model(), tmp_path / "m", dtype=getattr(torch, stored))
    loaded = load(locate(str(tmp_path / "m")), dtype=asked, device="cpu")
    assert loaded.dtype == measured
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {measured}


def test_loaded_model_is_ready_for_inference(folder: Path) -> None:
    loaded = load(locate(str(folder)), device="cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.device == torch.device("cpu")
    assert loaded.tokenizer("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]


def test_loading_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(locate(str(folder)), device="cpu")
    assert capfd.readouterr() == ("", "")


def test_unknown_dtype_and_device_are_usage_errors(folder: Path) -> None:
    files = locate(str(folder))
    with pytest.raises(UsageError, match="--dtype int4: expected auto, float32, bfloat16, float16"):
        load(files, dtype="int4", device="cpu")
    for device in ("abacus", "meta", "cpu:x"):
        with pytest.raises(UsageError, match=f"--device {device}: not usable") as caught:
            load(files, device=device)
        assert str(caught.value).isprintable()


def test_tensors_that_are_not_in_the_files_are_never_drawn_at_random(copy: Path) -> None:
    """transformers only warns of them, and a model half random would be measured."""
    configure(copy, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"9 tensors .* model\.layers\.3\.input_layernorm\.weight"):
        load(locate(str(copy)), device="cpu")


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied", "gemma2-tied", "cohere", "opt", "falcon-old"])
def test_tied_and_derived_tensors_are_not_missed(tmp_path: Path, name: str) -> None:
    save(BY_NAME[name].model(), tmp_path / "m")
    load(locate(str(tmp_path / "m")), device="cpu")


def test_code_of_a_model_is_not_run_unasked(copy: Path, tmp_path: Path) -> None:
    (copy / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    configure(copy, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})
    with pytest.raises(ModelError, match="custom code"):
        load(locate(str(copy)), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_model_without_a_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(locate(str(copy)), device="cpu")
    assert str(caught.value).isprintable()
