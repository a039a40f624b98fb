"""Keyword arguments of the public functions as settings by concern."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from abliterate.config import (
    EvalSettings,
    FindSettings,
    MeasureSettings,
    ModelSettings,
    PromptSettings,
    RefusalSettings,
    ReplySettings,
)
from abliterate.errors import UsageError

Settings = TypeVar("Settings", bound=BaseModel)

#: Keywords that are not called like their field, since the option is not either (`--as`).
_KEYWORDS = {"realisation": "as_"}


def keyword_of(field: str) -> str:
    """The keyword of a field of settings."""
    return _KEYWORDS.get(field, field)


class Options:
    """Keyword arguments of one call of `verb`: each class of settings takes its own, `done` refuses what is left."""

    def __init__(self, verb: str, given: Mapping[str, Any]) -> None:
        """All that was `given`."""
        self._verb, self._given = verb, dict(given)
        self._known: set[str] = set()

    def take(self, kind: type[Settings], **more: Any) -> Settings:
        """The settings of one concern, of what was given and `more`."""
        names = {keyword_of(field): field for field in kind.model_fields if field not in more}
        self._known |= set(names)
        return kind(**{field: self._given.pop(name) for name, field in names.items() if name in self._given}, **more)

    def pop(self, name: str, default: Any) -> Any:
        """An option that is no setting."""
        self._known.add(name)
        return self._given.pop(name, default)

    def measuring(
        self,
        *,
        finding: type[RefusalSettings] | None = FindSettings,
        evaluating: type[ReplySettings] | None = EvalSettings,
        more: type[BaseModel] | None = None,
    ) -> MeasureSettings:
        """How a model is loaded and measured, by options of the kinds that the verb takes."""
        loading, prompts = self.take(ModelSettings), self.take(PromptSettings)
        found = {} if finding is None else dict(self.take(finding))
        asked = {} if evaluating is None else dict(self.take(evaluating))
        asked |= {} if more is None else dict(self.take(more))
        return MeasureSettings(
            loading=loading, prompts=prompts, finding=FindSettings(**found), evaluating=EvalSettings(**asked)
        )

    def done(self) -> None:
        """Raise `UsageError`, naming it, for an option that nothing has taken."""
        for name in self._given:
            near = difflib.get_close_matches(name, self._known, 1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; expected one of {', '.join(sorted(self._known))}"
            raise UsageError(f"{self._verb}: it has no option '{name}'{hint}")
