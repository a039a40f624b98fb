"""Tiny random models of many families, a byte-level tokenizer, and checkpoints of them: no network, no download.

Every parameter is drawn at random, norms and biases too: an edit that forgets a gain or a bias must show.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

BLOCKS = 3
D_MODEL = 48
#: 256 bytes and the special tokens; see `byte_tokenizer`.
VOCAB = 264
#: Sliding windows are shorter than most prompts of the tests.
WINDOW = 8

BOS, EOS, PAD, END, USER, ASSISTANT, SYSTEM = range(256, 263)
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<unk>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 80,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}


#: Families whose attention (soft-capping, or old code) exists only as plain matrix products.
_EAGER = ("gemma2", "gpt_neo", "gptj", "mpt")


@dataclass(frozen=True, slots=True)
class Family:
    """One configuration, and what its anatomy must turn out to be.

    `attention` and `mlp` are the names of the writers below a block, `post_norms` those of the norms after them.
    `window` is the length of its sliding window, where it has one.
    """

    name: str
    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    blocks: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    attention: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    post_norms: tuple[str, str] | None = None
    axis: int = 0
    bias: tuple[bool, bool] = (False, False)
    embedding_multiplier: float = 1.0
    multiplier: float = 1.0
    tied: bool = False
    window: int | None = None

    def config(self, **changes: Any) -> Any:
        """The configuration, with `changes`."""
        attention = "eager" if self.model_type in _EAGER else "sdpa"
        options = {**COMMON, **self.options, **changes}
        options = {key: value for key, value in options.items() if value is not None}
        return AutoConfig.for_model(self.model_type, attn_implementation=attention, **options)

    def model(self, seed: int = 0, **changes: Any) -> Any:
        """A random model in float32, in eval mode."""
        return random_model(self.config(**changes), seed)

    @property
    def writers(self) -> tuple[str, ...]:
        """Names of all writers in stream order."""
        inside = [f"{self.blocks}.{i}.{name}" for i in range(BLOCKS) for name in (self.attention, self.mlp)]
        return (*self.embeddings, *inside)


def _gpt2_options(**options: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    renamed = {"n_embd": D_MODEL, "n_layer": BLOCKS, "n_head": 4, "n_positions": 128}
    return {**dict.fromkeys((*names, "max_position_embeddings")), **renamed, **options}


def _falcon_options(**options: Any) -> dict[str, Any]:
    return {"new_decoder_architecture": False, "parallel_attn": False, **options}


_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, **_MIXED}
_GEMMA2: dict[str, Any] = {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_FALCON: dict[str, Any] = {
    "blocks": "transformer.h",
    "embeddings": ("transformer.word_embeddings",),
    "attention": "self_attention.dense",
    "mlp": "mlp.dense_4h_to_h",
}
_NEOX: dict[str, Any] = {
    "blocks": "gpt_neox.layers",
    "embeddings": ("gpt_neox.embed_in",),
    "attention": "attention.dense",
    "mlp": "mlp.dense_4h_to_h",
    "bias": (True, True),
}
_GPT2: dict[str, Any] = {
    "blocks": "transformer.h",
    "embeddings": ("transformer.wte", "transformer.wpe"),
    "attention": "attn.c_proj",
    "mlp": "mlp.c_proj",
    "axis": 1,
    "bias": (True, True),
}

FAMILIES: tuple[Family, ...] = (
    Family("llama", "llama"),
    Family("llama-tied", "llama", _TIED, tied=True),
    Family("llama-bias", "llama", {"attention_bias": True, "mlp_bias": True}, bias=(True, True)),
    Family("mistral", "mistral", {"sliding_window": WINDOW}, window=WINDOW),
    Family("qwen2", "qwen2"),
    Family("qwen2-tied", "qwen2", _TIED, tied=True),
    Family("qwen3", "qwen3", {"head_dim": 16}),
    Family("gemma", "gemma", {"head_dim": 16}),
    Family("gemma-tied", "gemma", {"head_dim": 16, **_TIED}, tied=True),
    Family("gemma2", "gemma2", _GEMMA2, post_norms=_POST_NORMS, window=WINDOW),
    Family("gemma2-tied", "gemma2", {**_GEMMA2, **_TIED}, post_norms=_POST_NORMS, tied=True, window=WINDOW),
    Family("gemma3", "gemma3_text", _GEMMA, post_norms=_POST_NORMS, window=WINDOW),
    Family("gemma3-tied", "gemma3_text", {**_GEMMA, **_TIED}, post_norms=_POST_NORMS, tied=True, window=WINDOW),
    Family("phi3", "phi3"),
    Family("olmo2", "olmo2", post_norms=_POST_NORMS),
    Family("gpt2", "gpt2", _gpt2_options(), **_GPT2),
    Family("gpt2-tied", "gpt2", _gpt2_options(**_TIED), tied=True, **_GPT2),
    Family("gpt_neox", "gpt_neox", {"use_parallel_residual": True}, **_NEOX),
    Family("gpt_neox-serial", "gpt_neox", {"use_parallel_residual": False}, **_NEOX),
    Family("falcon-new", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, **_FALCON),
    Family("falcon-old", "falcon", _falcon_options(parallel_attn=True), **_FALCON),
    Family("falcon-serial", "falcon", _falcon_options(bias=True), bias=(True, True), **_FALCON),
    Family("falcon-alibi", "falcon", _falcon_options(bias=True, alibi=True), bias=(True, True), **_FALCON),
    Family(
        "opt",
        "opt",
        {"ffn_dim": 80, "word_embed_proj_dim": D_MODEL, "do_layer_norm_before": True},
        blocks="model.decoder.layers",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        attention="self_attn.out_proj",
        mlp="fc2",
        bias=(True, True),
    ),
    Family("stablelm", "stablelm", {"partial_rotary_factor": 0.5}),
    Family("stablelm-parallel", "stablelm", {"partial_rotary_factor": 0.5, "use_parallel_residual": True}),
    Family(
        "starcoder2",
        "starcoder2",
        {"use_bias": True, "sliding_window": WINDOW},
        mlp="mlp.c_proj",
        bias=(True, True),
        window=WINDOW,
    ),
    Family("cohere", "cohere", {"logit_scale": 0.25, **_TIED}, tied=True),
    Family("cohere2", "cohere2", {"logit_scale": 0.25, **_MIXED, **_TIED}, tied=True, window=WINDOW),
    Family(
        "granite",
        "granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
        embedding_multiplier=6.0,
        multiplier=0.22,
    ),
    Family("smollm3", "smollm3"),
    Family(
        "glm4",
        "glm4",
        {"head_dim": 16},
        post_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    Family("exaone4", "exaone4", _MIXED, post_norms=_POST_NORMS, window=WINDOW),
    Family("olmo3", "olmo3", _MIXED, post_norms=_POST_NORMS, window=WINDOW),
    Family("seed_oss", "seed_oss", {"head_dim": 16}),
    Family(
        "gptj",
        "gptj",
        _gpt2_options(rotary_dim=4),
        blocks="transformer.h",
        embeddings=("transformer.wte",),
        attention="attn.out_proj",
        mlp="mlp.fc_out",
        bias=(False, True),
    ),
    Family(
        "gpt_neo",
        "gpt_neo",
        {
            "num_layers": BLOCKS,
            "num_heads": 4,
            "window_size": WINDOW,
            "attention_types": [[["local", "global", "local"], 1]],
        },
        blocks="transformer.h",
        embeddings=("transformer.wte", "transformer.wpe"),
        attention="attn.attention.out_proj",
        mlp="mlp.c_proj",
        bias=(True, True),
        window=WINDOW,
    ),
    Family(
        "mpt",
        "mpt",
        {"d_model": D_MODEL, "n_layers": BLOCKS, "n_heads": 4, "max_seq_len": 128},
        blocks="transformer.blocks",
        embeddings=("transformer.wte",),
        attention="attn.out_proj",
        mlp="ffn.down_proj",
    ),
    Family("phi", "phi", attention="self_attn.dense", mlp="mlp.fc2", bias=(True, True)),
)

BY_NAME: Mapping[str, Family] = {family.name: family for family in FAMILIES}


def random_model(config: Any, seed: int = 0) -> Any:
    """A model of `config` in float32 and eval mode; see `randomise`."""
    model = AutoModelForCausalLM.from_config(config)
    return randomise(model, seed).eval().requires_grad_(False)


def randomise(model: Any, seed: int = 0) -> Any:
    """Draw all parameters anew, so that nothing stays at zero or one; returns the model.

    Matrices are N(0, 0.15²), vectors lie 0.2 around their initial value, and embeddings are N(0, 0.5²): next to what
    the blocks write they are large enough for replies to depend on the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 if any(parameter is weight for weight in embeddings) else 0.15))
    return model


def byte_tokenizer() -> Any:
    """Token id = byte value, and a chat template: `<s><|user|>…<|end|><|assistant|>`. Ids below VOCAB."""
    alphabet = bytes_to_unicode()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    vocabulary |= {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def bytes_to_unicode() -> dict[int, str]:
    """The printable character that byte-level tokenizers write for each byte (the table of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def save(
    model: Any, folder: Path, *, dtype: torch.dtype = torch.float32, shards: int = 1, tokenizer: bool = True
) -> Path:
    """Write a copy of `model` in `dtype` as safetensors, in about `shards` files; returns `folder`.

    With one shard there is no index. The model itself is left as it is.
    """
    stored = copy.deepcopy(model).to(dtype)
    nbytes = sum(p.numel() * p.element_size() for p in stored.parameters())
    stored.save_pretrained(folder, max_shard_size=nbytes + 1 if shards == 1 else nbytes // shards)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, *, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """The model that transformers loads from `folder`, in eval mode."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)
