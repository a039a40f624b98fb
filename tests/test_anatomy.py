"""Every writer of every family is named and proved; what is not understood stops the run and names the block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from abliterate.anatomy import Anatomy, Kind, Writer, find_blocks, names_on_disk, study
from abliterate.checkpoint import open_checkpoint
from abliterate.errors import AnatomyError, CheckpointError
from families import (
    BLOCKS,
    BY_NAME,
    COMMON,
    D_MODEL,
    FAMILIES,
    VOCAB,
    WINDOW,
    Family,
    random_model,
    randomise,
    save,
)

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def parameters_of(anatomy: Anatomy) -> list[str]:
    return [name for writer in anatomy.writers for name in writer.parameters]


# --- what closes


@each_family
def test_books_close_and_every_writer_is_named(family: Family) -> None:
    anatomy = study(family.model())
    assert max(anatomy.closure) < 1e-5
    assert len(anatomy.closure) == 1 + BLOCKS
    assert anatomy.d_model == D_MODEL
    assert anatomy.layers == BLOCKS
    assert anatomy.blocks == tuple(f"{family.blocks}.{i}" for i in range(BLOCKS))
    assert [writer.module for writer in anatomy.writers] == list(family.writers)


@each_family
def test_writers_are_described_as_they_are(family: Family) -> None:
    anatomy = study(family.model())
    embeddings = anatomy.writers[: len(family.embeddings)]
    for i, writer in enumerate(embeddings):
        assert (writer.kind, writer.block, writer.axis, writer.bias) == (Kind.EMBEDDING, None, 1, False)
        assert writer.multiplier == pytest.approx(family.embedding_multiplier, abs=1e-5)
        assert writer.tied == (family.tied and i == 0)
        assert writer.post_norm is None
    for i, writer in enumerate(anatomy.writers[len(embeddings) :]):
        block, part = divmod(i, 2)
        assert (writer.kind, writer.block) == ((Kind.ATTENTION, Kind.MLP)[part], block)
        assert (writer.axis, writer.bias, writer.tied) == (family.axis, family.bias[part], False)
        assert writer.multiplier == pytest.approx(family.multiplier, abs=1e-5)
        norm = f"{family.blocks}.{block}.{family.post_norms[part]}" if family.post_norms else None
        assert writer.post_norm == norm
        assert (writer.gain is not None) == (norm is not None)


@each_family
def test_gain_of_a_post_norm_explains_what_it_does(family: Family) -> None:
    model = family.model()
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0))
    for writer in study(model).writers:
        if writer.post_norm is None:
            continue
        assert writer.gain is not None
        assert not writer.centred
        assert writer.gain.std() > 0.05  # a forgotten gain would show
        expected = writer.gain * x / x.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(model.get_submodule(writer.post_norm)(x), expected, rtol=1e-4, atol=1e-4)


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_closes_with_the_same_writers(family: Family, dtype: torch.dtype) -> None:
    anatomy = study(family.model().to(dtype))
    assert [writer.module for writer in anatomy.writers] == list(family.writers)
    assert max(anatomy.closure[1:]) < 1e-3


def test_study_leaves_the_model_as_it_was() -> None:
    model = BY_NAME["gemma2"].model().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    study(model)
    after = model.state_dict()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_study_is_reproducible_and_its_seed_does_not_matter() -> None:
    model = BY_NAME["granite"].model()
    first, again, other = study(model), study(model), study(model, seed=7)
    assert again.closure == pytest.approx(first.closure, rel=1e-3)
    assert [w.module for w in other.writers] == [w.module for w in first.writers]


# --- a toy architecture nobody has seen


class ToyConfig(PretrainedConfig):
    model_type = "toy-never-seen"

    def __init__(self, **kwargs: Any) -> None:
        self.hidden_size = D_MODEL
        self.num_hidden_layers = BLOCKS
        self.vocab_size = VOCAB
        super().__init__(**kwargs)


class ToyMixer(nn.Module):
    """A causal running mean with a gate: no attention as we know it."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards = nn.Linear(D_MODEL, D_MODEL)
        self.wo = nn.Linear(D_MODEL, D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[None, :, None]
        out: Tensor = self.wo(torch.tanh(self.inwards(x)).cumsum(1) / count)
        return out


class ToyFeedForward(nn.Module):
    def __init__(self, gate: str) -> None:
        super().__init__()
        self.gate = gate
        self.add_module(gate, nn.Linear(D_MODEL, D_MODEL))
        self.w2 = nn.Linear(D_MODEL, D_MODEL, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(torch.relu(self.get_submodule(self.gate)(x)))
        return out


class ToyBlock(nn.Module):
    def __init__(self, gate: str, norm: Callable[[], nn.Module] | None) -> None:
        super().__init__()
        self.attention = ToyMixer()
        self.feed_forward = ToyFeedForward(gate)
        self.norm_before = nn.LayerNorm(D_MODEL)
        self.norm_after = norm() if norm else nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + 0.5 * self.norm_after(self.attention(self.norm_before(hidden_states)))
        out: Tensor = hidden_states + 2.0 * self.feed_forward(hidden_states)
        return out


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"

    def __init__(self, config: ToyConfig, gate: str = "w1", norm: Callable[[], nn.Module] | None = None) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCAB, D_MODEL)
        self.strata = nn.ModuleList([ToyBlock(gate, norm) for _ in range(BLOCKS)])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        stream: Any = self.embedding(input_ids)
        for block in self.strata:
            stream = block(stream)
        return BaseModelOutput(last_hidden_state=stream)


def toy(**options: Any) -> Any:
    return randomise(ToyModel(ToyConfig(), **options)).eval()


def test_architecture_never_seen_needs_no_code() -> None:
    anatomy = study(toy())
    inside = [f"strata.{i}.{name}" for i in range(BLOCKS) for name in ("attention.wo", "feed_forward.w2")]
    assert [writer.module for writer in anatomy.writers] == ["embedding", *inside]
    attention, mlp = anatomy.writers[1:3]
    assert (attention.kind, attention.bias) == (Kind.ATTENTION, True)
    assert (mlp.kind, mlp.bias) == (Kind.MLP, False)
    assert attention.multiplier == pytest.approx(0.5, abs=1e-5)
    assert mlp.multiplier == pytest.approx(2.0, abs=1e-5)


def test_map_with_a_writers_name_that_does_not_write_is_not_a_writer() -> None:
    anatomy = study(toy(gate="dense"))  # [d, d], named like an output map, but it only feeds w2
    assert not [writer.module for writer in anatomy.writers if writer.module.endswith(".dense")]
    assert len(anatomy.writers) == 1 + 2 * BLOCKS


def test_centring_post_norm_is_recognised() -> None:
    anatomy = study(toy(norm=lambda: nn.LayerNorm(D_MODEL, bias=False)))
    writer = anatomy.writers[1]
    assert writer.post_norm == "strata.0.norm_after"
    assert writer.centred
    assert writer.multiplier == pytest.approx(0.5, abs=1e-5)


def test_post_norm_with_a_bias_stops_and_names_it() -> None:
    with pytest.raises(AnatomyError, match=r"strata\.0.*'norm_after'.*bias"):
        study(toy(norm=lambda: nn.LayerNorm(D_MODEL)))


def test_nonlinear_function_after_a_writer_stops_and_names_it() -> None:
    with pytest.raises(AnatomyError, match=r"strata\.0.*'norm_after'.*Tanh"):
        study(toy(norm=nn.Tanh))


# --- what stops


def config(model_type: str, **options: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**COMMON, **options})


_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mixtral": (
        lambda: config("mixtral", num_local_experts=4, num_experts_per_tok=2),
        r"model\.layers\.0 .*mixture-of-experts.*experts\.down_proj",
    ),
    "qwen2-moe": (
        lambda: config("qwen2_moe", shared_expert_intermediate_size=24, decoder_sparse_step=1, **_EXPERTS),
        r"model\.layers\.0 .*mixture-of-experts.*experts\.down_proj",
    ),
    "qwen3-moe": (
        lambda: config("qwen3_moe", head_dim=16, **_EXPERTS),
        r"model\.layers\.0 .*mixture-of-experts.*experts\.down_proj",
    ),
    "qwen3-moe with one dense layer": (
        lambda: config("qwen3_moe", head_dim=16, mlp_only_layers=[0], **_EXPERTS),
        r"model\.layers\.1 .*mixture-of-experts",
    ),
    "gpt-oss": (
        lambda: config("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16),
        r"model\.layers\.0 .*mixture-of-experts",
    ),
    "mamba": (
        lambda: config("mamba", state_size=4, expand=2, conv_kernel=4, time_step_rank=4),
        r"backbone\.layers\.0 .*state-space",
    ),
    "qwen3-next": (
        lambda: config(
            "qwen3_next",
            shared_expert_intermediate_size=24,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            head_dim=16,
            layer_types=["full_attention", "linear_attention", "full_attention"],
            **_EXPERTS,
        ),
        r"model\.layers\.1 .*at linear_attn.*state-space and linear-attention",
    ),
    "lfm2": (
        lambda: config("lfm2", layer_types=["full_attention", "conv", "conv"]),
        r"model\.layers\.1 .*Lfm2ShortConv at conv",
    ),
    "openai-gpt": (
        lambda: config("openai-gpt", n_embd=D_MODEL, n_layer=BLOCKS, n_head=4),
        r"transformer\.h\.0 .*not every writer",
    ),
    "gemma4": (
        lambda: config("gemma4_text", vocab_size_per_layer_input=VOCAB, head_dim=16, sliding_window=WINDOW),
        r"model\.layers\.0 .*not every writer",
    ),
    "bamba": (
        lambda: config(
            "bamba", attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=24, mamba_d_state=8, mamba_n_groups=1
        ),
        r"model\.layers\.0 .*recurrent state",
    ),
    "opt with norms behind": (
        lambda: BY_NAME["opt"].config(do_layer_norm_before=False),
        r"model\.decoder\.layers\.0 .*not every writer",
    ),
    "opt with a projected embedding": (
        lambda: BY_NAME["opt"].config(word_embed_proj_dim=32),
        r"embedding \(input of block model\.decoder\.layers\.0\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")  # models given up on talk about kernels that are not installed
def test_what_is_not_understood_stops_and_names_the_block(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(AnatomyError, match=message):
        study(random_model(make()))


def test_multimodal_model_stops_and_names_the_tower() -> None:
    vision = {**_VISION, "vision_use_head": False}
    text = {**COMMON, "head_dim": 16, "sliding_window": WINDOW, "model_type": "gemma3_text"}
    both = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    with pytest.raises(AnatomyError, match=r"vision_tower.*multimodal"):
        study(randomise(transformers.Gemma3ForConditionalGeneration(both)).eval())


class StreamBias(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """A block that adds a learned vector to the stream."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) + self.get_parameter("stream_bias")


class StreamAdapter(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """A block with an adapter that nobody knows."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, *args, **kwargs) + self.get_submodule("weird")(hidden_states)


def test_unknown_writer_in_one_block_stops_and_names_that_block() -> None:
    model = BY_NAME["llama"].model()
    block = model.model.layers[1]
    block.register_parameter("stream_bias", nn.Parameter(torch.full((D_MODEL,), 0.05)))
    block.__class__ = StreamBias
    with pytest.raises(AnatomyError, match=r"model\.layers\.1 .*known writers: self_attn\.o_proj, mlp\.down_proj$"):
        study(model)


def test_unknown_adapter_in_one_block_stops_and_names_that_block() -> None:
    model = BY_NAME["llama"].model()
    block = model.model.layers[2]
    block.add_module("weird", nn.Linear(D_MODEL, D_MODEL))
    block.__class__ = StreamAdapter
    with pytest.raises(AnatomyError, match=r"model\.layers\.2 .*not every writer"):
        study(model)


# --- names


def test_blocks_of_a_model_with_many_layers_are_not_mixed_up(tmp_path: Path) -> None:
    model = BY_NAME["llama"].model(num_hidden_layers=12)
    names, blocks = find_blocks(model)
    assert names == [f"model.layers.{i}" for i in range(12)]
    assert all(block is model.get_submodule(name) for name, block in zip(names, blocks, strict=True))
    anatomy = study(model)
    assert len({writer.module for writer in anatomy.writers}) == 1 + 2 * 12
    first = [name for writer in anatomy.writers if writer.block == 1 for name in writer.parameters]
    stored = list(open_checkpoint(save(model, tmp_path)).tensors)
    assert set(names_on_disk(model, first, stored).values()) == {
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }


@each_family
@pytest.mark.parametrize("prefixed", [True, False], ids=["with prefix", "prefix stripped"])
def test_every_writer_is_found_on_disk(family: Family, prefixed: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = family.model()
    tensors = load_file(save(model, tmp_path) / "model.safetensors")
    if not prefixed:  # as the base model alone was saved, or as the first GPT-2 checkpoints are
        tensors = {name.removeprefix(model.base_model_prefix + "."): tensor for name, tensor in tensors.items()}
    wanted = parameters_of(study(model))
    names = names_on_disk(model, wanted, list(tensors))
    assert list(names) == wanted
    for parameter, tensor in names.items():
        assert torch.equal(tensors[tensor], model.get_parameter(parameter)), parameter


def test_missing_tensor_is_an_error_that_names_it() -> None:
    model = BY_NAME["gpt2"].model()
    wanted = parameters_of(study(model))
    stored = [name for name in model.state_dict() if name != "transformer.h.1.mlp.c_proj.bias"]
    with pytest.raises(CheckpointError, match=r"'transformer\.h\.1\.mlp\.c_proj\.bias'.*found none"):
        names_on_disk(model, wanted, stored)


def test_parameter_found_twice_is_an_error() -> None:
    model = BY_NAME["gpt2"].model()
    with pytest.raises(CheckpointError, match=r"exactly one tensor.*found transformer\.wte\.weight, wte\.weight"):
        names_on_disk(model, ["transformer.wte.weight"], ["transformer.wte.weight", "wte.weight"])


def test_tensor_matched_by_two_parameters_is_an_error() -> None:
    model = BY_NAME["gpt2"].model()
    with pytest.raises(CheckpointError, match=r"'wte\.weight'.*found several"):
        names_on_disk(model, ["transformer.wte.weight", "wte.weight"], ["wte.weight"])


def test_writer_lists_what_an_edit_changes() -> None:
    writer = Writer("a.b", Kind.MLP, 0, 0, bias=True)
    assert writer.parameters == ("a.b.weight", "a.b.bias")
    assert dataclasses.replace(writer, bias=False).parameters == ("a.b.weight",)
