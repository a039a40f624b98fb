"""What llama.cpp is given, read back; `test_llama_cpp` has it run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from abliterate.edit.gguf import (
    architecture_of,
    read_control_vector,
    stored_architecture,
    write_control_vector,
    write_gguf_lora,
)
from abliterate.edit.lora import LowRank
from abliterate.errors import AbliterateError, CheckpointError, ModelError, NumericalError, UsageError
from abliterate.model.anatomy import Kind

LAYERS = 3


def factor(
    parameter: str, d: int = 6, n: int = 8, k: int = 1, *, kind: Kind = Kind.MLP, experts: int = 0, bias: bool = False
) -> LowRank:
    generator = torch.Generator().manual_seed(len(parameter) + k)
    stack = (experts,) if experts else ()
    a, b = torch.randn(*stack, k, n, generator=generator), torch.randn(*stack, d, k, generator=generator)
    axis = 1 if kind is Kind.EMBEDDING or experts else 0
    shift = torch.randn(d, generator=generator) if bias else None
    return LowRank(parameter, parameter.removesuffix(".weight"), kind, None, axis, a, b, shift)


def lora(path: Path, factors: Sequence[LowRank], architecture: str = "llama", *, tied: bool = False) -> Path:
    write_gguf_lora(path, factors, architecture=architecture, layers=LAYERS, tied=tied)
    return path


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return values, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


def change(path: Path, name: str) -> Tensor:
    """ΔW [d, n] of a tensor as llama.cpp computes it (`llama_adapter_lora_weight::get_scale`, `build_lora_mm`)."""
    values, tensors = contents(path)
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    if name == "token_embd.weight":
        a = a.mT
    found: Tensor = values["adapter.lora.alpha"] / b.shape[-1] * (b @ a)
    return found


def assert_nothing_in(folder: Path) -> None:
    assert list(folder.iterdir()) == []


def test_lora_reads_back(tmp_path: Path) -> None:
    parts = [
        factor("model.embed_tokens.weight", n=11, k=2, kind=Kind.EMBEDDING),
        factor("model.layers.0.self_attn.o_proj.weight", k=2, kind=Kind.ATTENTION),
        factor("model.layers.2.mlp.down_proj.weight", k=2),
    ]
    path = lora(tmp_path / "new" / "lora.gguf", parts)
    values, tensors = contents(path)
    assert values == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 2.0,
    }
    names = ["token_embd.weight", "blk.0.attn_output.weight", "blk.2.ffn_down.weight"]
    assert list(tensors) == [f"{name}.lora_{which}" for name in names for which in "ab"]
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert tensors["token_embd.weight.lora_a"].shape == (11, 2)
    for name, part in zip(names, parts, strict=True):
        assert torch.equal(change(path, name), part.b @ part.a)
    assert [file.name for file in path.parent.iterdir()] == ["lora.gguf"]
    assert stored_architecture(path) == "llama"


def test_factors_of_different_ranks_keep_their_scale(tmp_path: Path) -> None:
    thin, thick = (
        factor("model.layers.0.mlp.down_proj.weight", k=1),
        factor("model.layers.1.mlp.down_proj.weight", k=3),
    )
    path = lora(tmp_path / "lora.gguf", [thin, thick])
    torch.testing.assert_close(change(path, "blk.0.ffn_down.weight"), thin.b @ thin.a)
    torch.testing.assert_close(change(path, "blk.1.ffn_down.weight"), thick.b @ thick.a)


def test_fused_experts_and_other_names(tmp_path: Path) -> None:
    experts = factor("model.layers.1.mlp.experts.down_proj", experts=4, kind=Kind.EXPERTS)
    path = lora(tmp_path / "lora.gguf", [experts])
    assert torch.equal(change(path, "blk.1.ffn_down_exps.weight"), experts.b @ experts.a)
    gpt2 = factor("transformer.h.1.attn.c_proj.weight", kind=Kind.ATTENTION)
    assert "blk.1.attn_output.weight.lora_a" in contents(lora(tmp_path / "2.gguf", [gpt2], "gpt2"))[1]
    part = factor("model.language_model.layers.1.mlp.down_proj.weight")
    assert "blk.1.ffn_down.weight.lora_a" in contents(lora(tmp_path / "3.gguf", [part], "gemma3"))[1]


def test_equal_changes_leave_equal_bytes(tmp_path: Path) -> None:
    part = factor("model.layers.0.mlp.down_proj.weight")
    assert lora(tmp_path / "1", [part]).read_bytes() == lora(tmp_path / "2", [part]).read_bytes()


@pytest.mark.parametrize(
    ("part", "architecture", "tied", "said"),
    [
        (factor("model.layers.0.mlp.mystery.weight"), "llama", False, "no tensor for it"),
        (factor("model.layers.3.mlp.down_proj.weight"), "llama", False, "no tensor for it"),
        (factor("model.layers.0.mlp.experts.down_proj_bias"), "gpt-oss", False, "no tensor for it"),
        (factor("model.layers.0.mlp.down_proj.weight", bias=True), "llama", False, "its bias changes too"),
        (factor("model.embed_tokens.weight", kind=Kind.EMBEDDING), "llama", True, "it is the head as well"),
        (factor("transformer.wpe.weight", kind=Kind.EMBEDDING), "gpt2", False, "applies no adapter"),
        (factor("model.layers.0.mlp.experts.down_proj"), "llama", False, "holds experts"),
        (factor("model.layers.0.mlp.down_proj.weight", experts=2), "llama", False, "holds experts"),
        (factor("model.layers.0.linear_attn.out_proj.weight"), "qwen35", False, "reorders its columns"),
        (factor("model.layers.0.mlp.down_proj.weight"), "falcon-h1", False, "multiplies the model's constants"),
        (factor("model.layers.0.self_attn.o_proj.weight"), "kimi-linear", False, "applies no adapter"),
    ],
)
def test_what_a_lora_cannot_hold_is_refused_by_name(
    tmp_path: Path, part: LowRank, architecture: str, tied: bool, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as error:
        lora(tmp_path / "lora.gguf", [part], architecture, tied=tied)
    assert part.parameter in str(error.value)
    assert_nothing_in(tmp_path)


def test_a_bias_that_stays_as_it_is_does_not_matter(tmp_path: Path) -> None:
    part = factor("model.layers.0.mlp.down_proj.weight", bias=True)
    assert part.bias is not None
    lora(tmp_path / "lora.gguf", [replace(part, bias=torch.zeros(6))])


def test_nothing_twice_unknown_or_empty(tmp_path: Path) -> None:
    part = factor("model.layers.0.mlp.down_proj.weight")
    with pytest.raises(UsageError, match="expected one change"):
        lora(tmp_path / "lora.gguf", [part, part])
    with pytest.raises(UsageError, match="'mystery' is not known"):
        lora(tmp_path / "lora.gguf", [part], "mystery")
    with pytest.raises(UsageError, match="at least one"):
        lora(tmp_path / "lora.gguf", [])
    assert_nothing_in(tmp_path)


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, path = factor("model.layers.0.mlp.down_proj.weight"), tmp_path / "lora.gguf"
    lora(path, [good])
    before = path.read_bytes()
    bad = factor("model.layers.0.mlp.down_proj.weight")
    bad.a[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="finite"):
        lora(path, [bad])

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", disk_full)
    with pytest.raises(CheckpointError, match="No space left"):
        lora(path, [factor("model.layers.1.mlp.down_proj.weight")])
    assert [file.name for file in tmp_path.iterdir()] == ["lora.gguf"]
    assert path.read_bytes() == before


def test_control_vector_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "vector.gguf"
    vectors = {3: torch.arange(4.0), 2: torch.ones(4, dtype=torch.float64)}
    write_control_vector(path, vectors, architecture="qwen2", layers=3)
    values, tensors = contents(path)
    assert values == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "qwen2",
        "controlvector.layer_count": 2,
    }
    assert list(tensors) == ["direction.1", "direction.2"]
    assert torch.equal(tensors["direction.2"], torch.arange(4.0))
    assert tensors["direction.1"].dtype == torch.float32
    read = read_control_vector(path)
    assert list(read) == [2, 3]
    assert torch.equal(read[3], torch.arange(4.0))


def control_vector(path: Path, *, architecture: str = "controlvector", **tensors: Any) -> Path:
    """As other programs write it."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, numbers in tensors.items():
        writer.add_tensor(name.replace("_", "."), np.asarray(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_control_vectors_of_other_programs_are_read(tmp_path: Path) -> None:
    half, zeros = np.array([1, 2, 3], np.float16), np.zeros(3, np.float16)
    path = control_vector(tmp_path / "v.gguf", direction_11=zeros, direction_2=half)  # what leaves block 2 enters 3
    read = read_control_vector(path)
    assert {layer: vector.tolist() for layer, vector in read.items()} == {3: [1, 2, 3], 12: [0, 0, 0]}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"architecture": "llama", "direction_1": np.ones(3, np.float32)}, "direction.N"),
        ({"output_weight": np.ones(3, np.float32)}, "direction.N"),
        ({}, "direction.N"),
        ({"direction_1": np.ones((3, 2), np.float32)}, "of one width"),
        ({"direction_1": np.ones(3, np.float32), "direction_2": np.ones(2, np.float32)}, "of one width"),
        ({"direction_1": np.ones(3, np.int32)}, "of floats"),
        ({"direction_1": np.array([1, np.nan], np.float32)}, "finite"),
    ],
)
def test_what_is_no_control_vector_is_named(tmp_path: Path, made: dict[str, Any], said: str) -> None:
    with pytest.raises(AbliterateError, match=said):
        read_control_vector(control_vector(tmp_path / "v.gguf", **made))


def test_damaged_control_vectors_are_named(tmp_path: Path) -> None:
    path = control_vector(tmp_path / "v.gguf", direction_1=np.ones(3, np.float32))
    path.write_bytes(path.read_bytes()[:-40])
    for wrong in (path, tmp_path / "none.gguf", tmp_path):
        with pytest.raises(AbliterateError, match="control vector"):
            read_control_vector(wrong)


@pytest.mark.parametrize(
    ("vectors", "architecture", "said"),
    [
        ({1: torch.ones(4)}, "qwen2", "layers 2 to 3"),
        ({4: torch.ones(4)}, "qwen2", "layers 2 to 3"),
        ({2: torch.ones(1, 4)}, "qwen2", "one vector for layer 2"),
        ({}, "qwen2", "at least one"),
        ({2: torch.ones(4)}, "gemma3n", "applies none"),
        ({2: torch.full((4,), torch.inf)}, "qwen2", "layer 2"),
    ],
)
def test_what_a_control_vector_cannot_hold_is_refused(
    tmp_path: Path, vectors: Mapping[int, Tensor], architecture: str, said: str
) -> None:
    with pytest.raises(AbliterateError, match=said):
        write_control_vector(tmp_path / "vector.gguf", vectors, architecture=architecture, layers=3)
    assert_nothing_in(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("llama", "llama"), ("mixtral", "llama"), ("gpt_neox", "gptneox"), ("gpt_oss", "gpt-oss"), ("phi", "phi2")],
)
def test_architectures_by_model_type(model_type: str, name: str) -> None:
    assert architecture_of(model_type) == name


def test_every_architecture_in_the_tables_is_one_of_llama_cpp() -> None:
    from abliterate.edit import gguf as gguf_files

    names = set(gguf_files._ARCHITECTURES.values()) | set(gguf_files._LORA_REFUSED)
    assert names - set(gguf.MODEL_ARCH_NAMES.values()) == set()
    with pytest.raises(UsageError, match="model type 'opt'"):
        architecture_of("opt")


def test_architecture_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.kv_data[0] = {"general.name": gguf.GGUFValue("x", gguf.GGUFValueType.STRING), **writer.kv_data[0]}
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    assert stored_architecture(path) == "qwen2", "also where it is not the first entry"
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="names its architecture"):
        stored_architecture(path)
    with pytest.raises(CheckpointError, match="names its architecture"):
        stored_architecture(tmp_path / "none.gguf")


def test_without_the_gguf_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'abliterate\[gguf\]'"):
        lora(tmp_path / "lora.gguf", [factor("model.layers.0.mlp.down_proj.weight")])
    assert_nothing_in(tmp_path)
