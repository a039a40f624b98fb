"""Who is asked what in which state: edited weights, controls, open thinking, early stops, engines and comparisons."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import abliterate
import planted
from abliterate import comparing, measuring, pipeline
from abliterate.comparing import Entry, compare
from abliterate.config import EditSettings, EngineSettings, EvalSettings, ModelSettings, OutputSettings, PromptSettings
from abliterate.directions import Direction, save_direction
from abliterate.errors import AbliterateError
from abliterate.evaluation import Answers, Subject
from abliterate.generation import Reply
from abliterate.inference import Encoded
from abliterate.judging import Exchange, Label, RuleJudge, Verdict
from abliterate.judging.calibration import place
from abliterate.measuring import (
    Control,
    Evaluation,
    Exam,
    Examiner,
    Sets,
    answers_of,
    control_of,
    exam_of,
    examine,
    examine_engine,
    examiner_of,
    random_plan,
    relative_change,
)
from abliterate.monitor import Monitor
from abliterate.plan import Plan
from abliterate.prompts.contrastive import fingerprint
from abliterate.prompts.prompt import Prompt

# --- a model that thinks, and goes on after it has refused

#: One token, special as some models' marks are, and what it says reads as a refusal: only thinking it is none.
DOUBT = "I'm sorry, but I can't help with that."
THOUGHTS = ("<think>", "first", "then", "next", "so", "hmm", "well", "still", "perhaps", DOUBT)
#: What it says after its refusal and its answer, so that there is something to leave out.
ONWARDS = ("Because", "such", "things", "could", "hurt", "other", "people", "near", "by", "very", "much", "indeed")
#: A prompt with this word is thought about for ever.
ENDLESS = "river"
ANSWER_LENGTH = len(planted.REFUSAL) + len(ONWARDS)

THINKING_TEMPLATE = planted.CHAT_TEMPLATE.replace(
    "<|turn|><|assistant|>",
    "<|turn|><|assistant|><think>{% if not enable_thinking %}</think>{% endif %}",
)


def thinking_tokenizer() -> Any:
    """The planted tokenizer with more words, of which the marks of thinking are special."""
    words = dict.fromkeys([*planted.SPECIAL, *THOUGHTS, "</think>", *planted.REFUSAL, *planted.ANSWER, *ONWARDS])
    with mock.patch.object(planted, "SPECIAL", tuple(words)):
        result = planted_tokenizer()
    result.add_special_tokens({"additional_special_tokens": [*planted.SPECIAL[3:], "<think>", "</think>"]})
    result.chat_template = THINKING_TEMPLATE
    return result


planted_tokenizer = planted.tokenizer


def thinking_model() -> tuple[Any, torch.Tensor]:
    """The planted model with a train of thought before its answer, and the direction of its refusals.

    `ENDLESS` has a feature of its own, which the same attention carries on to all that follows, and which keeps the
    thinking from being closed.
    """
    with mock.patch.object(planted, "tokenizer", thinking_tokenizer):
        live, r = planted.model()
    ids = thinking_tokenizer().get_vocab()
    embedding, head = live.get_input_embeddings().weight, live.get_output_embeddings().weight
    attention = live.model.layers[planted.WRITES].self_attn
    spoken = ("<|assistant|>", *planted.REFUSAL, *planted.ANSWER)
    new = (*THOUGHTS, "</think>", *ONWARDS)
    with torch.no_grad():
        bad = attention.v_proj.weight[0] / 2
        known = torch.stack([r, bad, *(embedding[ids[word]] for word in spoken)])
        free = torch.linalg.svd(known)[2][len(known) :][: len(new) + 2]
        embedding -= embedding @ free.T @ free
        endless, lasting, *codes = free
        code = dict(zip(new, codes, strict=True)) | {word: embedding[ids[word]].clone() for word in spoken}
        for word in new:
            embedding[ids[word]] = code[word]
        embedding[ids[ENDLESS]] += endless
        for parameter in live.model.layers.parameters():
            if parameter.dim() == 2:
                parameter *= 0.1  # noise adds up over a train of thought
        attention.v_proj.weight[:2] = 2 * torch.stack([bad, endless])
        attention.o_proj.weight[:, :2] = 4 * torch.stack([r, lasting], dim=1)
        head.zero_()
        chains = ((*THOUGHTS, "</think>"), (*planted.REFUSAL, *ONWARDS, "</s>"), (*planted.ANSWER, *ONWARDS, "</s>"))
        for word, successor in dict.fromkeys(pair for chain in chains for pair in zip(chain, chain[1:], strict=False)):
            head[ids[successor]] += 18 * code[word]
        head[ids[DOUBT]] += 9 * code[DOUBT]
        head[ids["</think>"]] -= 18 * lasting
        head[ids["Sure"]] = 1.5 * code["</think>"]
        head[ids["I"]] = 1.5 * r
    return live, r


@dataclass(frozen=True, slots=True)
class Thinker:
    """The model on disk, the direction of its refusals, and settings that name its prompts."""

    folder: Path
    direction: torch.Tensor
    prompts: PromptSettings


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Thinker:
    folder = tmp_path_factory.mktemp("thinker")
    live, direction = thinking_model()
    live.save_pretrained(folder / "model")
    thinking_tokenizer().save_pretrained(folder / "model")
    bad, good = planted.prompts(planted.BAD, 70, 1), planted.prompts(planted.GOOD, 70, 2)
    files = {"harmful": bad[:60], "harmless": [*good[:50], *bad[60:]], "borderline": good[60:]}
    for name, texts in files.items():
        planted.write_jsonl(folder / f"{name}.jsonl", texts)
    named = {name: str(folder / f"{name}.jsonl") for name in files}
    return Thinker(folder / "model", direction, PromptSettings(**named))


LOADING = ModelSettings(device="cpu", batch_size="64")


@pytest.fixture(scope="module")
def session(thinker: Thinker) -> pipeline.Session:
    return pipeline.open_session(str(thinker.folder), loading=LOADING, prompts=thinker.prompts)
