"""Prompts and replies that a model has no positions for are named before anything is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from abliterate.errors import ModelError, UsageError
from abliterate.model.batches import BatchSize, SharedPrefix, last_logits, share_prefix
from abliterate.model.context import beyond, check_fits, context_of, reply_room
from abliterate.model.decoding import asked_by, in_words
from abliterate.model.generation import complete
from abliterate.model.tokenizer import read_tokenizer
from families import CHAT_TEMPLATE, VOCAB, byte_tokenizer

POSITIONS = 24


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=POSITIONS)).eval()


def opt() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=VOCAB, max_position_embeddings=POSITIONS, word_embed_proj_dim=16, **sizes)
    return OPTForCausalLM(config).eval()


def llama() -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=POSITIONS, **sizes)).eval()


@pytest.mark.parametrize(("make", "learnt"), [(gpt2, True), (opt, True), (llama, False)])
def test_learnt_positions_are_told_from_computed_ones(make: Any, learnt: bool) -> None:
    context = context_of(make())
    assert (context.positions, context.learnt) == (POSITIONS, learnt)


@pytest.mark.parametrize("make", [gpt2, opt])
@pytest.mark.parametrize("length", [POSITIONS - 4, POSITIONS - 3])
def test_the_last_reply_that_fits_is_given_and_the_next_refused(make: Any, length: int) -> None:
    model, tokenizer = make(), byte_tokenizer()
    prompts = share_prefix([[7] * length, [8] * 3], share=False)
    if length == POSITIONS - 4:
        replies = complete(model, tokenizer, prompts, 5, BatchSize(2))
        assert len(replies) == 2
        return
    with pytest.raises(
        UsageError, match=r"the 24 positions .* prompt of 21 tokens and a reply of up to 5; give --max-new"
    ):
        complete(model, tokenizer, prompts, 5, BatchSize(2))
    assert reply_room(model, length, 5) == 4


@pytest.mark.parametrize("make", [gpt2, opt])
def test_prompts_that_are_too_long_are_refused_before_the_pass(make: Any) -> None:
    model = make()
    last_logits(model, SharedPrefix(model, ()), [(7,) * POSITIONS])
    with pytest.raises(UsageError, match="found a prompt of 25 tokens; leave such prompts out or shorten them"):
        last_logits(model, SharedPrefix(model, ()), [(7,) * (POSITIONS + 1)])


def test_computed_positions_go_on_and_that_is_said() -> None:
    model = llama()
    check_fits(model, 100, 100)
    assert beyond(model, [3, POSITIONS]) == ""
    assert "1 of 2 prompts with their replies go beyond the 24 positions" in beyond(model, [3, POSITIONS + 1])
    assert reply_room(model, 100, 7) == 7


def test_models_that_name_no_number_have_no_bound() -> None:
    model = llama()
    model.config.max_position_embeddings = 0
    assert beyond(model, [10**6]) == ""
    check_fits(model, 10**6, 10)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ""),
        ({"repetition_penalty": 1.0, "num_beams": 1, "suppress_tokens": []}, ""),
        ({"temperature": 0.6, "top_p": 0.9}, ""),
        ({"do_sample": True, "top_p": 0.9}, "do_sample True, top_p 0.9, top_k 50"),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, "do_sample True, temperature 0.6, top_k 20"),
        ({"repetition_penalty": 1.3}, "repetition_penalty 1.3"),
        ({"suppress_tokens": [3, 4]}, "suppress_tokens [3, 4]"),
        ({"begin_suppress_tokens": [3]}, "begin_suppress_tokens [3]"),
        ({"no_repeat_ngram_size": 3, "min_new_tokens": 2}, "no_repeat_ngram_size 3, min_new_tokens 2"),
        ({"bad_words_ids": [[5]]}, "bad_words_ids [[5]]"),
        ({"num_beams": 4}, "num_beams 4"),
    ],
)
def test_what_makes_generate_differ_from_greedy_is_named(settings: dict[str, Any], said: str) -> None:
    assert in_words(asked_by(GenerationConfig(**settings))) == said


def test_template_in_its_old_place_is_found(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert not read_tokenizer(tmp_path, trust_remote_code=False).chat_template
    old = tmp_path / "chat_template.json"
    old.write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert read_tokenizer(tmp_path, trust_remote_code=False).chat_template == CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("{{ 'new' }}")
    assert read_tokenizer(tmp_path, trust_remote_code=False).chat_template == "{{ 'new' }}"


@pytest.mark.parametrize("content", ["", "[]", '{"chat_template": 3}', '{"template": "x"}', '{"chat_template": '])
def test_damaged_template_is_one_line(tmp_path: Path, content: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(
        ModelError, match=r"chat_template.json: expected a chat template, found .*; give --chat-template"
    ):
        read_tokenizer(tmp_path, trust_remote_code=False)
