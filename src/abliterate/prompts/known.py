"""Published prompt sets by short name: where they are, which of their rows are what, and under which terms.

Nothing of them is shipped. A set is read from the hub through `datasets`, or from a copy of the authors' own files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from abliterate.errors import PromptError

Role = Literal["harmful", "harmless", "borderline"]


def _every(row: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class RoleRows:
    """The rows of a set that serve as one kind of prompt.

    `config` and `split` name them on the hub, `file` in a copy of the published files (a path within it); of those
    rows the ones that `keep` lets through are taken, `size` in number as published.
    """

    split: str
    file: str
    size: int
    config: str | None = None
    keep: Callable[[Mapping[str, Any]], bool] = _every


@dataclass(frozen=True, slots=True)
class KnownSet:
    """A published set. `text` and `category` are the columns' names, on the hub and in the authors' files.

    `source` is the page where the authors' files are, `overlaps` says what it shares with other sets.
    """

    name: str
    title: str
    hub: str
    gated: bool
    licence: str
    paper: str
    source: str
    text: tuple[str, ...]
    category: tuple[str, ...]
    parts: Mapping[Role, RoleRows]
    overlaps: str

    def part(self, role: Role) -> RoleRows:
        """The rows for a role. Raises `PromptError` when the set has none such."""
        if role not in self.parts:
            others = ", ".join(known.name for known in KNOWN.values() if role in known.parts)
            raise PromptError(
                f"prompt set '{self.name}': expected {role} prompts, found only {' and '.join(self.parts)} ones; "
                f"sets with {role} prompts: {others}"
            )
        return self.parts[role]

    @property
    def instead(self) -> str:
        """What to do when the hub does not give the set."""
        terms = f"accept its terms at https://huggingface.co/datasets/{self.hub} and log in, or " if self.gated else ""
        return f"{terms}give a local copy: {self.name}=PATH (files: {self.source})"

    def local_file(self, path: Path, role: Role) -> Path:
        """The file for a role at `path`: the file itself, or within a folder that holds the published files.

        Raises `PromptError` when there is none, or the file is the one of another role.
        """
        part = self.part(role)
        if path.is_dir():
            inside = [path / part.file, path / Path(part.file).name]
            if (found := next((file for file in inside if file.is_file()), None)) is not None:
                return found
            raise PromptError(f"prompt set '{self.name}': expected {part.file} in {path}, found no such file")
        if not path.is_file():
            raise PromptError(f"prompt set '{self.name}': expected a file or folder at {path}, found none")
        wrong = {Path(other.file).name: held for held, other in self.parts.items() if other.file != part.file}
        if (held := wrong.get(path.name)) is not None:
            raise PromptError(f"prompt set '{self.name}': expected {role} prompts, found the {held} ones in {path}")
        return path


def find_known(spec: str) -> tuple[KnownSet, Path | None] | None:
    """`NAME` or `NAME=PATH` taken apart, case, hyphens and underscores forgiven; None for any other spec."""
    name, equals, path = spec.partition("=")
    plain = re.sub(r"[-_ ]", "", name.casefold())
    known = KNOWN.get(_ALIASES.get(plain, plain))
    if known is None:
        return None
    if equals and not path:
        raise PromptError(f"prompt set '{spec}': expected {known.name}=PATH, found no path")
    return known, Path(os.path.expanduser(path)) if equals else None


def describe(spec: str) -> str | None:
    """What to know of the published set that a `spec` names, in one line: its terms, paper and overlaps with others.

    None for a spec that names none (see `find_known`, also for errors).
    """
    found = find_known(spec)
    if found is None:
        return None
    known, _ = found
    return f"{known.title} (licence: {known.licence}; {known.paper}): {known.overlaps}"


def _standard(row: Mapping[str, Any]) -> bool:
    """Not "contextual" (needs a second text) and not "copyright" (judged by what is quoted, not by refusal)."""
    return bool(row.get("FunctionalCategory", "standard") == "standard")


def _base(row: Mapping[str, Any]) -> bool:
    """Not one of the twenty rewordings of the same instructions."""
    return bool(row.get("prompt_style", "base") == "base")


def _unsafe(row: Mapping[str, Any]) -> bool:
    """By the label, or by the type in releases that have none."""
    if "label" not in row and "type" not in row:
        raise PromptError(
            "prompt set 'xstest': expected a column label or type, found neither: what is safe is unknown"
        )
    label = row.get("label") or ("unsafe" if str(row.get("type")).startswith("contrast_") else "safe")
    return str(label).strip().casefold() == "unsafe"


def _safe(row: Mapping[str, Any]) -> bool:
    return not _unsafe(row)


_JBB_BENIGN = RoleRows("benign", "data/benign-behaviors.csv", 100, config="behaviors")

KNOWN = {
    known.name: known
    for known in (
        KnownSet(
            name="jailbreakbench",
            title="JailbreakBench (JBB-Behaviors)",
            hub="JailbreakBench/JBB-Behaviors",
            gated=False,
            licence="MIT",
            paper="https://arxiv.org/abs/2404.01318",
            source="https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors",
            text=("Goal",),
            category=("Category",),
            parts={
                "harmful": RoleRows("harmful", "data/harmful-behaviors.csv", 100, config="behaviors"),
                "harmless": _JBB_BENIGN,
                "borderline": _JBB_BENIGN,
            },
            overlaps="some of the harmful goals come from AdvBench and from the Trojan Detection Challenge, whose "
            "behaviours HarmBench took over; benign goals share the topics of the harmful ones",
        ),
        KnownSet(
            name="harmbench",
            title="HarmBench, standard behaviours",
            hub="walledai/HarmBench",
            gated=True,
            licence="MIT",
            paper="https://arxiv.org/abs/2402.04249",
            source="https://github.com/centerforaisafety/HarmBench",
            text=("prompt", "Behavior"),
            category=("category", "SemanticCategory"),
            parts={
                "harmful": RoleRows(
                    "train",
                    "data/behavior_datasets/harmbench_behaviors_text_all.csv",
                    200,
                    config="standard",
                    keep=_standard,
                )
            },
            overlaps="shares behaviours with the Trojan Detection Challenge 2023, and through it with JailbreakBench",
        ),
        KnownSet(
            name="strongreject",
            title="StrongREJECT",
            hub="walledai/StrongREJECT",
            gated=True,
            licence="MIT",
            paper="https://arxiv.org/abs/2402.10260",
            source="https://github.com/alexandrasouly/strongreject",
            text=("prompt", "forbidden_prompt"),
            category=("category",),
            parts={"harmful": RoleRows("train", "strongreject_dataset/strongreject_dataset.csv", 313)},
            overlaps="its own prompts beside some of AdvBench, DAN, MasterKey, MaliciousInstruct, HarmfulQ and others; "
            "its column source says which",
        ),
        KnownSet(
            name="xstest",
            title="XSTest",
            hub="Paul/XSTest",
            gated=False,
            licence="CC-BY-4.0",
            paper="https://arxiv.org/abs/2308.01263",
            source="https://github.com/paul-rottger/xstest",
            text=("prompt",),
            category=("type",),
            parts={
                "harmful": RoleRows("train", "xstest_prompts.csv", 200, keep=_unsafe),
                "borderline": RoleRows("train", "xstest_prompts.csv", 250, keep=_safe),
            },
            overlaps="written by hand; unsafe prompts are contrasts of the safe ones, often one word apart",
        ),
        KnownSet(
            name="orbench",
            title="OR-Bench (Hard-1K and Toxic)",
            hub="bench-llm/or-bench",
            gated=False,
            licence="CC-BY-4.0",
            paper="https://arxiv.org/abs/2405.20947",
            source="https://huggingface.co/datasets/bench-llm/or-bench",
            text=("prompt",),
            category=("category",),
            parts={
                "harmful": RoleRows("train", "or-bench-toxic.csv", 655, config="or-bench-toxic"),
                "borderline": RoleRows("train", "or-bench-hard-1k.csv", 1319, config="or-bench-hard-1k"),
            },
            overlaps="written and sorted by language models; both parts come from the same generated toxic seeds",
        ),
        KnownSet(
            name="sorrybench",
            title="SORRY-Bench (2025/03), base style",
            hub="sorry-bench/sorry-bench-202503",
            gated=True,
            licence="its own, to be accepted on the hub",
            paper="https://arxiv.org/abs/2406.14598",
            source="https://huggingface.co/datasets/sorry-bench/sorry-bench-202503",
            text=("turns",),
            category=("category",),
            parts={"harmful": RoleRows("train", "question.jsonl", 440, keep=_base)},
            overlaps="ten prompts for each of 44 topics, collected from ten earlier sets and completed by hand; models "
            "need not refuse all of its topics (advice on law or money is one)",
        ),
        KnownSet(
            name="advbench",
            title="AdvBench, harmful behaviours",
            hub="walledai/AdvBench",
            gated=True,
            licence="MIT",
            paper="https://arxiv.org/abs/2307.15043",
            source="https://github.com/llm-attacks/llm-attacks",
            text=("prompt", "goal"),
            category=(),
            parts={"harmful": RoleRows("train", "data/advbench/harmful_behaviors.csv", 520)},
            overlaps="JailbreakBench and StrongREJECT took goals from it; many of its goals repeat each other in other "
            "words, which de-duplication by text does not see",
        ),
    )
}

_ALIASES = {"jbb": "jailbreakbench", "jbbbehaviors": "jailbreakbench"}
