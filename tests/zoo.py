"""Every causal language model that transformers knows, tiny and random: no network, no download.

The default configuration of each model type is shrunk by the names of its fields (see `zoo_sizes`). All kinds of
layers of a configuration are kept: dense and sparse, full and linear attention …
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families import randomise
from zoo_sizes import GEMMA4_MOE, KINDS, LAYERS, OVERRIDES, QWEN4_PLE, SIZES, UNSET


@dataclass(frozen=True, slots=True)
class Entry:
    """One class for one model type; `changes` to its configuration make a variant of it."""

    model_type: str
    cls: str
    variant: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Model type and variant."""
        return "-".join(filter(None, (self.model_type, self.variant)))

    def config(self) -> Any:
        """The shrunken configuration, of the text half where the class wants no more."""
        config = shrunk(self.model_type, self.changes)
        wanted = self._class.config_class
        return config if isinstance(config, wanted) else config.get_text_config(decoder=True)

    def model(self, seed: int = 0) -> Any:
        """A random model in float32, in eval mode; buffers that are drawn at random follow the seed too."""
        torch.manual_seed(seed)
        return randomise(self._class._from_config(self.config()), seed).eval().requires_grad_(False)

    def load(self, folder: Path) -> Any:
        """The model that was saved in `folder`, in float32 and eval mode."""
        return self._class.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)

    @property
    def _class(self) -> Any:
        return getattr(transformers, self.cls)


def shrunk(model_type: str, changes: Mapping[str, Any] | None = None) -> Any:
    """The default configuration of a model type with everything small, and `changes`."""
    fields = _merged(small(AutoConfig.for_model(model_type)), OVERRIDES.get(model_type, {}))
    return AutoConfig.for_model(model_type, **_merged(fields, changes or {}))


def small(config: PretrainedConfig) -> dict[str, Any]:
    """Fields to set, and for configurations inside this one the fields of those."""
    fields = config.to_dict()
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in config.sub_configs and value is not None:
            inner = getattr(config, name)
            found[name] = {"model_type": inner.model_type, **small(inner)}
        elif name in KINDS and value:
            found[name] = every_kind(value)
        elif name in SIZES and (value is not None or name in UNSET):
            found[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")) and value is not None:
            found[name] = 3
    if "qk_rope_head_dim" in fields:  # multi-head latent attention: the width of a head follows from its parts
        found.pop("head_dim", None)
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def every_kind(values: Sequence[Any]) -> list[Any]:
    """`LAYERS` entries (more if there are more kinds) in which every kind occurs, the last one repeated."""
    kinds = list(dict.fromkeys(values))
    return (kinds + [kinds[-1]] * LAYERS)[: max(LAYERS, len(kinds))]


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(first)
    for name, value in second.items():
        inner = both.get(name)
        both[name] = _merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return {name: value for name, value in both.items() if value is not ...}


#: Classes that cannot be built tiny and run on token ids alone, with the reason.
UNBUILT: Mapping[str, str] = {
    "gemma3n": "its vision tower needs the timm package",
    "gemma4_assistant": "a drafter: runs on hidden states and keys of the model it drafts for, not on tokens",
    "gemma4_unified_assistant": "a drafter: runs on hidden states and keys of the model it drafts for, not on tokens",
    "musicgen": "an audio decoder that transformers' auto class cannot build from its configuration",
    "musicgen_melody": "an audio decoder that transformers' auto class cannot build from its configuration",
}

#: Second configurations of classes that are two architectures in one.
VARIANTS = (
    Entry("doge", "DogeForCausalLM", "moe", {"is_moe": True}),
    Entry("gemma4_text", "Gemma4ForCausalLM", "moe", GEMMA4_MOE),
    Entry("qwen4_exp_text", "Qwen4ExpForCausalLM", "ple", QWEN4_PLE),
    Entry("opt", "OPTForCausalLM", "post-norm", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
)

#: Models of text and images whose text half is used alone.
MULTIMODAL = (
    Entry("llama4", "Llama4ForConditionalGeneration", "images"),
    Entry("llava", "LlavaForConditionalGeneration"),
    Entry("mistral3", "Mistral3ForConditionalGeneration"),
    Entry("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    Entry("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    Entry("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    Entry("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    Entry("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    Entry("glm4v", "Glm4vForConditionalGeneration"),
    Entry("idefics3", "Idefics3ForConditionalGeneration"),
    Entry("internvl", "InternVLForConditionalGeneration"),
    Entry("mllama", "MllamaForConditionalGeneration"),
    Entry("paligemma", "PaliGemmaForConditionalGeneration"),
)


def _causal() -> list[Entry]:
    """One entry for every class that transformers' AutoModelForCausalLM maps a model type to."""
    return [Entry(*pair) for pair in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if pair[0] not in UNBUILT]


ENTRIES: tuple[Entry, ...] = (*_causal(), *VARIANTS, *MULTIMODAL)
