"""Tiny twins of large releases, with the names and layouts that their files have: found, searched, edited, loaded.

Weights are random; nothing here refuses. What is asked is whether every step takes such a model, and whether what
transformers loads of what was written is the original under the same plan as hooks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.utils.quantization_config import Mxfp4Config

from abliterate import pipeline
from abliterate.config import (
    EvalSettings,
    FindSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RunSettings,
    SearchSettings,
)
from abliterate.edit.direction import load_direction
from abliterate.edit.hooks import ablation
from abliterate.edit.options import plan_for
from abliterate.files.checkpoint import open_checkpoint
from abliterate.model.anatomy import study
from abliterate.model.loading import load, locate
from families import save
from planted import GOOD, write_jsonl
from planted import prompts as some_prompts
from zoo import Entry

Tensors = dict[str, Tensor]
#: Rows and columns that share a scale: those of DeepSeek-V3 are 128, and its widths multiples of that.
BLOCK = 4
IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(5))


def in_fp8_blocks(tensors: Tensors) -> dict[str, Any]:
    """E4M3 codes with the scale of each block, of all maps of the blocks as DeepSeek-V3 has them."""
    for name in [name for name in tensors if "_proj" in name and name.endswith("weight")]:
        weight = tensors[name].float()
        rows, columns = weight.shape
        parts = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = parts.abs().amax((1, 3)) / 448
        tensors[name] = (parts / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns)
        tensors[f"{name}_scale_inv"] = scales
    return {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "fmt": "e4m3"}


def with_next_tokens(tensors: Tensors) -> None:
    """One more layer, as DeepSeek-V3 has it for foretelling several tokens: transformers does not load it."""
    last = "model.layers.2."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[name.replace(last, "model.layers.3.")] = tensors[name].clone()
    tensors["model.layers.3.eh_proj.weight"] = torch.randn(48, 96)


def deepseek(tensors: Tensors) -> dict[str, Any]:
    with_next_tokens(tensors)
    return in_fp8_blocks(tensors)


def in_mxfp4(tensors: Tensors) -> dict[str, Any]:
    """Experts as blocks of codes and their scales, as gpt-oss has them."""
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.down_proj", "gate_up_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32, 16)
        tensors[name + "_blocks"] = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        tensors[name + "_scales"] = torch.randint(119, 123, shape[:3], dtype=torch.uint8, generator=generator)
    return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@dataclass(frozen=True, slots=True)
class Twin:
    """A class of transformers for a model type, a name that its files must hold, and how its weights are stored.

    `close` is how near what was written must come to the plan as hooks, beside what the plan does: in a stream of 48
    numbers a direction is a large part of each weight, and the rounding of three bits is not small beside it.
    """

    model_type: str
    cls: str
    holds: str
    stored: Callable[[Tensors], dict[str, Any]] | None = None
    reading: Any = None
    changes: dict[str, Any] = field(default_factory=dict)
    close: float = 1e-4

    def __str__(self) -> str:
        return self.model_type


TWINS = (
    Twin(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv",
        deepseek,
        FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK)),
        close=0.6,
    ),
    Twin(
        "gpt_oss",
        "GptOssForCausalLM",
        "model.layers.1.mlp.experts.down_proj_blocks",
        in_mxfp4,
        Mxfp4Config(dequantize=True),
        {"hidden_size": 64, "intermediate_size": 96},
        close=0.2,
    ),
    Twin("qwen3_next", "Qwen3NextForCausalLM", "model.layers.0.linear_attn.in_proj_qkvz.weight"),
    Twin(
        "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "model.language_model.layers.0.linear_attn.out_proj.weight"
    ),
    Twin("glm4_moe", "Glm4MoeForCausalLM", "model.layers.1.mlp.shared_experts.down_proj.weight"),
    Twin("llama4_text", "Llama4ForCausalLM", "model.layers.1.feed_forward.experts.down_proj"),
    Twin("kimi_k25", "Kimi_K25ForConditionalGeneration", "vision_tower.encoder.blocks.0.mlp.fc0.bias"),
    Twin("kimi_linear", "KimiLinearForCausalLM", "model.layers.1.block_sparse_moe.shared_experts.down_proj.weight"),
)


def made(twin: Twin, folder: Path) -> Path:
    """The twin's files."""
    save(Entry(twin.model_type, twin.cls, changes=twin.changes).model(), folder)
    if twin.stored is not None:
        tensors = {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": twin.stored(tensors)}
        (folder / "config.json").write_text(json.dumps(config))
        for file in folder.glob("model*"):
            file.unlink()
        whole = {name: one.contiguous() for name, one in tensors.items()}
        save_file(whole, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> PromptSettings:
    folder, ends = tmp_path_factory.mktemp("prompts"), {"harmful": "ZZZZZZ!", "harmless": "aaaaaa.", "borderline": "mm"}
    for name, end in ends.items():
        write_jsonl(folder / f"{name}.jsonl", [f"{text} {end}" for text in some_prompts(GOOD, 50, len(name))])
    return PromptSettings(limit=10, **{name: str(folder / f"{name}.jsonl") for name in ends})


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found.float()


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_a_large_release_goes_all_the_way(twin: Twin, prompts: PromptSettings, tmp_path: Path) -> None:
    folder, out = made(twin, tmp_path / "model"), tmp_path / "out"
    assert twin.holds in open_checkpoint(folder).tensors
    record = pipeline.run(
        RunSettings(
            model=str(folder),
            loading=ModelSettings(device="cpu", dtype="float32"),
            prompts=prompts,
            finding=FindSettings(positions=1, all_prompts=True, refusal_tokens="a,I", min_refusal_rate=0),
            searching=SearchSettings(points=1, steps=3, search_tokens=3, held_out="none"),
            evaluating=EvalSettings(max_new_tokens=3, judge="rules", no_control=True, no_cache=True),
            output=OutputSettings(out=out, force=True),
        )
    )
    assert record.search is not None
    assert record.search.method == "gradient"
    assert open_checkpoint(out).tensors.keys() >= open_checkpoint(folder).tensors.keys()
    original = load(locate(str(folder)), dtype="float32", device="cpu").model
    before = logits_of(original)
    with ablation(original, plan_for(study(original), load_direction(out / "direction.safetensors"))):
        hooked = logits_of(original)
    options = {} if twin.reading is None else {"quantization_config": twin.reading}
    theirs = getattr(transformers, twin.cls).from_pretrained(out, dtype=torch.float32, **options).eval()
    written = logits_of(theirs)
    ours = logits_of(load(locate(str(out)), dtype="float32", device="cpu").model)
    torch.testing.assert_close(ours, written, rtol=1e-4, atol=1e-4)
    size = float((hooked - before).norm())
    assert size > 0.02 * float(before.norm()), "the edit does something"
    assert float((written - hooked).norm()) < max(twin.close * size, 1e-4 * float(before.norm()))
