"""The time that chat templates print: one and the same in all prompts of a process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, tzinfo

#: What templates call `strftime_now` looks at the clock through a name of its module, which is one for all threads.
_LOCK = threading.Lock()


_now: datetime | None = None


def _this_moment() -> datetime:
    global _now
    _now = _now or datetime.now()
    return _now


def stand_still(agreed: Callable[[str], str]) -> None:
    """Let several processes print one time: the one that `agreed` gives for theirs, in ISO 8601."""
    global _now
    _now = datetime.fromisoformat(agreed(_this_moment().isoformat()))


@dataclass(slots=True)
class Clock:
    """A clock that stands still.

    Prompts that differ from one rendering to the next could not be compared, nor a model with its base. `asked` says
    whether a template looked at it.
    """

    time: datetime = field(default_factory=_this_moment)
    asked: bool = False

    def now(self, zone: tzinfo | None = None) -> datetime:
        """The time, as `datetime.now` gives it."""
        self.asked = True
        return self.time if zone is None else self.time.astimezone(zone)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Chat templates that are rendered inside the `with` print this time."""
        from transformers.utils import chat_template_utils as inside

        with _LOCK:
            real = getattr(inside, "datetime", None)
            setattr(inside, "datetime", self)  # noqa: B010 - a name that the module's own stubs do not have
            try:
                yield
            finally:
                setattr(inside, "datetime", real)  # noqa: B010
