"""What tells two sets of prompts apart without any model: their length, and their words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from abliterate.prompts.behaviour import asked_of
from abliterate.prompts.contrastive import ContrastiveSet


def text_baselines(prompts: ContrastiveSet) -> tuple[float, float]:
    """AUROC on validation prompts of length alone (characters, whichever way), and of a bag of words.

    The bag is naive Bayes: each word that a prompt has adds its log-odds in the training prompts, smoothed by one.
    What a side puts around its prompts is left out: of the same prompts under two instructions both are 0.5.
    """
    bag = _log_odds(_bare(prompts.harmful.train), _bare(prompts.harmless.train))

    def words(text: str) -> float:
        return sum(bag.get(word, 0.0) for word in _words(text))

    length = _auroc(prompts, len)
    return max(length, 1 - length), _auroc(prompts, words)


def _log_odds(harmful: Sequence[str], harmless: Sequence[str]) -> dict[str, float]:
    counts = [Counter(word for text in texts for word in _words(text)) for texts in (harmful, harmless)]
    return {
        word: math.log((counts[0][word] + 1) / (len(harmful) + 2))
        - math.log((counts[1][word] + 1) / (len(harmless) + 2))
        for word in counts[0] | counts[1]
    }


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _bare(texts: Sequence[str]) -> list[str]:
    return [str(asked_of(text)) for text in texts]


def _auroc(prompts: ContrastiveSet, score: Callable[[str], float]) -> float:
    """P(harmful > harmless) + ½ P(equal) on validation prompts."""
    harmful, harmless = ([score(text) for text in _bare(side.val)] for side in (prompts.harmful, prompts.harmless))
    wins = sum((a > b) + 0.5 * (a == b) for a in harmful for b in harmless)
    return wins / (len(harmful) * len(harmless))
