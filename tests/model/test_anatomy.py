"""Every writer is found and proved, whatever the architecture; what is not understood stops and names the block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from abliterate.errors import AnatomyError, CheckpointError, NumericalError
from abliterate.files.checkpoint import open_checkpoint
from abliterate.model.anatomy import Anatomy, Kind, Stored, Writer, find_blocks, names_on_disk, study, unclaimed
from families import BLOCKS, BY_NAME, D_MODEL, FAMILIES, VOCAB, Family, randomise, save
from zoo import ENTRIES

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
#: Models that are given up on talk about kernels that are not installed.
quiet = pytest.mark.filterwarnings("ignore")

ZOO = {str(entry): entry for entry in ENTRIES}


#: Families whose embedding itself multiplies the rows that it looks up by the root of the width.
SCALED = ("gemma", "gemma2", "gemma3_text")


@cache
def of_family(name: str) -> tuple[Any, Anatomy]:
    """A family's model, which nobody may change, and what is known of it."""
    model = BY_NAME[name].model()
    return model, study(model)


@cache
def of_zoo(name: str) -> tuple[Any, Anatomy]:
    """The same for a model of the zoo."""
    model = ZOO[name].model()
    return model, study(model)


def axes_of(anatomy: Anatomy) -> dict[str, int]:
    """The stream's axis in memory of every parameter that a writer has."""
    weights = {w.weight: w.axis for w in anatomy.writers if w.weight is not None}
    return weights | {w.bias: -1 for w in anatomy.writers if w.bias is not None}


def described(anatomy: Anatomy) -> list[Writer]:
    """The writers without numbers, to be compared."""
    return [dataclasses.replace(writer, gain=None, inner=1.0, multiplier=1.0) for writer in anatomy.writers]


def inside(anatomy: Anatomy, block: int) -> dict[str, str]:
    """Names of the writers of a block → kind and axis."""
    prefix = anatomy.blocks[block] + "."
    return {
        (writer.weight or writer.bias or writer.module).removeprefix(prefix): f"{writer.kind}@{writer.axis}"
        for writer in anatomy.writers
        if writer.block == block
    }


# --- families of which all is known


@pytest.mark.contract
@each_family
def test_books_close_and_every_writer_is_named(family: Family) -> None:
    _, anatomy = of_family(family.name)
    assert max(anatomy.closure) < 1e-5
    assert len(anatomy.closure) == 1 + BLOCKS
    assert anatomy.d_model == D_MODEL
    assert anatomy.layers == BLOCKS
    assert anatomy.blocks == tuple(f"{family.blocks}.{i}" for i in range(BLOCKS))
    assert [writer.module for writer in anatomy.writers] == list(family.writers)


@each_family
def test_writers_are_described_as_they_are(family: Family) -> None:
    _, anatomy = of_family(family.name)
    embeddings = anatomy.writers[: len(family.embeddings)]
    for i, writer in enumerate(embeddings):
        assert (writer.kind, writer.block, writer.axis, writer.bias) == (Kind.EMBEDDING, None, 1, None)
        assert writer.multiplier == pytest.approx(family.embedding_multiplier, abs=1e-5)
        assert writer.inner == pytest.approx(D_MODEL**0.5 if family.model_type in SCALED else 1.0, abs=1e-5)
        assert writer.tied == (family.tied and i == 0)
        assert writer.post_norms == ()
    for i, writer in enumerate(anatomy.writers[len(embeddings) :]):
        block, part = divmod(i, 2)
        assert (writer.kind, writer.block) == ((Kind.ATTENTION, Kind.MLP)[part], block)
        assert (writer.axis, writer.tied) == (family.axis, False)
        scaled = block == 0 and not writer.post_norms  # where a constant may have to be put
        assert writer.multiplier == pytest.approx(family.multiplier if scaled else 1.0, abs=1e-5)
        norms = (f"{family.blocks}.{block}.{family.post_norms[part]}",) if family.post_norms else ()
        assert writer.post_norms == norms
        assert (writer.gain is not None) == bool(norms)
        bias = (f"{writer.module}.bias",) if family.bias[part] else ()
        assert writer.parameters == (f"{writer.module}.weight", *bias)


@each_family
def test_gain_of_a_post_norm_explains_what_it_does(family: Family) -> None:
    model, anatomy = of_family(family.name)
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0))
    for writer in anatomy.writers:
        for name in writer.post_norms:
            assert writer.gain is not None
            assert not writer.centred
            assert writer.gain.std() > 0.05  # a forgotten gain would show
            expected = writer.gain * x / x.square().mean(-1, keepdim=True).sqrt()
            torch.testing.assert_close(model.get_submodule(name)(x), expected, rtol=1e-4, atol=1e-4)


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_closes_with_the_same_writers(family: Family, dtype: torch.dtype) -> None:
    anatomy = study(family.model().to(dtype))
    assert [writer.module for writer in anatomy.writers] == list(family.writers)
    assert max(anatomy.closure[1:]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [0.01, 0.0])
def test_positions_that_are_small_or_zero_write_all_the_same(size: float, dtype: torch.dtype) -> None:
    model = BY_NAME["gpt2"].model()
    model.transformer.wpe.weight.mul_(size)  # less than what bfloat16 rounds off the tokens' embeddings
    writers = study(model.to(dtype)).writers
    assert [writer.module for writer in writers[:2]] == ["transformer.wte", "transformer.wpe"]


# --- other architectures: nothing is known of them beforehand

_ATTENTION = {"self_attn.o_proj.weight": "attention@0"}
_DENSE = {"mlp.down_proj.weight": "mlp@0"}
_FUSED = {"mlp.experts.down_proj": "experts@1"}
_SHARED = {"mlp.shared_expert.down_proj.weight": "mlp@0"}
_BIASED = {**_ATTENTION, "self_attn.o_proj.bias": "attention@0"}

#: Model of the zoo → block → its writers.
FOUND: Mapping[str, Mapping[int, Mapping[str, str]]] = {
    "mixtral": {0: {**_ATTENTION, **_FUSED}},
    "gpt_oss": {2: {**_ATTENTION, "mlp.experts.down_proj": "experts@2"}},
    "llama4": {
        0: {**_ATTENTION, "feed_forward.down_proj.weight": "mlp@0"},
        1: {
            **_ATTENTION,
            "feed_forward.experts.down_proj": "experts@2",
            "feed_forward.shared_expert.down_proj.weight": "mlp@0",
        },
    },
    "dbrx": {1: {"norm_attn_norm.attn.out_proj.weight": "attention@0", "ffn.experts.mlp.w2": "experts@1"}},
    "qwen2_moe": {0: {**_ATTENTION, **_DENSE}, 1: {**_ATTENTION, **_FUSED, **_SHARED}},  # a gate for each token
    "qwen3_next": {0: {"linear_attn.out_proj.weight": "attention@0", **_DENSE}, 1: {**_ATTENTION, **_FUSED, **_SHARED}},
    "deepseek_v3": {1: {**_ATTENTION, **_FUSED, "mlp.shared_experts.down_proj.weight": "mlp@0"}},
    "jetmoe": {
        0: {
            "self_attention.experts.output_linear.weight": "experts@1",
            "self_attention.experts.bias": "attention@0",
            "mlp.output_linear.weight": "experts@1",
            "mlp.bias": "mlp@0",
        }
    },
    "mamba": {0: {"mixer.out_proj.weight": "state_space@0"}},
    "lfm2": {0: {"conv.out_proj.weight": "state_space@0", "feed_forward.w2.weight": "mlp@0"}},
    "falcon_h1": {
        1: {
            "feed_forward.down_proj.weight": "mlp@0",
            "mamba.out_proj.weight": "state_space@0",
            "self_attn.o_proj.weight": "attention@0",
        }
    },
    "recurrent_gemma": {
        0: {"temporal_block.linear_out.weight": "state_space@0", "mlp_block.down_proj.weight": "mlp@0"},
        1: {"temporal_block.o_proj.weight": "attention@0", "mlp_block.down_proj.weight": "mlp@0"},
    },
    "zamba2": {  # what its shared block gives goes into mamba, not into the stream
        0: {"mamba.out_proj.weight": "state_space@0"},
        1: {"mamba_decoder.mamba.out_proj.weight": "state_space@0"},
    },
    "gemma4_text-moe": {
        0: {
            **_ATTENTION,
            **_DENSE,
            "per_layer_projection.weight": "mlp@0",
            "experts.down_proj": "experts@1",
        }
    },
    "deepseek_v4": {  # several streams side by side
        0: {
            "self_attn.o_b_proj.weight": "attention@0",
            **_FUSED,
            "mlp.shared_experts.down_proj.weight": "mlp@0",
        }
    },
    "gemma3": {0: {**_ATTENTION, **_DENSE}},  # text and images
    "qwen2_5_vl": {0: {**_ATTENTION, **_DENSE}},
}


@pytest.mark.contract
@quiet
@pytest.mark.parametrize("name", FOUND)
def test_writers_of_an_architecture_are_found_by_trial(name: str) -> None:
    _, anatomy = of_zoo(name)
    for block, writers in FOUND[name].items():
        assert inside(anatomy, block) == writers
    assert max(anatomy.closure) < 1e-5


_READS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv",
    "query",
    "key",
    "value",
    "router",
    "gate",
    "up_proj",
    "in_proj",
    "w1",
    "w3",
)


@quiet
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_bigcode", "phimoe", "olmoe", "minimax_m2", *FOUND])
def test_maps_that_only_read_are_not_writers(name: str) -> None:
    for parameter in axes_of(of_zoo(name)[1]):
        leaves = parameter.split(".")[-2:]
        assert not [leaf for leaf in leaves if leaf.startswith(_READS)], parameter


@pytest.mark.parametrize(
    ("name", "module", "kind"),
    [
        ("granitemoeshared", "block_sparse_moe.experts", Kind.EXPERTS),  # in a class named after what is shared
        ("granitemoeshared", "shared_mlp.output_linear", Kind.MLP),
        ("seed_oss", "mlp.down_proj", Kind.MLP),  # SeedOssMLP is no state-space model
        ("recurrent_gemma", "mlp_block.down_proj", Kind.MLP),
    ],
)
def test_kind_is_read_from_names_before_classes(name: str, module: str, kind: Kind) -> None:
    anatomy = study(ZOO[name].model())
    (found,) = (writer.kind for writer in anatomy.writers if writer.module == f"{anatomy.blocks[0]}.{module}")
    assert found is kind


@quiet
@pytest.mark.parametrize("name", FOUND)
def test_verdict_does_not_depend_on_the_seed(name: str) -> None:
    model, anatomy = of_zoo(name)
    expected = described(anatomy)
    assert all(described(study(model, seed=seed)) == expected for seed in (1, 2))


@quiet
@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_study_leaves_the_model_as_it_was(name: str, dtype: torch.dtype) -> None:
    model = ZOO[name].model().to(dtype)
    before = {key: (tensor, tensor.clone()) for key, tensor in model.state_dict().items()}
    parameters = {key: (id(parameter), parameter.data_ptr()) for key, parameter in model.named_parameters()}
    study(model)
    assert all(torch.equal(tensor, copy) and tensor.dtype == copy.dtype for tensor, copy in before.values())
    assert {key: (id(parameter), parameter.data_ptr()) for key, parameter in model.named_parameters()} == parameters
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_study_is_reproducible() -> None:
    model = BY_NAME["granite"].model()
    first, again = study(model), study(model)
    assert described(again) == described(first)
    assert again.closure == pytest.approx(first.closure, rel=1e-3)


def test_norms_one_behind_the_other_have_one_gain() -> None:
    model = ZOO["gemma4_text-moe"].model()
    writers = {writer.module: writer for writer in study(model).writers}
    mlp = writers["model.layers.1.mlp.down_proj"]
    expected = [f"model.layers.1.post_feedforward_layernorm{end}" for end in ("_1", "")]
    assert mlp.post_norms == tuple(expected)
    assert mlp.gain is not None
    x = torch.randn(4, D_MODEL, generator=torch.Generator().manual_seed(0))
    through = x
    for name in mlp.post_norms:
        through = model.get_submodule(name)(through)
    ratio = through / (mlp.gain * x)  # one number for each token
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-4)


def test_norm_of_the_embedding_stands_between_and_its_bias_writes() -> None:
    embedding, bias = study(ZOO["bloom"].model()).writers[:2]
    norm = "transformer.word_embeddings_layernorm"
    assert (embedding.weight, embedding.post_norms) == ("transformer.word_embeddings.weight", (norm,))
    assert embedding.centred
    assert (bias.module, bias.kind, bias.parameters) == (norm, Kind.EMBEDDING, (f"{norm}.bias",))


def test_projected_embedding_writes_through_its_projection() -> None:
    first, second, *_ = study(BY_NAME["opt"].model(word_embed_proj_dim=32)).writers
    assert {first.module, second.module} == {"model.decoder.embed_positions", "model.decoder.project_in"}
    assert {(w.module.rpartition(".")[2], w.axis) for w in (first, second)} == {
        ("embed_positions", 1),
        ("project_in", 0),
    }


def test_fixed_positions_are_a_writer_without_parameters() -> None:
    embedding, positions = study(ZOO["xglm"].model()).writers[:2]
    assert (embedding.module, positions.module) == ("model.embed_tokens", "model.embed_positions")
    assert positions.parameters == ()


def test_text_half_of_a_model_of_images_is_studied() -> None:
    anatomy = study(ZOO["gemma3"].model())
    assert all("language_model" in name for name in anatomy.blocks)
    assert not [writer.module for writer in anatomy.writers if "vision" in writer.module]


# --- the right axis when shapes do not tell


@pytest.mark.parametrize(
    ("name", "size", "axis"),
    [("mixtral", "intermediate_size", 1), ("gpt_oss", "intermediate_size", 2), ("llama4_text", "intermediate_size", 2)],
)
@pytest.mark.parametrize("experts", [4, D_MODEL], ids=["4 experts", "as many experts as the stream is wide"])
def test_square_experts_have_the_axis_that_the_code_gives_them(
    name: str, size: str, axis: int, experts: int, tmp_path: Path
) -> None:
    changes = {size: D_MODEL, "num_local_experts": experts}
    entry = dataclasses.replace(ZOO[name], changes=changes)
    model = entry.model()
    anatomy = study(model)
    weights = [writer for writer in anatomy.writers if writer.kind is Kind.EXPERTS]
    assert weights
    for writer in weights:
        assert writer.weight is not None
        assert model.get_parameter(writer.weight).shape == (experts, D_MODEL, D_MODEL)
        assert writer.axis == axis
        assert "down_proj" in writer.weight
    model.save_pretrained(tmp_path)
    check_places(model, anatomy, load_file(tmp_path / "model.safetensors"))


def test_square_maps_are_written_on_the_side_of_their_class() -> None:
    for name, axis in (("llama", 0), ("gpt2", 1)):
        changes = {"intermediate_size": D_MODEL} if name == "llama" else {"n_inner": D_MODEL}
        model = BY_NAME[name].model(**changes)
        writers = study(model).writers
        square = [w for w in writers if w.weight and model.get_parameter(w.weight).shape == (D_MODEL, D_MODEL)]
        assert len(square) == 2 * BLOCKS
        assert {writer.axis for writer in square} == {axis}


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
    """Names say nothing here: `w2` goes in, `w1` out."""

    def __init__(self) -> None:
        super().__init__()
        self.w2 = nn.Linear(D_MODEL, D_MODEL)
        self.w1 = nn.Linear(D_MODEL, D_MODEL, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w1(torch.relu(self.w2(x)))
        return out


class ToyExperts(nn.Module):
    """A list of experts, most of which a short text never meets."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D_MODEL, 60)
        self.experts = nn.ModuleList(ToyFeedForward() for _ in range(60))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        chosen = self.router(x).argmax(-1)
        for expert in chosen.unique().tolist():
            out[chosen == expert] = self.experts[expert](x[chosen == expert])
        return out


class ToyBlock(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module], mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention = ToyMixer()
        self.feed_forward = mlp()
        self.norm_before = nn.LayerNorm(D_MODEL)
        self.norm_after = norm()

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + 0.5 * self.norm_after(self.attention(self.norm_before(hidden_states)))
        out: Tensor = hidden_states + 2.0 * self.feed_forward(hidden_states)
        return out


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"

    def __init__(
        self,
        config: ToyConfig,
        norm: Callable[[], nn.Module] = nn.Identity,
        mlp: Callable[[], nn.Module] = ToyFeedForward,
        between: Callable[[Tensor], Tensor] = lambda stream: stream,
    ) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCAB, D_MODEL)
        self.strata = nn.ModuleList([ToyBlock(norm, mlp) for _ in range(BLOCKS)])
        self.between = between
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        stream: Any = self.embedding(input_ids)
        for block in self.strata:
            stream = self.between(block(stream))
        return BaseModelOutput(last_hidden_state=stream)


def toy(**options: Any) -> Any:
    return randomise(ToyModel(ToyConfig(), **options)).eval()


def test_architecture_never_seen_needs_no_code() -> None:
    anatomy = study(toy())
    names = [f"strata.{i}.{name}" for i in range(BLOCKS) for name in ("attention.wo", "feed_forward.w1")]
    assert [writer.module for writer in anatomy.writers] == ["embedding", *names]
    attention, mlp = anatomy.writers[1:3]
    assert (attention.kind, attention.bias) == (Kind.ATTENTION, "strata.0.attention.wo.bias")
    assert (mlp.kind, mlp.bias) == (Kind.MLP, None)


def test_all_experts_of_a_list_are_writers_also_those_never_chosen() -> None:
    writers = [w for w in study(toy(mlp=ToyExperts)).writers if w.kind is Kind.EXPERTS and w.block == 1]
    assert [w.weight for w in writers] == [f"strata.1.feed_forward.experts.{i}.w1.weight" for i in range(60)]
    assert {w.axis for w in writers} == {0}


@pytest.mark.parametrize("biased", [False, True])
def test_centring_post_norm_is_recognised_and_its_bias_writes(biased: bool) -> None:
    writers = study(toy(norm=lambda: nn.LayerNorm(D_MODEL, bias=biased))).writers
    first = {writer.weight or writer.bias: writer for writer in writers if writer.block == 0}
    attention = first["strata.0.attention.wo.weight"]
    assert attention.post_norms == ("strata.0.norm_after",)
    assert attention.centred
    assert ("strata.0.norm_after.bias" in first) == biased
    if biased:
        bias = first["strata.0.norm_after.bias"]
        assert (bias.module, bias.post_norms, bias.gain) == ("strata.0.norm_after", (), None)


def test_nonlinear_function_after_a_writer_stops_and_names_it() -> None:
    with pytest.raises(AnatomyError, match=r"strata\.0.*'norm_after' \(Tanh\).*known writers: .*feed_forward\.w1"):
        study(toy(norm=nn.Tanh))


def test_writing_between_two_blocks_stops_and_scaling_tokens_does_not() -> None:
    with pytest.raises(AnatomyError, match=r"strata\.1: something is written .* between it and the block before"):
        study(toy(between=lambda stream: stream + 0.05))
    scaled = study(toy(between=lambda stream: 0.5 * stream / stream.norm(dim=-1, keepdim=True)))
    assert described(scaled) == described(study(toy()))


class Inlined(nn.Module):
    """Uses its map's weight without calling it; `residual` adds its own input."""

    def __init__(self, residual: float) -> None:
        super().__init__()
        self.hidden, self.proj = nn.Linear(D_MODEL, D_MODEL), nn.Linear(D_MODEL, D_MODEL)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        written = nn.functional.linear(torch.relu(self.hidden(x)), self.proj.weight, self.proj.bias)
        return self.residual * x + written


def test_map_that_is_never_called_is_hooked_where_it_is_used() -> None:
    writer = study(toy(mlp=lambda: Inlined(0.0))).writers[2]
    assert (writer.module, writer.weight) == ("strata.0.feed_forward", "strata.0.feed_forward.proj.weight")


def test_hooks_that_would_not_do_what_weights_do_stop() -> None:
    with pytest.raises(AnatomyError, match=r"strata\.0 .*hooks and as weights differ"):
        study(toy(mlp=lambda: Inlined(1.0)))


# --- one block that is not like the others


class Extended(LlamaDecoderLayer):
    """A block that adds something to the stream."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, *args, **kwargs) + self.get_submodule("extra")(hidden_states)


class Constant(nn.Module):
    def __init__(self, name: str, value: float) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.full((D_MODEL,), value)))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_parameter(self.name).expand_as(x)


def extended(extra: nn.Module, block: int) -> Any:
    model = BY_NAME["llama"].model()
    model.model.layers[block].add_module("extra", extra)
    model.model.layers[block].__class__ = Extended
    return model


@pytest.mark.parametrize("value", [0.0, 1e-6, 0.3])
def test_fresh_adapter_in_one_block_is_found_though_it_writes_nothing_yet(value: float) -> None:
    adapter = nn.Sequential(nn.Linear(D_MODEL, 4, bias=False), nn.Linear(4, D_MODEL, bias=False))
    for parameter in adapter[1].parameters():
        parameter.data.fill_(value)
    anatomy = study(extended(adapter, 1))
    assert "extra.1.weight" in inside(anatomy, 1)
    assert inside(anatomy, 0) == inside(anatomy, 2) == {**_ATTENTION, **_DENSE}


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_bias_of_one_block_alone_is_found(value: float) -> None:
    anatomy = study(extended(Constant("bias", value), 1))
    assert inside(anatomy, 1) == {**_ATTENTION, **_DENSE, "extra.bias": "mlp@0"}
    assert len(inside(anatomy, 0)) == len(inside(anatomy, 2)) == 2


def test_vector_that_nobody_knows_in_one_block_stops_and_names_that_block() -> None:
    with pytest.raises(AnatomyError, match=r"model\.layers\.1 .*known writers: self_attn\.o_proj, mlp\.down_proj$"):
        study(extended(Constant("shift", 0.05), 1))


@pytest.mark.parametrize("last", [nn.Tanh, nn.Softplus, nn.Hardtanh])
def test_adapter_with_a_curve_at_its_end_stops_and_names_that_block(last: Callable[[], nn.Module]) -> None:
    with pytest.raises(AnatomyError, match=r"model\.layers\.2 .*not every writer"):
        study(extended(nn.Sequential(nn.Linear(D_MODEL, D_MODEL), last()), 2))


def test_normed_stream_that_is_added_stops() -> None:
    norm = nn.RMSNorm(D_MODEL)
    norm.weight.data = 1 + 0.3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AnatomyError, match=r"model\.layers\.1 .*not every writer"):
        study(extended(norm, 1))


def test_damaged_numbers_stop() -> None:
    model = BY_NAME["llama"].model()
    model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(NumericalError, match=r"model\.layers\.1: expected finite numbers"):
        study(model)


# --- what stops

_NORM_ON_STREAM = "stands on the residual stream itself"

STOPPED: Mapping[str, str] = {
    "openai-gpt": rf"transformer\.h\.0 .*'ln_2' {_NORM_ON_STREAM}.*attn\.c_proj",
    "opt-post-norm": rf"model\.decoder\.layers\.0 .*'final_layer_norm' {_NORM_ON_STREAM}",
    "bert": rf"bert\.encoder\.layer\.0 .*'output\.LayerNorm' {_NORM_ON_STREAM}",
    "rwkv": r"rwkv\.blocks\.0 .*not every writer",
    "gemma3n_text": r"model\.layers\.0 .*not every writer",
    "longcat_flash": r"model\.layers\.0 .*not every writer.*self_attn\.0\.o_proj",
    "minimax": r"model\.layers\.0 .*not every writer",
    "doge": r"model\.layers\.0 .*not every writer",
    "qwen4_exp_text-ple": r"model\.layers\.\d .*not every writer",
    "ctrl": r"embedding \(input of block transformer\.h\.0\): it holds what no known embedding writes",
    "blt": r"block model\.local_decoder\.layers\.1: something is written",
    "mllama": r"block 1 \(MllamaCrossAttentionDecoderLayer\): was not called",
}


@quiet
@pytest.mark.parametrize("name", STOPPED)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_not_understood_stops_and_names_the_block(name: str, seed: int) -> None:
    with pytest.raises(AnatomyError, match=STOPPED[name]):
        study(ZOO[name].model(), seed=seed)


# --- names


def check_places(model: Any, anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Stored, ...]]:
    """Every parameter of every writer lies on disk where it is said to, number for number."""
    axes = axes_of(anatomy)
    places = names_on_disk(model, axes, tensors)
    assert list(places) == list(axes)
    for name, found in places.items():
        parameter = model.get_parameter(name).movedim(axes[name], -1)
        experts = [place.expert for place in found]
        assert experts in ([None], list(range(len(parameter))))
        for place in found:
            expected = parameter if place.expert is None else parameter[place.expert]
            assert place.parameter == name
            assert torch.equal(tensors[place.tensor].movedim(place.axis, -1), expected), place
    return places


def test_blocks_of_a_model_with_many_layers_are_not_mixed_up(tmp_path: Path) -> None:
    model = BY_NAME["llama"].model(num_hidden_layers=12)
    names, blocks = find_blocks(model)
    assert names == [f"model.layers.{i}" for i in range(12)]
    assert all(block is model.get_submodule(name) for name, block in zip(names, blocks, strict=True))
    anatomy = study(model)
    assert len({writer.module for writer in anatomy.writers}) == 1 + 2 * 12
    first = {name: 0 for writer in anatomy.writers if writer.block == 1 for name in writer.parameters}
    places = names_on_disk(model, first, open_checkpoint(save(model, tmp_path)).tensors)
    assert [place.tensor for found in places.values() for place in found] == [
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]


@pytest.mark.contract
@each_family
@pytest.mark.parametrize("prefixed", [True, False], ids=["with prefix", "prefix stripped"])
def test_every_writer_is_found_on_disk(family: Family, prefixed: bool, tmp_path: Path) -> None:
    model, anatomy = of_family(family.name)
    tensors = load_file(save(model, tmp_path, tokenizer=False) / "model.safetensors")
    if not prefixed:  # as the base model alone was saved, or as the first GPT-2 checkpoints are
        tensors = {name.removeprefix(model.base_model_prefix + "."): tensor for name, tensor in tensors.items()}
    check_places(model, anatomy, tensors)


@pytest.mark.contract
@quiet
@pytest.mark.parametrize("name", [*FOUND, "phimoe", "deepseek_v2", "qwen3_vl_moe", "granitemoe", "nemotron_h"])
def test_checkpoints_as_saved_and_as_in_memory_hold_the_same_parameters(name: str, tmp_path: Path) -> None:
    model, anatomy = of_zoo(name)
    model.save_pretrained(tmp_path)
    saved = check_places(model, anatomy, load_file(tmp_path / "model.safetensors"))
    fused = check_places(model, anatomy, dict(model.named_parameters()))
    assert list(saved) == list(fused)
    assert all(len(found) == 1 for found in fused.values())


def test_experts_stored_one_by_one_are_in_the_order_in_which_they_are_stacked(tmp_path: Path) -> None:
    model = dataclasses.replace(ZOO["mixtral"], changes={"num_local_experts": 12, "intermediate_size": D_MODEL}).model()
    model.save_pretrained(tmp_path)
    places = check_places(model, study(model), load_file(tmp_path / "model.safetensors"))
    tensors = [place.tensor for place in places["model.layers.1.mlp.experts.down_proj"]]
    # w1 and w3 are as square as w2, and 10 comes after 9, not after 1
    assert tensors == [f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight" for i in range(12)]


def test_experts_stored_the_other_way_round_are_mapped_to_the_other_axis() -> None:
    model = ZOO["qwen3_vl_moe"].model()
    anatomy = study(model)
    tensors = dict(model.state_dict())
    turned = [name for name in tensors if name.endswith("experts.down_proj")]
    tensors |= {name: tensors[name].mT.contiguous() for name in turned}
    places = check_places(model, anatomy, tensors)
    assert turned
    assert {place.axis for name in turned for place in places[name]} == {2}


@pytest.mark.parametrize("width", [32, 64], ids=["wide", "square"])
def test_packed_experts_have_the_stream_on_their_first_axis(width: int) -> None:
    changes = {"hidden_size": 64, "intermediate_size": width}
    model = dataclasses.replace(ZOO["gpt_oss"], changes=changes).model()
    anatomy = study(model)
    stored: dict[str, Any] = dict(model.state_dict())
    packed = [name for name in stored if name.endswith("experts.down_proj")]
    for name in packed:
        experts, n, d = stored.pop(name).shape
        stored[f"{name}_blocks"] = SimpleNamespace(shape=(experts, d, n // 32, 16))
        stored[f"{name}_scales"] = SimpleNamespace(shape=(experts, d, n // 32))
    places = names_on_disk(model, axes_of(anatomy), stored)
    for name in packed:
        assert places[name] == (Stored(name, f"{name}_blocks", 1),)
        assert places[f"{name}_bias"] == (Stored(f"{name}_bias", f"{name}_bias", 1),)


def test_parameter_of_several_blocks_has_one_tensor(tmp_path: Path) -> None:
    model = BY_NAME["llama"].model()
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".2.mlp.down_proj" not in name}
    places = check_places(model, study(model), tensors)
    assert places["model.layers.2.mlp.down_proj.weight"][0].tensor == "model.layers.1.mlp.down_proj.weight"


def shapes(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict())


def test_missing_tensor_is_an_error_that_names_it() -> None:
    model = BY_NAME["gpt2"].model()
    stored = shapes(model)
    del stored["transformer.h.1.mlp.c_proj.bias"]
    with pytest.raises(CheckpointError, match=r"'transformer\.h\.1\.mlp\.c_proj\.bias'.*found none"):
        names_on_disk(model, axes_of(study(model)), stored)


def test_missing_expert_is_an_error_that_names_the_parameter(tmp_path: Path) -> None:
    model = ZOO["mixtral"].model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.block_sparse_moe.experts.1.w2.weight"]
    with pytest.raises(CheckpointError, match=r"'model\.layers\.2\.mlp\.experts\.down_proj': expected exactly one"):
        names_on_disk(model, axes_of(study(model)), tensors)


def test_parameter_found_twice_is_an_error() -> None:
    model = BY_NAME["gpt2"].model()
    weight = model.transformer.wte.weight
    with pytest.raises(CheckpointError, match=r"exactly one tensor.*found transformer\.wte\.weight, wte\.weight"):
        names_on_disk(model, {"transformer.wte.weight": 1}, {"transformer.wte.weight": weight, "wte.weight": weight})


def test_tensor_of_another_shape_is_an_error_that_names_it() -> None:
    model = BY_NAME["llama"].model()
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(CheckpointError, match=rf"'{name}': expected shape \[48, 80\].*found \[48, 81\]"):
        names_on_disk(model, {name: 0}, {**shapes(model), name: torch.empty(48, 81)})


def test_writer_lists_what_an_edit_changes() -> None:
    writer = Writer("a.b", Kind.MLP, 0, "a.b.weight", 0, "a.b.bias")
    assert writer.parameters == ("a.b.weight", "a.b.bias")
    assert dataclasses.replace(writer, bias=None).parameters == ("a.b.weight",)
    assert dataclasses.replace(writer, weight=None, bias=None).parameters == ()


def test_stored_layers_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    """Layers for predicting more tokens ahead lie in some checkpoints, and transformers does not load them."""
    model = BY_NAME["llama"].model()
    stored = dict(open_checkpoint(save(model, tmp_path)).tensors)
    assert unclaimed(model, stored) == []
    more = {f"model.layers.{BLOCKS}.mlp.down_proj.weight": stored["model.layers.0.mlp.down_proj.weight"]}
    norm = {f"model.layers.{BLOCKS}.norm.weight": stored["model.norm.weight"]}
    assert unclaimed(model, stored | more | norm) == list(more)
