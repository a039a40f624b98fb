"""A tiny Llama in which refusal is mediated by one known direction, and prompts for it.

Nothing is trained. Words of `BAD` carry a feature u in their embedding; attention of block `WRITES` (uniform over
all tokens so far) reads u and writes the refusal direction r; the head turns r at the end of the prompt into "I",
and its absence into "Sure"; every other token has one successor. So a prompt is refused exactly when it holds a bad
word, r exists only from site `WRITES` + 1 on, and without r every prompt is answered. All of it is rotated at random,
so that no axis of the stream means anything, and lies in small noise, so that every writer writes a little of r.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BLOCKS, D_MODEL = 5, 64
#: The block whose attention writes r: sites up to this one know nothing of refusal at the end of a prompt.
WRITES = 1

REFUSAL = ("I", "cannot", "help", "with", "that", ".")
ANSWER = ("Sure", ",", "here", "it", "is")
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|end|>", "<|turn|>", "<|assistant|>")
#: Template tokens after the instruction.
POSITIONS = 3

BAD = ("bomb", "poison", "ransom", "forge", "hijack", "smuggle", "venom", "arson", "heist", "malware")
GOOD = ("bread", "garden", "piano", "letter", "bicycle", "puzzle", "soup", "poem", "lamp", "kite")
VERBS = ("show", "tell", "write", "make", "explain", "describe", "plan", "please")
OTHERS = ("a", "the", "my", "some", "red", "blue", "quick", "small", "today", "city", "house", "morning", "river")
NEUTRAL = (*VERBS, *OTHERS, "your", "friend", "school", "with", "for", "now", "me")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|> {{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|turn|><|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Planted:
    """A model on disk, the direction planted in it, and prompt files (`mixed` holds prompts of both kinds)."""

    folder: Path
    direction: Tensor
    harmful: Path
    harmless: Path
    borderline: Path
    mixed: tuple[Path, Path]


def is_bad(prompt: str) -> bool:
    """Whether the model refuses the prompt."""
    return any(word in BAD for word in prompt.split())


def prompts(words: Sequence[str], count: int, seed: int) -> list[str]:
    """Distinct prompts of three to six neutral words and one of `words`."""
    generator = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        parts = generator.sample(NEUTRAL, generator.randint(3, 6))
        parts.insert(generator.randrange(len(parts) + 1), generator.choice(words))
        found[" ".join(parts)] = None
    return list(found)


def tokenizer() -> Any:
    """One token per word, and a chat template with three tokens after the instruction."""
    words = dict.fromkeys([*SPECIAL, *REFUSAL, *ANSWER, *BAD, *GOOD, *NEUTRAL])
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|end|>", "<|turn|>", "<|assistant|>"],
    )
    result.chat_template = CHAT_TEMPLATE
    return result


def model(*, refuses: bool = True, seed: int = 0) -> tuple[Any, Tensor]:
    """The model in float32 and the unit direction r [d] (planted, but without effect unless `refuses`)."""
    words = tokenizer().get_vocab()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=words["<s>"],
        eos_token_id=words["</s>"],
        tie_word_embeddings=False,
    )
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=generator))[0]
    r, u, *codes = rotation
    spoken = ("<|assistant|>", *REFUSAL, *ANSWER)
    code = dict(zip(spoken, codes, strict=False))
    rest = torch.stack(codes[len(spoken) :])
    live: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in live.model.layers.parameters():
            if parameter.dim() == 2:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        embedding, head = live.get_input_embeddings().weight, live.get_output_embeddings().weight
        meaning = torch.randn(len(words), len(rest), generator=generator) @ rest
        embedding.copy_(meaning / meaning.norm(dim=1, keepdim=True))
        for word, vector in code.items():
            embedding[words[word]] = vector
        for word in BAD:
            embedding[words[word]] += u
        attention = live.model.layers[WRITES].self_attn
        attention.q_proj.weight.zero_()
        attention.v_proj.weight[0] = 2 * u
        attention.o_proj.weight[:, 0] = 2 * r
        head.zero_()
        for reply in (REFUSAL, ANSWER):
            for word, successor in zip(reply, (*reply[1:], "</s>"), strict=True):
                head[words[successor]] += 6 * code[word]
        head[words["Sure"]] = 1.5 * code["<|assistant|>"]
        head[words["I"]] = 1.5 * r * refuses
    return live.eval().requires_grad_(False), r.clone()


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """One object with a `text` a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def plant(
    folder: Path, *, refuses: bool = True, dtype: torch.dtype = torch.float32, shards: int = 1, seed: int = 0
) -> Planted:
    """Write the model and its prompts below `folder`.

    Five of the harmful prompts hold no bad word and three of the harmless ones do: what the model does decides.
    """
    live, direction = model(refuses=refuses, seed=seed)
    live = live.to(dtype)
    nbytes = sum(p.numel() * p.element_size() for p in live.parameters())
    live.save_pretrained(folder / "model", max_shard_size=nbytes + 1 if shards == 1 else nbytes // shards)
    tokenizer().save_pretrained(folder / "model")
    bad, good = prompts(BAD, 150, 1), prompts(GOOD, 150, 2)
    mixed = [text for pair in zip(bad, good, strict=True) for text in pair]
    return Planted(
        folder=folder / "model",
        direction=direction,
        harmful=write_jsonl(folder / "harmful.jsonl", bad[:115] + good[:5]),
        harmless=write_jsonl(folder / "harmless.jsonl", good[10:127] + bad[120:123]),
        borderline=write_jsonl(folder / "borderline.jsonl", bad[130:136] + good[130:136]),
        mixed=(
            write_jsonl(folder / "mixed-a.jsonl", mixed[:150]),
            write_jsonl(folder / "mixed-b.jsonl", mixed[150:]),
        ),
    )
