"""An adapter is taken back as PEFT merged it, or refused by the name of what is not known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from abliterate.errors import AbliterateError, CheckpointError, UsageError
from abliterate.forensics.repair import read_adapter

MODULES = ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "layers.11.up")


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)


class _Model(nn.Module):
    """Square maps, so that nothing but the numbers can tell which way they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(12))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"up": 2}, "alpha_pattern": {"layers.1.up": 3, "down": 16}},
        {"alpha_pattern": {"^layers.1.up": 7, "layers.0.up": 2.5}},
        {"rank_pattern": {r"layers\.0\.down": 5}, "use_rslora": True},
    ],
    ids=["plain", "patterns", "from the start", "rank-stabilised"],
)
def test_what_peft_merged_is_taken_back(options: Mapping[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(MODULES), init_lora_weights=False, **options)
    adapted: Any = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    after = adapted.merge_and_unload().state_dict()
    found = read_adapter(tmp_path)
    assert sorted(found) == sorted(MODULES)
    for module, (down, up) in found.items():
        name = f"{module}.weight"
        assert not torch.allclose(after[name], before[name], atol=1e-3), "the control"
        assert torch.allclose(after[name] - up @ down, before[name], atol=1e-5), module


def adapter(folder: Path, tensors: Mapping[str, Tensor] | None = None, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    named = tensors or {"base_model.model.m.lora_A.weight": a, "base_model.model.m.lora_B.weight": b}
    save_file(dict(named), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | options))
    return folder


def test_weights_that_lie_the_other_way_are_taken_back_so(tmp_path: Path) -> None:
    (down, up), (down_there, up_there) = (
        read_adapter(adapter(tmp_path, fan_in_fan_out=there))["m"] for there in (False, True)
    )
    assert (up @ down).shape == (6, 8)
    assert (up_there @ down_there).shape == (8, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"target_parameters": ["experts.down"]},
        {"layer_replication": [[0, 2]]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"trainable_token_indices": [1]},
        {"alora_invocation_tokens": [1]},
        {"use_something_new": True},
        {"something_config": {"x": 1}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_changes_something_else_is_refused_by_name(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        read_adapter(adapter(tmp_path, **options))


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_option_that_is_not_set_is_no_reason(value: object, tmp_path: Path) -> None:
    assert read_adapter(adapter(tmp_path, use_something_new=value, trainable_token_indices=value))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft_type": "IA3"}, "another kind"),
        ({"rank_pattern": {"m": 3}}, "expected rank 2 for 'm'"),
        ({"r": 3}, "expected rank 2 for 'm'"),
        ({"alpha_pattern": {"m": 0}}, "expected an alpha"),
        ({"alpha_pattern": {"m": -1}}, "expected an alpha"),
        ({"alpha_pattern": {"m": 1e9}}, "expected an alpha"),
        ({"alpha_pattern": {"m": 1, "^m": 2}}, "found several"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "names of modules"),
        ({"rank_pattern": {".*m": 2}}, "names of modules"),
    ],
)
def test_values_beyond_sense_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(AbliterateError, match=said):
        read_adapter(adapter(tmp_path, **options))


@pytest.mark.parametrize(("a", "b"), [((2, 8), (6, 3)), ((16,), (6, 2)), ((2, 8, 1), (6, 2))])
def test_matrices_that_do_not_fit_are_refused(a: tuple[int, ...], b: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"base_model.model.m.lora_A.weight": torch.ones(a), "base_model.model.m.lora_B.weight": torch.ones(b)}
    with pytest.raises(CheckpointError, match=r"expected A \[r, n\] and B \[d, r\]"):
        read_adapter(adapter(tmp_path, tensors))
