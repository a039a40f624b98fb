"""Tiny GGUF files: a whole model with a tokenizer, and what is wrong with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from families import BLOCKS, BY_NAME, D_MODEL

_LETTERS = [chr(code) for code in range(33, 127)]
_SPECIAL = ["<s>", "</s>", "<|user|>", "<|end|>", "<|assistant|>"]
VOCABULARY = [*_LETTERS, "Ġ", "Ċ", "he", *_SPECIAL]
_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% endif %}"
)


def tensors(
    seed: int = 0, *, words: Sequence[str] = VOCABULARY, width: int = D_MODEL, blocks: int = BLOCKS
) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a random Qwen2 under their names in GGUF."""
    bos, eos = words.index("<s>"), words.index("</s>")
    sizes = {"vocab_size": len(words), "hidden_size": width, "num_hidden_layers": blocks}
    model = BY_NAME["qwen2"].model(seed, **sizes, bos_token_id=bos, eos_token_id=eos, pad_token_id=eos)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, model.config.num_hidden_layers)
    found = {}
    for name, value in model.state_dict().items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        found[stored] = value.numpy()
    return found


def write(path: Path, stored: Mapping[str, np.ndarray[Any, Any]], *, settings: bool = True, **more: Any) -> Path:
    """A GGUF file of these tensors; `settings` and tokenizer are left out of the later parts of a split one."""
    writer = gguf.GGUFWriter(path, "qwen2")
    if settings:
        _add_settings(writer, more.pop("blocks", BLOCKS), more.pop("width", D_MODEL), more.pop("words", VOCABULARY))
    for key, number in more.items():
        (writer.add_int32 if key == "split_tensors_count" else writer.add_uint16)(key.replace("_", "."), number)
    for name, value in stored.items():
        writer.add_tensor(name, value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def _add_settings(writer: Any, blocks: int, width: int, words: Sequence[str]) -> None:
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(80)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in _SPECIAL else 1 for word in words])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(words.index("<s>"))
    writer.add_eos_token_id(words.index("</s>"))
    writer.add_chat_template(_TEMPLATE)


def smallest(path: Path) -> Path:
    """A whole model of one block and eight tokens, as small as it can be."""
    words = ["h", "e", "he", "Ġ", *_SPECIAL[:4]]
    return write(path, tensors(words=words, width=8, blocks=1), width=8, words=words, blocks=1)


def split(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """The same model in `count` parts, as llama.cpp splits it."""
    stored = tensors(seed)
    names = list(stored)
    parts = []
    for number in range(count):
        own = {name: stored[name] for name in names[number::count]}
        path = folder / f"tiny-{number + 1:05d}-of-{count:05d}.gguf"
        split_of = {"split_no": number, "split_count": count, "split_tensors_count": len(names)}
        parts.append(write(path, own, settings=number == 0, **split_of))
    return parts
