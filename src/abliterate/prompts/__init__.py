"""Contrastive prompt sets: where prompts come from, how they are split, and how they become tokens."""

from abliterate.prompts.contrastive import ContrastiveSet, Split, build_contrastive_set, normalise
from abliterate.prompts.rendering import ChatRenderer
from abliterate.prompts.sources import load_prompts

__all__ = ["ChatRenderer", "ContrastiveSet", "Split", "build_contrastive_set", "load_prompts", "normalise"]
