"""The contrastive set: harmful and harmless instructions in disjoint train / val / test splits."""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from abliterate.config import PromptSettings
from abliterate.errors import PromptError
from abliterate.prompts.prompt import Prompt
from abliterate.prompts.sources import BUILTIN, SetName, SplitName, load_builtin, load_prompts

#: Shares of a set without splits of its own that go to train and val; the rest is test.
TRAIN_SHARE, VAL_SHARE = 0.64, 0.16
#: Of a larger source this many are drawn: means settle with a few hundred prompts.
MOST_PROMPTS = 800


@dataclass(frozen=True, slots=True)
class Split:
    """One class of instructions in three disjoint parts."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of prompts per part."""
        return {"train": len(self.train), "val": len(self.val), "test": len(self.test)}


@dataclass(frozen=True, slots=True)
class ContrastiveSet:
    """Harmful, harmless and borderline instructions, disjoint and without duplicates.

    The texts are `Prompt`s. `borderline` prompts are safe but sound dangerous; they are only evaluated on. `dropped`
    counts prompts left out because their normalised text had been seen in another split or set, by where that was
    ("harmful train, also in harmful test").
    """

    harmful: Split
    harmless: Split
    borderline: tuple[str, ...]
    sources: dict[str, str]
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def duplicates_dropped(self) -> int:
        """How many prompts were left out in all."""
        return sum(self.dropped.values())

    @property
    def answered(self) -> int:
        """Of how many prompts the source gave a reply at their end, which was left out."""
        return sum(isinstance(text, Prompt) and text.answered for group in self._groups() for text in group)

    @property
    def test_texts(self) -> dict[str, tuple[str, ...]]:
        """Held-out prompts by set."""
        return {"harmful": self.harmful.test, "harmless": self.harmless.test, "borderline": self.borderline}

    @property
    def learnt_from(self) -> list[str]:
        """Fingerprints of the prompts that directions are made of and chosen by: training and validation."""
        splits = (self.harmful, self.harmless)
        return sorted({fingerprint(text) for split in splits for text in (*split.train, *split.val)})

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Number of prompts per class and part."""
        return {
            "harmful": self.harmful.counts,
            "harmless": self.harmless.counts,
            "borderline": {"test": len(self.borderline)},
        }

    @property
    def sha256(self) -> str:
        """Hash over all prompts in order: equal hash, equal prompts."""
        digest = hashlib.sha256()
        for group in self._groups():
            digest.update(b"\x1d")
            for text in group:
                digest.update(text.encode() + b"\x1e")
        return digest.hexdigest()

    def _groups(self) -> Iterator[tuple[str, ...]]:
        for split in (self.harmful, self.harmless):
            yield from (split.train, split.val, split.test)
        yield self.borderline


def normalise(text: str) -> str:
    """The form in which two prompts count as the same: case, accents of typography and punctuation dropped."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def fingerprint(text: str) -> str:
    """Twelve hexadecimal digits that two prompts share when they count as the same."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:12]


class _Claims:
    """Who has which prompt: whoever comes first keeps it."""

    def __init__(self) -> None:
        self._holders: dict[str, str] = {}
        self.dropped: Counter[str] = Counter()

    def claim(self, prompts: Iterable[Prompt], name: str, unwanted: Container[str] = ()) -> tuple[Prompt, ...]:
        """Those that nobody has yet; the others are counted."""
        kept = []
        for prompt in prompts:
            key = normalise(prompt)
            if fingerprint(prompt) in unwanted:
                self.dropped[f"{name}, which the direction has seen"] += 1
                continue
            if (holder := self._holders.get(key)) is not None:
                self.dropped[f"{name}, twice" if holder == name else f"{name}, also in {holder}"] += 1
                continue
            self._holders[key] = name
            kept.append(prompt)
        return tuple(kept)


#: In the order in which they are made of a source; they claim prompts from the last to the first.
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


def build_contrastive_set(
    settings: PromptSettings = PromptSettings(), learnt_from: Container[str] = ()
) -> ContrastiveSet:
    """Load, split and de-duplicate the instructions that settings name by SPECs (see `sources`).

    A source without splits is shuffled with the seed and cut 64 / 16 / 20 %; with an eval source it is cut 80 / 20
    into train and val, and the eval source is the test split. Of a source with more than `MOST_PROMPTS` so many
    are drawn. The limit caps every split, for quick looks.
    Prompts are claimed in the order test, borderline, val, train, so that nothing evaluated on was trained on.
    `learnt_from` are fingerprints of prompts that must not be evaluated on: a direction of before was learnt from them.

    Raises `PromptError` when a source cannot be read or a split ends up empty.
    """
    named: dict[SetName, str] = {"harmful": settings.harmful, "harmless": settings.harmless}
    measured = {"harmful": settings.eval_harmful, "harmless": settings.eval_harmless}
    parts = {name: _parts(name, spec, measured[name], settings.seed) for name, spec in named.items()}
    builtin = settings.borderline == BUILTIN
    border = load_builtin("borderline")["test"] if builtin else load_prompts(settings.borderline, "borderline")
    claims = _Claims()
    claimed: dict[tuple[SetName, SplitName], tuple[Prompt, ...]] = {}
    border_kept: tuple[Prompt, ...] = ()
    for part in SPLITS[::-1]:
        for name in named:
            unwanted = learnt_from if part == "test" else ()
            claimed[name, part] = claims.claim(parts[name][part], f"{name} {part}", unwanted)
        if part == "test":
            border_kept = claims.claim(border, "borderline", learnt_from)
    for (name, part), texts in claimed.items():
        if not texts:
            raise PromptError(
                f"{name} prompts: expected some in the {part} split, found none after dropping duplicates and "
                f"what the direction has seen; give a larger source than '{named[name]}'"
            )
    cut = slice(settings.limit)
    harmful, harmless = (Split(*(claimed[name, part][cut] for part in SPLITS)) for name in named)
    evaluated = {f"eval_{name}": measured[name] or spec for name, spec in named.items()}
    sources: dict[str, str] = {"harmful": settings.harmful, "harmless": settings.harmless}
    sources |= {**evaluated, "borderline": settings.borderline}
    return ContrastiveSet(harmful, harmless, borderline=border_kept[cut], sources=sources, dropped=dict(claims.dropped))


def _parts(name: SetName, spec: str, eval_spec: str | None, seed: int) -> dict[SplitName, list[Prompt]]:
    if spec == BUILTIN:
        parts = load_builtin(name)
    else:
        texts = _unique(load_prompts(spec, name))
        random.Random(seed).shuffle(texts)
        del texts[MOST_PROMPTS:]
        if eval_spec is None:
            first, second = round(len(texts) * TRAIN_SHARE), round(len(texts) * (TRAIN_SHARE + VAL_SHARE))
        else:
            first, second = round(len(texts) * (1 - VAL_SHARE)), len(texts)
        parts = {"train": texts[:first], "val": texts[first:second], "test": texts[second:]}
    if eval_spec is not None:
        parts["test"] = load_builtin(name)["test"] if eval_spec == BUILTIN else load_prompts(eval_spec, name)
    return parts


def _unique(texts: list[Prompt]) -> list[Prompt]:
    return list({normalise(text): text for text in reversed(texts)}.values())[::-1]
