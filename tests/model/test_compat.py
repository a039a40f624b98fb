"""What `_compat` takes from inside transformers is still there and still means what we take it to mean.

These run on the oldest and on the newest release that pyproject.toml allows (`make test` and `make oldest`).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from transformers import DynamicCache, GenerationConfig

from abliterate.model import _compat
from abliterate.model._compat import (
    auto_class,
    cache_name,
    fuses_experts,
    generation_settings,
    has_adapter,
    loading_report,
    loading_table,
    natural_key,
    takes_positions,
    tied_names,
    without_adapter,
)
from abliterate.model.batches import cached, new_cache
from families import BY_NAME
from zoo import Entry

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]


def test_this_release_is_one_that_the_package_asks_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (wanted,) = (text.removeprefix("transformers") for text in asked if text.startswith("transformers"))
    assert transformers.__version__ in SpecifierSet(wanted)
    assert "<" in wanted, "no release is promised that the suite has not passed"


def test_nothing_else_reaches_inside_transformers() -> None:
    inside = ("transformers.conversion_mapping", "transformers.core_model_loading", "past_key_values", "_from_config")
    for path in sorted((ROOT / "src").rglob("*.py")):
        if path.name != "_compat.py":
            text = path.read_text(encoding="utf-8")
            assert not [name for name in inside if name in text], path


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("llama", "LlamaForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("mixtral", "MixtralForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("mamba", "MambaForCausalLM"),
    ],
)
def test_a_model_goes_on_from_a_cache_under_its_name_without_a_word(kind: str, cls: str) -> None:
    model = Entry(kind, cls).model()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        cache = new_cache(model)
        model(input_ids=ids[:, :3], **cached(model, cache))
        if cache_name(model) != "cache_params":  # a recurrent state is told how far it has come
            after = model(input_ids=ids[:, 3:], **cached(model, cache)).logits[:, -1]
            assert torch.allclose(after, whole, atol=1e-4)
    assert isinstance(cache, DynamicCache) or cache_name(model) == "cache_params"


def test_the_name_of_the_cache_is_that_of_the_signature() -> None:
    class Old:
        def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...

    class New:
        def forward(self, input_ids: Any, cache: Any = None) -> None: ...

    class Recurrent:
        def forward(self, input_ids: Any, cache_params: Any = None) -> None: ...

    names = []
    for kind in (Old, New, Recurrent):
        model = type("Model", (), {"base_model": kind()})()
        names.append(cache_name(model))
    assert names == ["past_key_values", "cache", "cache_params"]


def test_the_loading_table_stacks_experts_and_leaves_the_rest() -> None:
    model = Entry("mixtral", "MixtralForCausalLM").model()
    table, known = loading_table(model), dict(model.state_dict())
    attention = "model.layers.0.self_attn.o_proj.weight"
    assert table.parameter(attention, known) == (attention, {})
    name, operations = table.parameter("model.layers.0.block_sparse_moe.experts.1.w2.weight", known)
    assert name.endswith("experts.down_proj")
    assert "MergeModulelist" in operations
    assert table.renamed("model.layers.0.self_attn.o_proj.weight") == attention
    assert fuses_experts(model)
    assert not fuses_experts(BY_NAME["llama"].model())


def test_a_model_can_be_divided_among_processes_by_a_plan_of_its_own() -> None:
    live = BY_NAME["llama"].model(num_key_value_heads=4)
    (options,) = _compat.division(live, 2).items()
    assert options[0] == "distributed_config"
    assert (options[1].tp_plan, live.supports_tp_plan) == ("auto", True)
    assert not BY_NAME["gpt2"].model().supports_tp_plan


def test_numbers_in_names_are_sorted_as_numbers() -> None:
    names = [f"layers.{block}.experts.{expert}.w" for block in (10, 2) for expert in (11, 1)] + ["layers.x", "head"]
    assert sorted(names, key=natural_key) == [
        *("head", "layers.2.experts.1.w", "layers.2.experts.11.w", "layers.10.experts.1.w"),
        *("layers.10.experts.11.w", "layers.x"),
    ]


def test_a_model_is_built_by_the_class_that_its_configuration_names() -> None:
    model = BY_NAME["llama"].model()
    model.config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        built = auto_class(model.config).from_config(model.config)
    assert type(built) is type(model)
    assert takes_positions(model)
    assert not _compat.computes_with_codes(model)
    assert isinstance(_compat.attention_kernel(model), str)


@pytest.mark.parametrize("tied", [False, True])
def test_the_report_on_loading_needs_no_numbers(tied: bool) -> None:
    """What transformers says of tensors on the meta device is what it would say of those in files."""
    with torch.device("meta"):
        skeleton = BY_NAME["llama-tied" if tied else "llama"].model()
    name = "model.layers.1.mlp.down_proj.weight"
    stored = {key: torch.empty_like(value, device="meta") for key, value in skeleton.state_dict().items()}
    if tied:
        assert tied_names(skeleton) == {"lm_head.weight": "model.embed_tokens.weight"}
        del stored["lm_head.weight"]
    assert not any(loading_report(skeleton, skeleton.config, stored).values())
    del stored[name]
    stored |= {"more.weight": stored["model.norm.weight"], "model.norm.weight": torch.empty(3, device="meta")}
    report = loading_report(skeleton, skeleton.config, stored)
    assert report["missing_keys"] == {name}
    assert report["unexpected_keys"] == {"more.weight"}
    ((odd, found, expected),) = report["mismatched_keys"]
    assert (odd, tuple(found), tuple(expected)) == ("model.norm.weight", (3,), (48,))


@pytest.mark.parametrize("auto", [False, True])
def test_an_adapter_in_the_folder_is_loaded_unless_that_is_said(auto: bool, tmp_path: Path) -> None:
    model = BY_NAME["llama"].model()
    model.save_pretrained(tmp_path)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"])).save_pretrained(str(tmp_path))
    cls: Any = transformers.AutoModelForCausalLM if auto else type(model)
    assert has_adapter(cls.from_pretrained(tmp_path))
    with without_adapter():
        assert not has_adapter(cls.from_pretrained(tmp_path))
    assert has_adapter(cls.from_pretrained(tmp_path))


def test_generation_settings_are_those_of_the_folder(tmp_path: Path) -> None:
    model = BY_NAME["llama"].model()
    model.save_pretrained(tmp_path)
    GenerationConfig(max_new_tokens=7, eos_token_id=5).save_pretrained(tmp_path)
    assert generation_settings(tmp_path).max_new_tokens == 7
    (tmp_path / "generation_config.json").unlink()
    assert generation_settings(tmp_path).eos_token_id == model.config.eos_token_id


def test_quiet_transformers_puts_back_what_it_found() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with _compat.quiet_transformers():
        assert logging.get_verbosity() > before[0]
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
