"""Quantised checkpoints: what they are taken for, what is measured on them, and whether they can be edited."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, FineGrainedFP8Config
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import Mxfp4Config

from abliterate.algebra import orthonormal
from abliterate.edit.hooks import ablation
from abliterate.edit.plan import make_plan
from abliterate.errors import CheckpointError, ModelError, UsageError
from abliterate.files.checkpoint import open_checkpoint
from abliterate.files.storage import PLAIN_STORAGE, Storage, how_stored, stored_numbers, without_quantization
from abliterate.model.anatomy import study
from abliterate.model.loading import load, locate
from abliterate.model.weights import numbers
from families import BY_NAME, COMMON, byte_tokenizer, random_model, randomise, save
from families import load as load_plain

IDS = torch.randint(0, 256, (3, 14), generator=torch.Generator().manual_seed(3))

#: Kernels of quantised maps want widths that are multiples of 64.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}

MOE: dict[str, Any] = {
    "moe_intermediate_size": 40,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "head_dim": 12,
}


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits.float()


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Any]]) -> Path:
    """Change the tensors of `folder` and put what `change` returns into its quantization_config, if anything."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    method = change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": dict(method)} if method else {})))
    return folder


def maps_of(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.endswith("_proj.weight")]


def stored_as(folder: Path) -> Storage:
    return how_stored(open_checkpoint(folder))


# ----------------------------------------------------------------------------------------- FP8: read as numbers


def blocked(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 codes, the scale of each block (those at the border are smaller), and the numbers both stand for."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = part.abs().max() / 448
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: weight.shape[0], : weight.shape[1]]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * spread


def in_fp8(
    model: Any, folder: Path, block: tuple[int, int] = (32, 32), suffix: str = "_scale_inv", **method: Any
) -> tuple[Path, Any]:
    """A checkpoint of `model` in FP8, and a model with the numbers that it stores, found without this package."""
    expected: dict[str, Tensor] = {}

    def change(tensors: dict[str, Tensor]) -> Mapping[str, Any]:
        for name in maps_of(tensors):
            size = (tensors[name].shape[0] if block[0] == -1 else block[0], tensors[name].shape[1])
            size = size if block[1] == -1 else (size[0], block[1])
            tensors[name], tensors[name + suffix], expected[name] = blocked(tensors[name], size)
            if block == (-1, -1):
                tensors[name + suffix] = tensors[name + suffix].reshape(())
        return method or {"quant_method": "fp8", "weight_block_size": list(block)}

    plain = save(model, folder.with_name(folder.name + "-plain"))
    rewrite(plain, lambda tensors: {})
    rewrite(save(model, folder), change)
    tensors = load_file(plain / "model.safetensors") | expected
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    return folder, load(locate(str(plain)), dtype="float32", device="cpu").model


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (1, -1), (-1, -1)], ids=str)
def test_fp8_is_measured_on_the_numbers_that_it_stores(tmp_path: Path, block: tuple[int, int]) -> None:
    folder, expected = in_fp8(BY_NAME["llama-bias"].model(), tmp_path / "m", block)
    assert stored_as(folder).editable
    loaded = load(locate(str(folder)), dtype="float32", device="cpu")
    assert torch.equal(logits_of(loaded.model), logits_of(expected))
    assert not loaded.quantised
    assert loaded.files.storage == Storage("fp8", True, loaded.files.storage.why)
    assert loaded.files.storage.dequantised
    assert getattr(loaded.model.config, "quantization_config", None) is None
    assert {type(module) for module in loaded.model.modules() if hasattr(module, "in_features")} == {nn.Linear}
    control = logits_of(BY_NAME["llama-bias"].model())
    assert 1e-3 < apart(logits_of(loaded.model), control) < 0.2, "a coarse copy of the model, and not the model"


def test_dequantised_model_is_studied_and_measured_like_any_other(tmp_path: Path) -> None:
    folder, expected = in_fp8(BY_NAME["llama"].model(), tmp_path / "m")
    loaded = load(locate(str(folder)), dtype="bfloat16", device="cpu")
    assert loaded.dtype == torch.bfloat16
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter.to(torch.bfloat16)), name
    assert [writer.module for writer in study(loaded.model).writers] == [w.module for w in study(expected).writers]


def test_transformers_reads_the_same_numbers_where_blocks_divide_evenly(tmp_path: Path) -> None:
    """Elsewhere it takes blocks for smaller than they are, or stops: that is why this package reads them itself."""
    folder, _ = in_fp8(BY_NAME["llama"].model(num_key_value_heads=4), tmp_path / "m", (16, 16))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ours = load(locate(str(folder)), dtype="float32", device="cpu").model
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


def test_experts_stored_one_by_one_are_merged_without_their_scales(tmp_path: Path) -> None:
    options = {key: value for key, value in COMMON.items() if key != "max_position_embeddings"}
    model = random_model(AutoConfig.for_model("qwen3_moe", **options, **MOE))
    folder, expected = in_fp8(model, tmp_path / "m")
    assert any("experts.3.down_proj.weight_scale_inv" in name for name in open_checkpoint(folder).tensors)
    loaded = load(locate(str(folder)), dtype="float32", device="cpu")
    assert torch.equal(logits_of(loaded.model), logits_of(expected))


def test_text_half_of_a_model_of_images_and_text_is_measured_on(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 48, "mlp_ratio": 2}
    text = {**COMMON, "rope_parameters": rope}
    config = AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision, tie_word_embeddings=False)
    model = randomise(AutoModelForImageTextToText.from_config(config)).eval()
    folder, expected = in_fp8(model, tmp_path / "m")
    assert 1e-3 < apart(logits_of(expected), logits_of(model)) < 0.2
    loaded = load(locate(str(folder)), dtype="float32", device="cpu")
    assert type(loaded.model).__name__ == "Qwen2VLForConditionalGeneration"
    assert torch.equal(logits_of(loaded.model), logits_of(expected))


def test_generation_settings_come_along(tmp_path: Path) -> None:
    folder, _ = in_fp8(BY_NAME["llama"].model(), tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 3]}))
    assert load(locate(str(folder)), device="cpu").model.generation_config.eos_token_id == [1, 2, 3]


def test_tensors_missing_from_quantised_files_are_never_drawn_at_random(tmp_path: Path) -> None:
    folder, _ = in_fp8(BY_NAME["llama"].model(), tmp_path / "m")

    def drop(tensors: dict[str, Tensor]) -> Mapping[str, Any]:
        del tensors["model.layers.1.input_layernorm.weight"]
        return {}

    with pytest.raises(CheckpointError, match=r"1 tensors .* model\.layers\.1\.input_layernorm\.weight"):
        load(locate(str(rewrite(folder, drop))), device="cpu")


@pytest.mark.parametrize(
    ("suffix", "method"),
    [
        ("_scale", {"quant_method": "compressed-tensors", "format": "float-quantized", "sparsity_config": {}}),
        ("_scale", {"quant_method": "fbgemm_fp8"}),
        ("_scale", {"quant_method": "modelopt", "quant_algo": "FP8"}),
        ("_scale", {"quant_method": "fp8", "activation_scheme": "static"}),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else value,
)
def test_fp8_by_any_other_name_is_read_without_its_library(tmp_path: Path, suffix: str, method: Any) -> None:
    folder, expected = in_fp8(BY_NAME["llama"].model(), tmp_path / "m", (1, -1), suffix, **method)
    loaded = load(locate(str(folder)), dtype="float32", device="cpu")
    assert torch.equal(logits_of(loaded.model), logits_of(expected))
    assert loaded.files.storage == Storage(method["quant_method"], True, loaded.files.storage.why)
    loaded.files.require_editable()


# ------------------------------------------------------------------------------------------------------- MXFP4


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with experts in MXFP4, as gpt-oss has them: widths differ, so that a wrong axis shows."""
    options = {key: value for key, value in COMMON.items() if key != "max_position_embeddings"}
    config = AutoConfig.for_model(
        "gpt_oss",
        **{**options, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        attn_implementation="eager",
    )
    generator = torch.Generator().manual_seed(0)

    def pack(tensors: dict[str, Tensor]) -> Mapping[str, Any]:
        for name in [name for name in tensors if name.endswith(("experts.down_proj", "gate_up_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            shape = (experts, outputs, inputs // 32, 16)
            tensors[name + "_blocks"] = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
            tensors[name + "_scales"] = torch.randint(119, 124, shape[:3], dtype=torch.uint8, generator=generator)
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}

    folder = save(random_model(config), tmp_path_factory.mktemp("models") / "gpt-oss", dtype=torch.bfloat16)
    return rewrite(folder, pack)


def test_mxfp4_is_measured_on_the_numbers_that_it_stores(gpt_oss: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        gpt_oss, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    loaded = load(locate(str(gpt_oss)), dtype="float32", device="cpu")
    assert loaded.files.storage == Storage("mxfp4", True, loaded.files.storage.why)
    assert not loaded.quantised
    for name, parameter in theirs.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter.float()), name
    assert torch.equal(logits_of(loaded.model), logits_of(theirs.float()))
    assert load(locate(str(gpt_oss)), device="cpu").dtype == torch.bfloat16, "auto: what the rest is stored in"


# ----------------------------------------------------------------------------------- what cannot be edited


def packed_along(codes: Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """Eight codes of four bits in an int32, along the last axis; `order` says whose are the lowest bits first."""
    nibbles = codes.long().reshape(*codes.shape[:-1], -1, 8)[..., list(order)]
    whole = (nibbles << 4 * torch.arange(8)).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()


def four_bits(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [n, d], zero points and scales [n / group, d] of a weight [d, n], and the numbers [d, n] they stand for."""
    groups = weight.T.reshape(-1, group, weight.shape[0])
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(1, 15)
    codes = ((groups / scales[:, None]).round() + zeros[:, None]).clamp(0, 15)
    return codes.flatten(0, 1), zeros, scales.half(), ((codes - zeros[:, None]) * scales[:, None]).flatten(0, 1).T


def in_four_bits(method: str, folder: Path) -> tuple[Path, Any]:
    """A checkpoint as GPTQ or AWQ write it, and a model with the numbers that it stores."""
    model = BY_NAME["llama"].model(**WIDE)
    expected = copy.deepcopy(model)
    awq = (0, 2, 4, 6, 1, 3, 5, 7)

    def change(tensors: dict[str, Tensor]) -> Mapping[str, Any]:
        for name in maps_of(tensors):
            codes, zeros, scales, stands_for = four_bits(tensors.pop(name))
            expected.get_parameter(name).data.copy_(stands_for)
            base = name.removesuffix("weight")
            tensors[base + "scales"] = scales
            if method == "awq":
                tensors[base + "qweight"], tensors[base + "qzeros"] = packed_along(codes, awq), packed_along(zeros, awq)
            else:
                tensors[base + "qweight"] = packed_along(codes.T).T
                tensors[base + "qzeros"] = packed_along(zeros - 1)
                tensors[base + "g_idx"] = (torch.arange(len(codes)) // 32).int()
        settings = {"quant_method": method, "bits": 4, "group_size": 32}
        return settings | ({"zero_point": True, "version": "gemm"} if method == "awq" else {"sym": False})

    return rewrite(save(model, folder), change), expected


@pytest.fixture(scope="module", params=["gptq", "awq"])
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder, expected = in_four_bits(request.param, tmp_path_factory.mktemp("models") / request.param)
    return request.param, folder, expected


def test_fitted_grids_cannot_be_edited_and_it_is_said_why(fitted: tuple[str, Path, Any]) -> None:
    method, folder, _ = fitted
    files = locate(str(folder))
    storage = stored_as(folder)
    assert (storage.method, storage.editable, storage.dequantised) == (method, False, False)
    with pytest.raises(ModelError) as caught:
        files.require_editable()
    message = str(caught.value)
    assert message.isprintable()
    for part in (f"stored quantised ({method})", "fitted", "full-precision checkpoint", "--as lora"):
        assert part in message


def test_missing_library_is_named_with_its_command(
    fitted: tuple[str, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, folder, _ = fitted
    hide(monkeypatch, "gptqmodel")
    with pytest.raises(ModelError, match=f"{method} needs gptqmodel.*; pip install gptqmodel"):
        load(locate(str(folder)), device="cpu")


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Pretend that `modules` are not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else find(name))


@needs("gptqmodel", "optimum")
def test_gptq_and_awq_are_measured_on_as_they_are(
    fitted: tuple[str, Path, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    _, folder, expected = fitted
    loaded = load(locate(str(folder)), dtype="float32", device="cpu")
    assert loaded.quantised
    assert loaded.dtype == torch.float32
    assert apart(logits_of(loaded.model), logits_of(expected)) < 5e-3
    assert apart(logits_of(loaded.model), logits_of(BY_NAME["llama"].model(**WIDE))) > 0.05, "not the full precision"
    name = "model.layers.1.mlp.down_proj"
    assert apart(numbers(loaded.model.get_submodule(name)), expected.get_submodule(name).weight) < 2e-3
    check_ablation(loaded.model, expected)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("config", "tensor", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None, "bitsandbytes"),
        ({"load_in_8bit": True}, None, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, None, "gptq"),
        ({"quant_method": "hqq"}, None, "hqq"),
        ({"something": 1}, None, "unknown"),
        ({"quant_method": "fp8"}, torch.zeros(4, 4, dtype=torch.float8_e5m2), "fp8"),
        ({"quant_method": "fp8"}, torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "fp8"),  # without a scale
        ({"quant_method": "fp8"}, torch.zeros(4, 4, dtype=torch.int8), "fp8"),  # two FP4 codes to a byte
        ({"quant_method": "compressed-tensors"}, torch.zeros(4, 4, dtype=torch.int8), "compressed-tensors"),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, None, "compressed-tensors"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "x"}}, None, "compressed-tensors"),
        ({}, torch.zeros(4, 4, dtype=torch.int8), "unknown"),
        ({}, torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "unknown"),
    ],
)
def test_what_is_not_understood_is_not_edited(
    tmp_path: Path, config: dict[str, Any], tensor: Tensor | None, method: str
) -> None:
    def change(tensors: dict[str, Tensor]) -> Mapping[str, Any]:
        if tensor is not None:
            tensors["model.layers.0.mlp.down_proj.weight"] = tensor
        return config

    storage = stored_as(rewrite(save(BY_NAME["llama"].model(), tmp_path / "m"), change))
    assert (storage.method, storage.editable) == (method, False)


@pytest.mark.parametrize("config", [{}, {"quant_method": "fp8"}, {"quant_method": "mxfp4"}], ids=str)
def test_numbers_are_numbers_whatever_the_configuration_says(tmp_path: Path, config: dict[str, Any]) -> None:
    """Buffers of whole numbers are no weights, and a method without a single code is no quantisation."""

    def change(tensors: dict[str, Tensor]) -> Mapping[str, Any]:
        tensors["model.rows"] = torch.arange(6).view(2, 3)
        tensors["model.mask"] = torch.ones(4, dtype=torch.bool)
        if not config:
            tensors["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
        return config

    model = BY_NAME["llama"].model()
    folder = rewrite(save(model, tmp_path / "m"), change)
    assert stored_as(folder) == PLAIN_STORAGE
    assert torch.equal(logits_of(load(locate(str(folder)), device="cpu").model), logits_of(model))


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_unreadable_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    folder = save(BY_NAME["llama"].model(), tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: expected") as caught:
        stored_as(folder)
    assert str(caught.value).isprintable()


def test_codes_that_transformers_passes_over_in_silence_are_an_error(tmp_path: Path) -> None:
    """It loads codes of methods that it does not know as if they were the numbers, and reports leftover scales."""

    def change(tensors: dict[str, Tensor]) -> Mapping[str, Any]:
        for name in maps_of(tensors):
            tensors[name + "_scale"] = torch.ones(2, 2)
        return {"quant_method": "new-method"}

    folder = rewrite(save(BY_NAME["llama"].model(), tmp_path / "m"), change)
    with pytest.raises(ModelError, match=r"does not read all .*\(new-method\), model\.layers\.0\.mlp\.down_proj"):
        load(locate(str(folder)), device="cpu")


def test_writers_of_quantised_files_are_found_without_loading_them(fitted: tuple[str, Path, Any]) -> None:
    _, folder, expected = fitted
    anatomy = locate(str(folder)).anatomy()
    assert [writer.module for writer in anatomy.writers] == [writer.module for writer in study(expected).writers]


def test_configuration_builds_ordinary_modules_without_its_quantisation(fitted: tuple[str, Path, Any]) -> None:
    _, folder, expected = fitted
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(without_quantization(config))
    assert getattr(config, "quantization_config", None), "the original stays as it is"
    assert {name: tuple(p.shape) for name, p in skeleton.named_parameters()} == {
        name: tuple(p.shape) for name, p in expected.named_parameters()
    }


# ----------------------------------------------------------------------------- quantised while it is loaded


def check_ablation(model: Any, plain: Any) -> None:
    """Hooks of a plan made on the plain model take a direction out of what a quantised one writes."""
    anatomy = study(plain)
    unit = orthonormal(torch.randn(1, anatomy.d_model, generator=torch.Generator().manual_seed(7)))
    plan = make_plan(anatomy, unit)
    written: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            written[name] = output.float()

        return hook

    before = logits_of(model)
    with ablation(model, plan):
        handles = [model.get_submodule(w.module).register_forward_hook(keep(w.module)) for w in anatomy.writers]
        ablated = logits_of(model)
        for handle in handles:
            handle.remove()
    assert set(written) == {writer.module for writer in anatomy.writers}
    other = orthonormal(torch.randn(1, anatomy.d_model, generator=torch.Generator().manual_seed(8)))
    for name, output in written.items():
        assert float((output @ unit.T).norm()) < 1e-2 * float(output.norm()), name
        assert float((output @ other.T).norm()) > 2e-2 * float(output.norm()), f"{name}: a control"
    assert apart(ablated, before) > 0.01
    with ablation(plain, plan):
        assert apart(ablated, logits_of(plain)) < apart(ablated, before)
    assert torch.equal(logits_of(model), before), "the model is restored"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(BY_NAME["llama-bias"].model(**WIDE), tmp_path_factory.mktemp("models") / "full")


@needs("bitsandbytes")
@pytest.mark.parametrize(("quantization", "error"), [("bnb-4bit", 0.35), ("bnb-8bit", 0.05)])
def test_full_precision_is_quantised_for_measuring(full: Path, quantization: str, error: float) -> None:
    files = locate(str(full))
    loaded = load(files, dtype="float32", device="cpu", quantization=quantization)
    assert loaded.quantised
    assert loaded.dtype == torch.float32
    assert loaded.files.storage == PLAIN_STORAGE, "the files edited stay the full-precision ones"
    files.require_editable()
    plain = load_plain(full)
    assert 1e-3 < apart(logits_of(loaded.model), logits_of(plain)) < error
    check_ablation(loaded.model, plain)


@needs("bitsandbytes")
def test_what_is_dequantised_can_be_quantised_for_measuring(tmp_path: Path) -> None:
    folder, expected = in_fp8(BY_NAME["llama"].model(**WIDE), tmp_path / "m")
    loaded = load(locate(str(folder)), dtype="float32", device="cpu", quantization="bnb-4bit")
    assert loaded.quantised
    assert loaded.files.storage.method == "fp8"
    name = "model.layers.1.mlp.down_proj"
    found = numbers(loaded.model.get_submodule(name))
    assert 1e-3 < apart(found, expected.get_submodule(name).weight) < 0.15
    assert apart(found, expected.model.layers[0].mlp.down_proj.weight) > 1, "a control"


@needs("bitsandbytes")
@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
def test_stored_bitsandbytes_is_measured_on_as_it_is(full: Path, tmp_path: Path, quantization: str) -> None:
    live = load(locate(str(full)), dtype="float32", device="cpu", quantization=quantization)
    live.model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    storage = stored_as(tmp_path / "m")
    assert (storage.method, storage.editable) == ("bitsandbytes", False)
    loaded = load(locate(str(tmp_path / "m")), dtype="float32", device="cpu")
    assert loaded.quantised
    assert torch.allclose(logits_of(loaded.model), logits_of(live.model), atol=1e-3)
    with pytest.raises(UsageError, match=r"already quantised \(bitsandbytes\); leave --quantization out"):
        load(locate(str(tmp_path / "m")), device="cpu", quantization="bnb-4bit")


@needs("bitsandbytes")
def test_quantising_says_nothing(full: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for quantization in ("bnb-4bit", "bnb-8bit"):
        logits_of(load(locate(str(full)), device="cpu", quantization=quantization).model)
    assert capfd.readouterr() == ("", "")


def test_quantization_that_cannot_be_had_is_one_line(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = locate(str(full))
    with pytest.raises(UsageError, match="--quantization int3: expected bnb-4bit or bnb-8bit"):
        load(files, device="cpu", quantization="int3")
    hide(monkeypatch, "bitsandbytes")
    with pytest.raises(ModelError, match=r"needs bitsandbytes; pip install 'abliterate\[bnb\]'"):
        load(files, device="cpu", quantization="bnb-4bit")
    load(files, device="cpu")


# ----------------------------------------------------------------------------------------- compressed-tensors


def compress(model: Any, folder: Path, preset: str) -> tuple[Path, Any]:
    """A checkpoint by the library's own compressor, and a model with the numbers that it stores."""
    compressors = importlib.import_module("compressed_tensors.compressors")
    quantization = importlib.import_module("compressed_tensors.quantization")
    fit = importlib.import_module("compressed_tensors.quantization.utils").calculate_qparams
    formats = {"W4A16": "pack-quantized", "FP8_DYNAMIC": "float-quantized", "INT8": "int-quantized"}
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    scheme.format = formats[preset]
    if scheme.weights.group_size:
        scheme.weights.group_size = 32
    live, expected = copy.deepcopy(model), copy.deepcopy(model)
    config = quantization.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=formats[preset])
    quantization.apply_quantization_config(live, config)
    for module in live.modules():
        if hasattr(module, "weight_scale"):
            parts = module.weight.reshape(len(module.weight), -1, scheme.weights.group_size or module.in_features)
            scale, zero = fit(parts.amin(-1), parts.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero)
            module.quantization_status = quantization.QuantizationStatus.FROZEN
    compressor = compressors.ModelCompressor(quantization_config=config)
    compressor.compress_model(live)
    live.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    compressor.update_config(str(folder))
    theirs = compressors.BaseCompressor.get_value_from_registry(formats[preset])
    for name, module in live.named_modules():
        if hasattr(module, "weight_scale"):
            state = theirs.decompress(dict(module.state_dict()), scheme)
            expected.get_parameter(f"{name}.weight").data.copy_(state["weight"])
    return folder, expected


@needs("compressed_tensors")
@pytest.mark.parametrize("preset", ["W4A16", "FP8_DYNAMIC", "INT8"])
def test_compressed_tensors_are_measured_on_the_numbers_that_they_store(tmp_path: Path, preset: str) -> None:
    model = BY_NAME["llama"].model(**WIDE)
    folder, expected = compress(model, tmp_path / "m", preset)
    loaded = load(locate(str(folder)), dtype="float32", device="cpu")
    assert (loaded.files.storage.method, loaded.files.storage.editable) == (
        "compressed-tensors",
        preset == "FP8_DYNAMIC",
    )
    assert apart(logits_of(loaded.model), logits_of(expected)) < 1e-5
    assert apart(logits_of(loaded.model), logits_of(model)) > 1e-3, "a control"
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(numbers(loaded.model.get_submodule(name)), loaded.model.get_submodule(name).weight)
    check_ablation(loaded.model, expected)


# --------------------------------------------------------------------------------------- effective weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_effective_weight_of_ordinary_maps_is_their_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, conv, table = nn.Linear(700, 20).to(dtype), Conv1D(20, 30).to(dtype), nn.Embedding(40, 20).to(dtype)
    bias = nn.init.normal_(linear.bias).detach().clone()
    assert torch.equal(numbers(linear), linear.weight.float())
    assert torch.equal(linear.bias, bias), "the bias is put back"
    assert torch.equal(numbers(conv), conv.weight.float().T)
    assert torch.equal(numbers(table), table.weight.float().T)


def test_effective_weight_is_of_what_the_module_does_and_not_of_what_it_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = Doubled(6, 4)
    assert torch.equal(numbers(module), 2 * module.weight)


def test_effective_weight_needs_a_linear_map_and_leaves_the_bias_when_it_fails() -> None:
    with pytest.raises(ModelError, match="module LayerNorm: expected a linear map"):
        numbers(nn.LayerNorm(4))

    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    module = Broken(3, 2)
    bias = module.bias.detach().clone()
    with pytest.raises(RuntimeError, match="no"):
        numbers(module)
    assert torch.equal(module.bias, bias)


@needs("bitsandbytes")
@pytest.mark.parametrize(("quantization", "error"), [("bnb-4bit", 5e-3), ("bnb-8bit", 1e-3)])
def test_effective_weight_of_bitsandbytes_is_what_it_dequantises_to(
    full: Path, quantization: str, error: float
) -> None:
    functional = importlib.import_module("bitsandbytes").functional
    loaded = load(locate(str(full)), dtype="float32", device="cpu", quantization=quantization)
    module = loaded.model.model.layers[1].mlp.down_proj
    bias = module.bias.detach().clone()
    stored = copy.deepcopy(module.weight)
    if quantization == "bnb-4bit":
        expected = functional.dequantize_4bit(stored.data, stored.quant_state).float()
    else:
        expected = functional.int8_vectorwise_dequant(stored.CB, stored.SCB)
    found = numbers(module)
    assert apart(found, expected) < error
    assert apart(found, load_plain(full).model.layers[1].mlp.down_proj.weight) < 0.2
    assert torch.equal(module.bias, bias)


def test_files_with_codes_give_every_parameter_lazily(tmp_path: Path) -> None:
    folder, expected = in_fp8(BY_NAME["llama"].model(), tmp_path / "m")
    found = stored_numbers(open_checkpoint(folder), torch.float32)
    assert set(found) == set(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name][...], value), name
        assert torch.equal(found[name][1:3], value[1:3]), name
