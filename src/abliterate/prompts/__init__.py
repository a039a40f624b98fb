"""Contrastive prompt sets: where prompts come from, how they are split, and how they become tokens."""

from abliterate.prompts.behaviour import Behaviour, load_behaviour
from abliterate.prompts.contrastive import ContrastiveSet, Split, build_contrastive_set, normalise
from abliterate.prompts.known import KNOWN, KnownSet, describe, find_known
from abliterate.prompts.prompt import Prompt
from abliterate.prompts.rendering import ChatRenderer
from abliterate.prompts.sources import load_prompts
from abliterate.prompts.thinking import answer_of, opens_thinking

__all__ = [
    "KNOWN",
    "Behaviour",
    "ChatRenderer",
    "ContrastiveSet",
    "KnownSet",
    "Prompt",
    "Split",
    "answer_of",
    "build_contrastive_set",
    "describe",
    "find_known",
    "load_behaviour",
    "load_prompts",
    "normalise",
    "opens_thinking",
]
