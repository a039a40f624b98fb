"""Replies decoded as a generation_config asks are those of transformers' generate(); samples are what was asked for."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from abliterate.errors import UsageError
from abliterate.model.batches import BatchSize, share_prefix
from abliterate.model.decoding import GREEDY, Chooser, Decoding, asked_by, decoding_of, drawn
from abliterate.model.generation import complete, end_tokens
from families import BY_NAME, VOCAB, byte_tokenizer

PROMPTS = [[3, 5, 7, *[random.Random(n).randrange(2, VOCAB) for _ in range(n)]] for n in (9, 2, 5, 5, 1)]
ENDS = [4, 11, 30]


def model(**settings: Any) -> Any:
    made = BY_NAME["llama"].model(seed=1)
    made.generation_config = GenerationConfig(eos_token_id=ENDS, pad_token_id=0, **settings)
    return made


def generated(made: Any, count: int) -> list[tuple[int, ...]]:
    """What generate() itself says, one prompt at a time, as the configuration asks."""
    ends, replies = sorted(end_tokens(made, byte_tokenizer())), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, eos_token_id=ends)
        replies.append(tuple(token for token in out[0, len(prompt) :].tolist() if token not in ends))
    return replies


def ours(made: Any, count: int, rows: int = 5, decoding: Decoding | None = None) -> list[tuple[int, ...]]:
    decoding = decoding_of(made.generation_config, 0) if decoding is None else decoding
    replies = complete(made, byte_tokenizer(), share_prefix(PROMPTS), count, BatchSize(rows), decoding=decoding)
    return [reply.tokens for reply in replies]


LIKELY = sorted({token for reply in ours(model(), 12) for token in reply})


@pytest.mark.contract
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": LIKELY},
        {"begin_suppress_tokens": LIKELY},
        {"bad_words_ids": [[token] for token in LIKELY[::2]]},
        {"sequence_bias": [[[LIKELY[0]], -9.0], [[17], 5.0]]},
        {"min_new_tokens": 7},
        {"min_length": 16},
        {"exponential_decay_length_penalty": (2, 1.8)},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "suppress_tokens": LIKELY[:2], "min_new_tokens": 3},
        {"do_sample": True, "top_k": 1, "temperature": 0.3},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_replies_are_those_that_generate_gives(settings: dict[str, Any]) -> None:
    made = model(**settings)
    expected = generated(made, 12)
    for rows in (2, 5):
        assert ours(made, 12, rows) == expected
    if "top_k" not in settings:
        assert ours(made, 12, decoding=GREEDY) != expected, "the control: greedy replies differ"


@pytest.mark.contract
def test_what_is_sampled_from_without_a_word_is_what_generate_takes() -> None:
    usual = GenerationConfig._get_default_generation_params()
    config = GenerationConfig(do_sample=True)
    assert asked_by(config) == {"do_sample": True, "top_k": usual["top_k"]}
    assert usual["temperature"] == usual["top_p"] == usual["typical_p"] == 1.0
    assert asked_by(GenerationConfig()) == {}


# --- sampling


def test_samples_are_repeatable_and_do_not_depend_on_the_batch() -> None:
    made = model(do_sample=True, temperature=1.5)
    first = decoding_of(made.generation_config, 0)
    whole = ours(made, 8, 5, first)
    assert whole == ours(made, 8, 5, first) == ours(made, 8, 1, first)
    alone = complete(made, byte_tokenizer(), share_prefix(PROMPTS[2:3]), 8, BatchSize(1), decoding=first)
    assert alone[0].tokens == whole[2]
    others = [Decoding(first.asked, seed=1), Decoding(first.asked, sample=1)]
    assert all(ours(made, 8, 5, other) != whole for other in others)
    assert whole != ours(made, 8, 5, GREEDY)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    draws = 4000
    numbers = [
        Chooser(Decoding({"do_sample": True}, sample=i), [(1, 2)], 1, [0]).choose(logits)[1] for i in range(draws)
    ]
    counts = Counter(int(token) for token in numbers)
    expected = (logits[0].softmax(-1) * draws).tolist()
    assert counts[4] == 0
    assert sum((counts[i] - expected[i]) ** 2 / expected[i] for i in range(4)) < 16.3  # chi-square, 3 df, p 0.001


def test_no_number_draws_an_impossible_token() -> None:
    scores = torch.full((3, 6), -torch.inf)
    scores[:, 2] = 0.0
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert drawn(scores, ends).tolist() == [2, 2, 2]


def test_rows_that_leave_the_batch_take_their_draws_with_them() -> None:
    asked, prompts = Decoding({"do_sample": True}), [(1,), (2, 3), (4,)]
    logits = torch.zeros(3, 50)
    whole, fewer = (Chooser(asked, prompts, 4, [0]) for _ in range(2))
    whole.choose(logits), fewer.choose(logits)
    fewer.keep(torch.tensor([0, 2]))
    assert fewer.choose(logits[:2])[1].tolist() == whole.choose(logits)[1][[0, 2]].tolist()


# --- what cannot be followed


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 4}, "num_beams 4, which replies here cannot follow"),
        ({"guidance_scale": 1.5, "repetition_penalty": 1.1}, r"guidance_scale 1.5, which"),
        ({"stop_strings": ["x"]}, "stop_strings"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        decoding_of(GenerationConfig(**settings), 0)


@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": -1.0}, {"no_repeat_ngram_size": "two"}, {"bad_words_ids": 3}]
)
def test_values_that_cannot_be_are_refused_in_a_line(settings: dict[str, Any]) -> None:
    config = GenerationConfig()
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(UsageError, match=r"generation_config asks for .*use --decoding greedy") as caught:
        decoding_of(config, 0)
    assert "\n" not in str(caught.value)


def test_key_holds_what_replies_depend_on() -> None:
    asked = {"do_sample": True, "top_k": 3}
    keys = [
        GREEDY.key,
        Decoding({"repetition_penalty": 1.1}).key,
        Decoding(asked).key,
        Decoding(asked, seed=1).key,
        Decoding(asked, sample=1).key,
        Decoding(asked, rule="rules-1").key,
    ]
    assert len({str(key) for key in keys}) == len(keys)
    assert Decoding(seed=5).key == GREEDY.key, "what is not drawn does not depend on the seed"
