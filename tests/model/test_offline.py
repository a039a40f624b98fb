"""A model on disk is understood as the loaded one is, without its numbers and without its memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from abliterate.errors import AnatomyError, ModelError
from abliterate.files.checkpoint import Checkpoint, TensorInfo, open_checkpoint, open_tensor
from abliterate.model.anatomy import Anatomy, Kind, Writer, names_on_disk, study
from abliterate.model.anatomy import offline as blueprint
from abliterate.model.anatomy.offline import study_files
from families import BY_NAME, D_MODEL, VOCAB, randomise, save
from zoo import ENTRIES

#: Models that are given up on talk about kernels that are not installed.
quiet = pytest.mark.filterwarnings("ignore")

ZOO = {str(entry): entry for entry in ENTRIES}

FAMILY_NAMES = (
    "llama",
    "llama-tied",
    "gemma2",
    "gemma3-tied",
    "gpt2",
    "gpt2-tied",
    "falcon-new",
    "olmo2",
    "granite",
    "mpt",
)
ZOO_NAMES = (
    "bloom",
    "deepseek_v3",
    "deepseek_v4",
    "dbrx",
    "falcon_h1",
    "gemma3",
    "gemma4_text-moe",
    "gpt_oss",
    "jetmoe",
    "llama4_text",
    "mamba",
    "mixtral",
    "phimoe",
    "qwen2_moe",
    "qwen3_next",
    "recurrent_gemma",
    "xglm",
    "zamba2",
)


def model_of(name: str) -> Any:
    return BY_NAME[name].model() if name in BY_NAME else ZOO[name].model()


def read(folder: Path) -> tuple[Anatomy, Any, Checkpoint]:
    checkpoint = open_checkpoint(folder)
    anatomy, skeleton = study_files("model", checkpoint)
    return anatomy, skeleton, checkpoint


def bare(writer: Writer) -> Writer:
    """The writer without numbers."""
    return dataclasses.replace(writer, gain=None, inner=1.0, multiplier=1.0)


def axes_of(anatomy: Anatomy) -> dict[str, int]:
    weights = {w.weight: w.axis for w in anatomy.writers if w.weight is not None}
    return weights | {w.bias: -1 for w in anatomy.writers if w.bias is not None}


def assert_same(found: Anatomy, live: Anatomy) -> None:
    assert (found.d_model, found.blocks) == (live.d_model, live.blocks)
    assert max(found.closure) < 1e-4
    assert [bare(writer) for writer in found.writers] == [bare(writer) for writer in live.writers]
    for mine, other in zip(found.writers, live.writers, strict=True):
        assert mine.inner == pytest.approx(other.inner, rel=1e-4)
        unknown = (
            mine.multiplier is None and mine.block is not None
        )  # learnt, perhaps: not to be had from a narrow copy
        assert unknown or mine.multiplier == pytest.approx(other.multiplier or 0, rel=1e-4)
        if mine.gain is None or other.gain is None:
            assert mine.gain is other.gain
        else:
            ratio = mine.gain / other.gain
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=1e-4)


@pytest.mark.contract
@quiet
@pytest.mark.parametrize("name", [*FAMILY_NAMES, *ZOO_NAMES])
def test_files_say_what_the_live_model_says(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    save(model, tmp_path, tokenizer=False)
    live = study(model)
    found, skeleton, checkpoint = read(tmp_path)
    assert_same(found, live)
    axes = axes_of(live)
    stored = checkpoint.tensors
    assert names_on_disk(skeleton, axes, stored) == names_on_disk(model, axes, stored)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


@pytest.mark.contract
@quiet
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_oss", "qwen3_next", "gemma4_text-moe", "deepseek_v3"])
def test_tensors_that_share_memory_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blueprint, "_SHARED", 0)
    model = model_of(name)
    save(model, tmp_path, tokenizer=False)
    assert_same(read(tmp_path)[0], study(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2", "olmo2"])
def test_no_weights_are_read_but_norms(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    @contextmanager
    def watched(info: TensorInfo, **options: Any) -> Iterator[Any]:
        opened.append(info.name)
        with open_tensor(info) as reader:
            yield reader

    save(model_of(name), tmp_path, tokenizer=False)
    monkeypatch.setattr(blueprint, "open_tensor", watched)
    anatomy = read(tmp_path)[0]
    norms = {f"{norm}.weight" for writer in anatomy.writers for norm in writer.post_norms}
    assert set(opened) == norms
    assert bool(norms) == (name in ("gemma2", "olmo2"))


@pytest.mark.parametrize("chosen", [2, 18])
def test_more_experts_than_the_narrow_copy_has(chosen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"num_local_experts": 24, "intermediate_size": 96, "num_experts_per_tok": chosen}
    model = dataclasses.replace(ZOO["mixtral"], changes=changes).model()
    save(model, tmp_path, tokenizer=False)
    studied: list[Any] = []

    def watched(copy: Any, **options: Any) -> Anatomy:
        studied.append(copy)
        return study(copy)

    monkeypatch.setattr(blueprint, "study", watched)
    found, skeleton, checkpoint = read(tmp_path)
    assert_same(found, study(model))
    name = "model.layers.0.mlp.experts.down_proj"
    assert skeleton.get_parameter(name).shape == (24, D_MODEL, 96)
    assert studied[0].get_parameter(name).shape == (max(16, chosen), D_MODEL, 64)
    assert len(names_on_disk(skeleton, {name: 1}, checkpoint.tensors)[name]) == 24


def test_nothing_that_others_see_is_changed(tmp_path: Path) -> None:
    save(BY_NAME["llama"].model(), tmp_path, tokenizer=False)
    state, dtype, made = torch.get_rng_state(), torch.get_default_dtype(), torch.empty
    read(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert torch.empty is made
    assert not torch.equal(torch.zeros(600, 600), torch.ones(600, 600))  # what is made afterwards shares nothing


def test_architecture_that_does_not_close_stops(tmp_path: Path) -> None:
    transformers.AutoConfig.for_model("openai-gpt", n_embd=D_MODEL, n_layer=2, n_head=4).save_pretrained(tmp_path)
    with pytest.raises(AnatomyError, match=r"transformer\.h\.0 .*not every writer"):
        study_files("model", _empty(tmp_path))


def test_configuration_that_makes_no_model_is_an_error(tmp_path: Path) -> None:
    for text in ('{"model_type": "never-seen"}', '{"model_type": "llama", "hidden_size": "wide"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"model 'mine': .* configuration"):
            study_files("mine", _empty(tmp_path))


def _empty(folder: Path) -> Any:
    """A checkpoint of which only the folder is looked at."""
    return types.SimpleNamespace(folder=folder, tensors={})


# --- a toy whose modules are of the kinds that transformers' own models avoid


class ToyConfig(PretrainedConfig):
    model_type = "toy-on-disk"

    def __init__(self, num_experts: int = 20, **kwargs: Any) -> None:
        self.hidden_size = D_MODEL
        self.num_hidden_layers = 2
        self.num_experts = num_experts
        self.vocab_size = VOCAB
        super().__init__(**kwargs)


class ToyBlock(nn.Module):
    """A map in a sequence, experts in a list, a gate and a map that start at zero."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(d, 30), nn.Tanh(), nn.Linear(30, d))
        self.router = nn.Linear(d, config.num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 10), nn.Linear(10, d)) for _ in range(config.num_experts)
        )
        self.gated, self.gate = nn.Linear(d, d), nn.Parameter(torch.zeros(1))
        self.fresh = nn.Linear(d, d)
        nn.init.zeros_(self.fresh.weight)
        nn.init.zeros_(self.fresh.bias)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        routed = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            routed[chosen == expert] = self.experts[expert](x[chosen == expert])
        written = self.mlp(x) + routed + torch.tanh(self.gate) * self.gated(torch.sin(x))
        out: Tensor = x + written + self.fresh(torch.cos(x))
        return out


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.strata = nn.ModuleList(ToyBlock(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    @classmethod
    def from_config(cls, config: ToyConfig, **_: Any) -> ToyModel:
        return cls(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        stream: Any = self.embedding(input_ids)
        for block in self.strata:
            stream = block(stream)
        return BaseModelOutput(last_hidden_state=stream)


@pytest.mark.parametrize("experts", [4, 20])
def test_sequences_lists_and_what_starts_at_zero_are_found(
    experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ToyConfig(num_experts=experts)
    monkeypatch.setattr(blueprint, "_config", lambda *_: config)
    monkeypatch.setattr(blueprint, "auto_class", lambda _: ToyModel)
    model = randomise(ToyModel(config)).eval()
    save(model, tmp_path, tokenizer=False)
    found, _, _ = read(tmp_path)
    assert_same(found, study(model))
    block = {writer.weight: writer.kind for writer in found.writers if writer.block == 1}
    listed = [f"strata.1.experts.{i}.1.weight" for i in range(experts)]
    assert [name for name, kind in block.items() if kind is Kind.EXPERTS] == listed
    assert set(block) - set(listed) == {f"strata.1.{name}.weight" for name in ("mlp.2", "gated", "fresh")}


# --- what it costs

_MEASURED = """
import resource, sys, tempfile
import torch, transformers
from pathlib import Path
from types import SimpleNamespace
from abliterate.model.anatomy.offline import study_files
from abliterate.monitor import peak_memory

torch.set_num_threads(1)
config = transformers.AutoConfig.for_model(
    "mixtral", hidden_size=2048, num_hidden_layers=24, num_local_experts=8, intermediate_size=4096,
    num_attention_heads=16, num_key_value_heads=8, vocab_size=32000,
)
with tempfile.TemporaryDirectory() as folder:
    config.save_pretrained(folder)
    anatomy, skeleton = study_files("model", SimpleNamespace(folder=Path(folder), tensors={}))
used = resource.getrusage(resource.RUSAGE_SELF)
parameters = sum(parameter.numel() for parameter in skeleton.parameters())
print(len(anatomy.writers), parameters, used.ru_utime + used.ru_stime, peak_memory() // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of a child is counted from its parent's")
def test_large_model_costs_little() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _MEASURED], capture_output=True, text=True, check=True)
    writers, parameters, seconds, kilobytes = map(float, done.stdout.split())
    assert writers == 1 + 2 * 24
    assert parameters > 5e9  # 20 GB in float32
    assert seconds < 15
    assert kilobytes < 700 * 1024
