"""A behaviour as data: the two sides of prompts it is found by, how it shows in a reply, and where it is read.

Refusal is one of the builtin files; a file of one's own names the same things (docs/behaviours.md).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from abliterate.config import given_behaviour
from abliterate.errors import PromptError
from abliterate.files.bounded import MB, Kind, short, wrong
from abliterate.prompts.prompt import Prompt, messages_of
from abliterate.prompts.specs import find_local

#: The behaviour where none is named.
REFUSAL = "refusal"
_FOLDER = "data/behaviours"
_FILE = Kind("a behaviour file (TOML, see docs/behaviours.md)", MB, PromptError)

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
Label = Annotated[str, Field(min_length=1, max_length=40)]
Said = Annotated[str, Field(max_length=20_000)]
Phrase = Annotated[str, Field(max_length=200, pattern=r"[^\s*^]")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


#: Judges that tell refusals, by name.
_OF_REFUSALS = ("rules", "learnt", "self", "auto", "minos", "protectai")


def _as_prompts(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


#: A source of prompts (a file beside the behaviour's, or a SPEC), or the prompts themselves.
Prompts = Annotated[str | Annotated[tuple[Said, ...], Field(min_length=1)], BeforeValidator(_as_prompts)]
Phrases = Annotated[tuple[Phrase, ...], BeforeValidator(_as_prompts)]


class Side(_Part):
    """Prompts of one side, and what is put around each."""

    prompts: Prompts | None = Field(None, description="Prompts; [less] without them asks those of [more].")
    system: Said | None = Field(None, description="System prompt of this side.")
    prefix: Said = Field("", description="Put before each prompt.")
    suffix: Said = Field("", description="Put after each prompt.")
    name: Label | None = Field(None, description="What tables call this side.")

    @property
    def bare(self) -> bool:
        """Whether prompts are asked as they are."""
        return not (self.system or self.prefix or self.suffix)

    def wrap(self, prompt: Prompt) -> Prompt:
        """The prompt as it is asked on this side; `asked_of` gives back what it was made of."""
        if self.bare:
            return prompt
        *before, (role, text) = messages_of(prompt)
        messages = [*before, (role, f"{self.prefix}{text}{self.suffix}")]
        if self.system:
            messages = [("system", self.system), *(one for one in messages if one[0] != "system")]
        wrapped = Prompt.conversation(messages, prompt.category)
        wrapped.origin = prompt
        return wrapped


class OtherSet(_Part):
    """Prompts beside the two sides."""

    prompts: Prompts = Field(description="A source of prompts, or the prompts.")
    name: Label | None = Field(None, description="What tables call them.")


class Shows(_Part):
    """How a behaviour shows in a reply: one of phrases, judge, longer_than, language and scorer."""

    phrases: Phrases | None = Field(None, description="Texts of which a reply that shows it holds some.")
    unless: Phrases = Field((), description="A reply with one of these does not show it.")
    at_least: Annotated[int, Field(ge=1, le=100)] = Field(1, description="How many places with a phrase are needed.")
    within: Annotated[int, Field(ge=1)] | None = Field(None, description="Characters from the start looked at.")
    longer_than: Annotated[int, Field(ge=1)] | None = Field(None, description="More words than this.")
    language: Literal["en"] | None = Field(None, description="The reply is in this language.")
    judge: Said | None = Field(None, description="A judge, as --judge names it.")
    rubric: Said | None = Field(None, description="The question that a judge llm:MODEL@URL is to answer of a reply.")
    scorer: Said | None = Field(None, description="An entry point of the group abliterate.scorers.")
    first_tokens: bool = Field(False, description="Whether a reply's first token can tell.")
    tokens: Annotated[int, Field(ge=1, le=1024)] = Field(
        32, description="Tokens of a reply that it takes to see it, while directions are tried out."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = ("phrases", "judge", "longer_than", "language", "scorer")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(ways)}, found {' and '.join(given) or 'none'}")
        phrases = self.unless or self.within is not None or self.at_least != 1
        if phrases and self.phrases is None:
            raise ValueError("unless, at_least and within go with phrases")
        if self.rubric is not None and not (self.judge or "").startswith("llm:"):
            raise ValueError("a rubric goes with judge = 'llm:MODEL@URL'")
        return self


class Read(_Part):
    """Where the residual stream is read."""

    at: Literal["prompt", "reply"] = Field(
        "prompt", description="At the last tokens of a prompt, or the mean over the tokens of the reply to it."
    )
    tokens: Annotated[int, Field(ge=1, le=256)] = Field(24, description="Tokens of a reply that are read.")


class Behaviour(_Part):
    """A behaviour of a model: what it is called, where it is looked for, and how it shows.

    `more` is the side on which it shows and `less` the one on which it does not. Where both have the same prompts
    (`paired`), these are told apart by what is put around them, and evaluated as they are.
    """

    name: Name
    description: Said = ""
    shown: Label | None = Field(None, description="How a table says that a reply shows it.")
    more: Side
    less: Side = Side()
    test: OtherSet | None = Field(None, description="What is evaluated, instead of a held-out part.")
    others: OtherSet | None = Field(None, description="Prompts on which nothing should change.")
    keep: OtherSet | None = Field(None, description="Prompts on which the behaviour is to stay.")
    shows: Shows
    read: Read = Read()

    @model_validator(mode="after")
    def _two_sides(self) -> Self:
        if self.more.prompts is None:
            raise ValueError("more: expected prompts, found none")
        if self.paired and self.more.model_copy(update={"prompts": None, "name": self.less.name}) == self.less:
            raise ValueError("less: expected other prompts than [more], or another system, prefix or suffix")
        return self

    @property
    def paired(self) -> bool:
        """Whether both sides are made of the same prompts."""
        return self.less.prompts is None or self.less.prompts == self.more.prompts

    @property
    def of_refusal(self) -> bool:
        """Whether it is told by a judge of refusals."""
        judge = self.shows.judge or ""
        return self.shows.rubric is None and (judge in _OF_REFUSALS or judge.startswith(("llm:", "strongreject:")))

    @property
    def side_names(self) -> tuple[str, str]:
        """What the sides are called that directions are made of and chosen by."""
        return self.more.name or "more", self.less.name or "less"

    @property
    def said(self) -> str:
        """How a table says that a reply shows it."""
        return self.shown or f"showed {self.name}"

    @property
    def names(self) -> dict[str, str]:
        """What the sets are called, by the names that they have inside."""
        more, less = self.more.name or "more", self.less.name or "less"
        tested = {"harmful": (self.test and self.test.name) or more, "harmless": less}
        if self.paired and self.more.name is None:
            tested["harmful"] = (self.test and self.test.name) or "held-out"
        if self.paired or self.others is not None:
            tested["harmless"] = (self.others and self.others.name) or "harmless"
        stays = (self.keep and self.keep.name) or "to stay"
        return tested | {"borderline": "borderline" if self.keep is None else stays, "keep": stays}


def builtin_behaviours() -> list[str]:
    """The names of the behaviours that come with the package."""
    names = (file.name for file in resources.files(__package__).joinpath(_FOLDER).iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_behaviour(spec: str) -> Behaviour:
    """The behaviour named: a builtin one, or a TOML file.

    Raises `PromptError` for a name that there is not and for a file that cannot be used.
    """
    if (given := given_behaviour(spec)) is not None:
        return behaviour_from(given, spec)
    if spec in (known := builtin_behaviours()):
        text = resources.files(__package__).joinpath(f"{_FOLDER}/{spec}.toml").read_text(encoding="utf-8")
        return _resolved(behaviour_from(tomllib.loads(text), spec), None)
    path = Path(spec).expanduser()
    if not path.suffix and not path.exists():
        raise PromptError(f"behaviour '{spec}': expected a TOML file or one of {', '.join(known)}, found neither")
    return _resolved(behaviour_from(_FILE.toml(path), str(path)), path.parent)


def behaviour_from(fields: Mapping[str, Any] | Behaviour, where: str) -> Behaviour:
    """A behaviour from its fields. Raises `PromptError`, which names the first that does not fit."""
    if isinstance(fields, Behaviour):
        return fields
    try:
        return Behaviour.model_validate(dict(fields))
    except ValidationError as error:
        raise PromptError(f"behaviour {where}: {wrong(error)}") from error


def _resolved(behaviour: Behaviour, folder: Path | None) -> Behaviour:
    """The same with sources that are files beside it found there; of a builtin one, in the package.

    Raises `PromptError` for a file elsewhere: one from a stranger could name any file of this machine.
    """
    updates: dict[str, Any] = {}
    for name in ("more", "less", "test", "others", "keep"):
        part = getattr(behaviour, name)
        source = None if part is None else part.prompts
        if isinstance(source, str) and (found := _beside(source, folder)) is not None:
            updates[name] = part.model_copy(update={"prompts": found})
    return behaviour.model_copy(update=updates)


def _beside(source: str, folder: Path | None) -> str | None:
    if folder is None:
        return f"builtin:{source}" if source.endswith(".jsonl") else None
    named = Path(source.partition(":")[0])
    beside = (folder / named).is_file()
    elsewhere = named.is_absolute() or ".." in named.parts or source.startswith("~") or "=" in source
    if elsewhere or (not beside and find_local(source) is not None):
        raise PromptError(
            f"a behaviour file: prompts = {short(source)}: expected a file beside it (or below), "
            "builtin, or a set of the hub"
        )
    return str(folder / source) if beside else None


def asked_of(prompt: str) -> str:
    """The prompt that a side put something around; any other as it is."""
    return prompt.origin if isinstance(prompt, Prompt) and prompt.origin is not None else prompt


def wrapped(side: Side, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """All prompts as they are asked on a side."""
    return tuple(map(side.wrap, prompts))


def schema() -> dict[str, Any]:
    """The JSON schema of a behaviour file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Behaviour.model_json_schema()}
