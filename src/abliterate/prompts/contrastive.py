"""The contrastive set: harmful and harmless instructions in disjoint train / val / test splits."""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from abliterate.config import PromptSettings, name_prompts
from abliterate.errors import PromptError
from abliterate.prompts.behaviour import REFUSAL, Behaviour, asked_of, load_behaviour, wrapped
from abliterate.prompts.prompt import Prompt
from abliterate.prompts.sources import BUILTIN, SetName, SplitName, builtin_set, load_builtin, load_prompts

#: Shares of a set without splits of its own that go to train and val; the rest is test.
TRAIN_SHARE, VAL_SHARE = 0.64, 0.16
#: Of a larger source this many are drawn: means settle with a few hundred prompts.
MOST_PROMPTS = 800

#: The two sides of a behaviour.
SIDES: tuple[SetName, ...] = ("harmful", "harmless")
#: In the order in which they are made of a source; they claim prompts from the last to the first.
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
#: Where a prompt stands: on a side, in a split of it.
SideSplit: TypeAlias = tuple[SetName, SplitName]


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

    The texts are `Prompt`s. Of another behaviour than refusal, harmful ones are those where it shows, harmless ones
    those where it does not (`behaviour.names` has what these are called); `keep` are prompts where it is to stay. Where
    both sides ask the same prompts, `plain` has those of (harmful, train) and (harmful, val) as a user asks them, and
    beside them others, as (harmless, train) and (harmless, val): what an edit is to do, it is to do there.
    `borderline` prompts are safe but sound dangerous, or the test part of `keep`; they are only evaluated on. `dropped`
    counts prompts left out because their normalised text had been seen in another split or set, by where that was
    ("harmful train, also in harmful test").
    """

    harmful: Split
    harmless: Split
    borderline: tuple[str, ...]
    sources: dict[str, str]
    dropped: Mapping[str, int] = field(default_factory=dict)
    behaviour: Behaviour = field(default_factory=lambda: load_behaviour(REFUSAL))
    keep: Split | None = None
    plain: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

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
        """Held-out prompts by set; a behaviour without a third set has none."""
        sets = {"harmful": self.harmful.test, "harmless": self.harmless.test, "borderline": self.borderline}
        return {name: texts for name, texts in sets.items() if texts or self.behaviour.name == REFUSAL}

    @property
    def sensitive(self) -> frozenset[str]:
        """The sets that may hold harmful prompts: replies to them are redacted.

        These are the sets where a behaviour shows or is to stay, unless their prompts are builtin ones that are known
        to be safe; and any set that has the builtin harmful prompts.
        """
        shows = {"harmful": "eval_harmful", "harmless": "eval_harmless", "borderline": "borderline"}
        roles: dict[str, SetName] = {"harmful": "harmful", "harmless": "harmless", "borderline": "borderline"}
        kept = self.keep is not None
        found = {
            name
            for name, role in roles.items()
            if (source := self.sources.get(shows[name])) is not None
            and _may_harm(source, role, shown=name == "harmful" or (kept and name == "borderline"))
        }
        return frozenset(found | ({"keep"} if kept and "borderline" in found else set()))

    def texts(self, name: str, split: str) -> tuple[str, ...]:
        """The prompts of a set: of train, val or test, or of "plain train" and "plain val"."""
        if split.startswith("plain "):
            return self.plain[name, split.removeprefix("plain ")]
        texts: tuple[str, ...] = getattr(getattr(self, name), split)
        return texts

    @property
    def learnt_from(self) -> list[str]:
        """Fingerprints of the prompts that directions are made of and chosen by: training and validation."""
        splits = [split for split in (self.harmful, self.harmless, self.keep) if split is not None]
        return sorted({fingerprint(asked_of(text)) for split in splits for text in (*split.train, *split.val)})

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
        if self.keep is not None:
            yield from (self.keep.train, self.keep.val)
        yield from (texts for _, texts in sorted(self.plain.items()))


def _may_harm(source: str, role: SetName, *, shown: bool) -> bool:
    """Whether a source may hold harmful prompts; `shown` says that a behaviour is looked for in replies to it."""
    if builtin_set(source, role) == "harmful":
        return True
    return shown and not source.startswith(BUILTIN)


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

    def sets(
        self,
        parts: Mapping[SetName, Mapping[SplitName, Iterable[Prompt]]],
        third: Mapping[SplitName, Iterable[Prompt]],
        learnt_from: Container[str],
    ) -> tuple[dict[SideSplit, tuple[Prompt, ...]], dict[SplitName, tuple[Prompt, ...]]]:
        """What both sides and the third set keep, by part, where what is evaluated on claims first."""
        claimed: dict[SideSplit, tuple[Prompt, ...]] = {}
        stays: dict[SplitName, tuple[Prompt, ...]] = {}
        for part in SPLITS[::-1]:
            for name in SIDES:
                if part in parts[name]:
                    unwanted = learnt_from if part == "test" else ()
                    claimed[name, part] = self.claim(parts[name][part], f"{name} {part}", unwanted)
            if part == "test":
                stays[part] = self.claim(third[part], "borderline", learnt_from)
            elif part in third:
                stays[part] = self.claim(third[part], f"{part}, where it is to stay")
        return claimed, stays


def build_contrastive_set(
    settings: PromptSettings = PromptSettings(), learnt_from: Container[str] = ()
) -> ContrastiveSet:
    """Load, split and de-duplicate the instructions that settings name by SPECs (see `sources`).

    A source without splits is shuffled with the seed and cut 64 / 16 / 20 %; with an eval source it is cut 80 / 20
    into train and val, and the eval source is the test split. Of a source with more than `MOST_PROMPTS` so many
    are drawn. The limit caps every split, for quick looks. Where both sides of a behaviour have the same prompts, these
    are cut once, and each side puts its own around those for training and validation.
    Prompts are claimed in the order test, borderline, val, train, so that nothing evaluated on was trained on.
    `learnt_from` are fingerprints of prompts that must not be evaluated on: a direction of before was learnt from them.

    Raises `PromptError` when a source cannot be read or a split ends up empty.
    """
    behaviour = load_behaviour(settings.behaviour)
    sources = _sources(behaviour, settings)
    parts = {
        name: _parts(name, sources[name], sources.get(f"eval_{name}"), settings.seed)
        for name in SIDES
        if name in sources
    }
    if behaviour.paired:
        parts["harmless"] = {"test": _test(sources["eval_harmless"], "harmless")}
    third = _third(behaviour, sources.get("borderline"), settings.seed)
    claims = _Claims()
    claimed, stays = claims.sets(parts, third, learnt_from)
    _refuse_empty(claimed, {} if behaviour.keep is None else stays, sources)
    cut = slice(settings.limit)
    asked = {key: texts[cut] for key, texts in claimed.items()}
    framed = _framed(behaviour, asked)
    harmful, harmless = (Split(*(framed[name, part] for part in SPLITS)) for name in SIDES)
    return ContrastiveSet(
        harmful,
        harmless,
        stays["test"][cut],
        _in_full(sources),
        dict(claims.dropped),
        behaviour=behaviour,
        keep=None if behaviour.keep is None else Split(*(stays[part][cut] for part in SPLITS)),
        plain=_plain(behaviour, asked, sources.get("eval_harmless"), cut),
    )


def _framed(behaviour: Behaviour, asked: Mapping[SideSplit, tuple[Prompt, ...]]) -> dict[SideSplit, tuple[Prompt, ...]]:
    """Prompts with what each side puts around them; those that pairs are tested on stay as they are."""
    framed: dict[SideSplit, tuple[Prompt, ...]] = {}
    for part in SPLITS:
        if behaviour.paired and part == "test":
            framed |= {(name, part): asked[name, part] for name in SIDES}
            continue
        less = asked["harmful" if behaviour.paired else "harmless", part]
        framed["harmful", part] = wrapped(behaviour.more, asked["harmful", part])
        framed["harmless", part] = wrapped(behaviour.less, less)
    return framed


def _in_full(sources: Mapping[str, str]) -> dict[str, str]:
    """The SPEC of every set, also of those that share one: with the other side, or with what they are cut from."""
    sides: dict[str, str] = {name: sources.get(name, sources["harmful"]) for name in SIDES}
    evaluated = {f"eval_{name}": sources.get(f"eval_{name}") or sources[name] for name in SIDES}
    third = {name: spec for name, spec in sources.items() if name == "borderline"}
    return {**sides, **evaluated, **third}


def _refuse_empty(
    claimed: Mapping[SideSplit, tuple[Prompt, ...]],
    stays: Mapping[SplitName, tuple[Prompt, ...]],
    sources: Mapping[str, str],
) -> None:
    """Raise `PromptError` for a part without prompts."""
    parts = {(f"{name} prompts", part, name): texts for (name, part), texts in claimed.items()}
    parts |= {("prompts on which it is to stay", part, "borderline"): texts for part, texts in stays.items()}
    for (what, part, name), texts in parts.items():
        if not texts:
            source = sources.get(name) or sources.get(f"eval_{name}")
            raise PromptError(
                f"{what}: expected some in the {part} split, found none after dropping duplicates and "
                f"what the direction has seen; give a larger source than '{source}'"
            )


def _plain(
    behaviour: Behaviour, asked: Mapping[SideSplit, tuple[Prompt, ...]], others: str | None, cut: slice
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Prompts of pairs as they are, and others beside them: of a builtin set, else what the other side asks."""
    if not behaviour.paired:
        return {}
    builtin = None if others is None else builtin_set(others, "harmless")
    parts = None if builtin is None else load_builtin(builtin)
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for part in SPLITS[:2]:
        prompts = asked["harmful", part]
        beside = wrapped(behaviour.less, prompts) if parts is None else tuple(parts[part])[cut]
        found |= {("harmful", part): prompts, ("harmless", part): beside}
    return found


def _sources(behaviour: Behaviour, settings: PromptSettings) -> dict[str, str]:
    """The SPEC of every set that there is: those of the behaviour where settings name no other.

    A side that has the prompts of the other one has no source of its own.
    """

    def of(prompts: str | tuple[str, ...], role: SetName) -> str:
        if not isinstance(prompts, str):
            return name_prompts(prompts, f"of the behaviour {behaviour.name}")
        return BUILTIN if builtin_set(prompts, role) == role else prompts

    sides, tests = (behaviour.more, behaviour.less), (behaviour.test, behaviour.others)
    sources: dict[str, str] = {}
    for name, side, test in zip(SIDES, sides, tests, strict=True):
        given, measured = getattr(settings, name), getattr(settings, f"eval_{name}")
        if given != BUILTIN:
            sources[name] = given
        elif side.prompts is not None and not (behaviour.paired and name == "harmless"):
            sources[name] = of(side.prompts, name)
        if measured is not None or test is not None:
            sources[f"eval_{name}"] = measured or of(test.prompts, name)  # type: ignore[union-attr]
    if behaviour.paired:
        if "harmless" in sources:
            raise PromptError(
                f"--harmless: the behaviour {behaviour.name} asks the same prompts on both sides; give --harmful"
            )
        sources.setdefault("eval_harmless", BUILTIN)
    if behaviour.keep is not None:
        if settings.borderline != BUILTIN:
            raise PromptError(f"--borderline: the behaviour {behaviour.name} has a set of its own there, [keep]")
        sources["borderline"] = of(behaviour.keep.prompts, "borderline")
    elif behaviour.name == REFUSAL or settings.borderline != BUILTIN:
        sources["borderline"] = settings.borderline
    return sources


def _third(behaviour: Behaviour, spec: str | None, seed: int) -> Mapping[SplitName, list[Prompt]]:
    """The third set: what is to stay, in parts, or what is evaluated alone."""
    if spec is None:
        return {"test": []}
    if behaviour.keep is not None:
        return _parts("borderline", spec, None, seed)
    return {"test": _test(spec, "borderline")}


def _test(spec: str, role: SetName) -> list[Prompt]:
    """Prompts to evaluate on: of a builtin set its test part."""
    name = builtin_set(spec, role)
    return load_prompts(spec, role) if name is None else load_builtin(name)["test"]


def _parts(name: SetName, spec: str, eval_spec: str | None, seed: int) -> dict[SplitName, list[Prompt]]:
    if (builtin := builtin_set(spec, name)) is not None:
        parts = load_builtin(builtin)
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
        parts["test"] = _test(eval_spec, name)
    return parts


def _unique(texts: list[Prompt]) -> list[Prompt]:
    return list({normalise(text): text for text in reversed(texts)}.values())[::-1]
