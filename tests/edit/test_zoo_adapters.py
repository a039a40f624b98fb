"""Every model of the zoo whose writers are known: its adapter in PEFT, in transformers and merged is what hooks do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora import by_peft, by_transformers, distance
from torch import Tensor

from abliterate.algebra import orthonormal
from abliterate.edit.hooks import ablation
from abliterate.edit.lora import low_rank, write_peft
from abliterate.edit.plan import Plan, make_plan
from abliterate.edit.weights import planned_parameters
from abliterate.errors import UsageError
from abliterate.files.checkpoint import open_checkpoint
from abliterate.model.anatomy import names_on_disk, study
from zoo import ENTRIES, Entry
from zoo_verdicts import WHY

pytestmark = [
    # Said by libraries to each other.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute"),
    # Where the configuration asks for tied embeddings and the class does not tie them (bigbird_pegasus, cpmant).
    pytest.mark.filterwarnings("ignore:Model with .tie_word_embeddings=True."),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]

_KERNEL = "PEFT holds no 'out_proj'"
_NO_WEIGHT = "expected a map with a weight, found none"

#: What PEFT cannot hold: the writer that is named, and what is said of it.
REFUSED: Mapping[str, tuple[str, str]] = {
    "dbrx": ("transformer.blocks.0.ffn.experts.mlp", "others use directly"),
    "falcon_h1": ("model.layers.0.mamba.out_proj", _KERNEL),
    "falcon_mamba": ("backbone.layers.0.mixer.out_proj", _KERNEL),
    "gpt_neox_japanese": ("gpt_neox_japanese.layers.2.attention", _NO_WEIGHT),
    "jetmoe": ("model.layers.0.mlp", _NO_WEIGHT),
    "laguna": ("model.layers.1.mlp.shared_experts.down_proj", "another name"),
    "mamba": ("backbone.layers.0.mixer.out_proj", _KERNEL),
    "mamba2": ("backbone.layers.0.mixer.out_proj", _KERNEL),
    "nemotron_h": ("model.layers.0.mixer.out_proj", _KERNEL),
}

IDS = torch.randint(4, 250, (2, 12), generator=torch.Generator().manual_seed(3))


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def plan_for(model: Any) -> Plan:
    anatomy = study(model)
    return make_plan(anatomy, orthonormal(torch.randn(2, anatomy.d_model, generator=torch.Generator().manual_seed(4))))


def adapters(model: Any, plan: Plan, folder: Path) -> tuple[Path, ...]:
    """Adapters under `folder`, made from the files that the model is saved to."""
    model.save_pretrained(folder / "model")
    source = open_checkpoint(folder / "model")
    factors = low_rank(source, plan, names_on_disk(model, planned_parameters(plan), source.tensors))
    return write_peft(folder / "adapter", factors, model=model, base_model="some/model")


each_held = pytest.mark.parametrize(
    "entry",
    [entry for entry in ENTRIES if str(entry) not in WHY.keys() | REFUSED.keys()],
    ids=lambda entry: f"{entry.cls}-{entry}",
)


@each_held
def test_adapter_is_what_hooks_do(entry: Entry, tmp_path: Path) -> None:
    model = entry.model()
    plan = plan_for(model)
    folders = adapters(model, plan, tmp_path)
    with ablation(model, plan):
        expected = logits_of(model)
    assert distance(logits_of(model), expected) > 0.01  # the control: the plan does do something
    wrapped = by_peft(model, folders)
    assert distance(logits_of(wrapped), expected) < 1e-4
    assert distance(logits_of(wrapped.merge_and_unload()), expected) < 1e-4
    assert distance(logits_of(by_transformers(model, folders)), expected) < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_hold_is_refused_by_name(name: str, tmp_path: Path) -> None:
    module, reason = REFUSED[name]
    model = next(entry for entry in ENTRIES if str(entry) == name).model()
    with pytest.raises(UsageError) as caught:
        adapters(model, plan_for(model), tmp_path)
    assert module in str(caught.value)
    assert reason in str(caught.value)
    assert not (tmp_path / "adapter").exists()
