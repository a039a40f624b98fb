"""Chat templates come with models and are programs: here one is run within bounds of time, memory and length.

transformers runs them in a sandbox that keeps them away from Python, but not from loops within loops or texts that
double until memory is full. Time is looked at on every line of a template; what it allocates is bounded by the system,
where it can be; powers, which are computed in one endless step, are refused before anything is run.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import jinja2

from abliterate.errors import ChatTemplateError

#: Seconds for one prompt: ordinary templates take a thousandth of one.
SECONDS = 5.0
#: Bytes that a template may take beyond what the process has, and characters of what it renders.
MEMORY, LENGTH = 2**30, 20_000_000

#: Characters of a template.
LONGEST = 2_000_000

#: The name under which Jinja compiles a template that is no file.
_COMPILED = "<template>"
#: Where the kernel says how many pages the process has mapped.
_MAPPED = "/proc/self/statm"


_one_at_a_time = threading.Lock()  # a limit of the whole process is set, and put back


class TooMuchError(Exception):
    """A template goes on for too long."""


@contextlib.contextmanager
def watched(template: str | Mapping[str, str] | None) -> Iterator[None]:
    """A template (or one of several by name) is rendered inside. What goes beyond the bounds raises an error there.

    Raises `ChatTemplateError` for a template that is no text, too long, or computes powers.
    """
    for text in template.values() if isinstance(template, Mapping) else [template or ""]:
        if not isinstance(text, str) or len(text) > LONGEST:
            raise ChatTemplateError(f"the chat template is no text, or longer than {LONGEST:,} characters")
        if _has_power(text):
            raise ChatTemplateError("the chat template computes a power (**), which may take for ever; take it out")
    before, end = sys.gettrace(), time.monotonic() + SECONDS

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TooMuchError(f"it takes more than {SECONDS:g} seconds for one prompt")
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        # Elsewhere nothing may be raised: on the way out of an error, what stands there is to be put back.
        return on_line(frame, event, argument) if frame.f_code.co_filename == _COMPILED else None

    with _one_at_a_time, _memory(MEMORY):
        sys.settrace(on_call)
        try:
            yield
        finally:
            sys.settrace(before)


@functools.lru_cache(maxsize=64)
def _has_power(template: str) -> bool:
    """Whether a template raises anything to a power; ** before keywords of a call is another thing."""
    last = ""
    try:
        for _, kind, value in jinja2.Environment(autoescape=False).lex(template):
            if kind == "operator" and value == "**" and last not in ("(", ","):
                return True
            last = value if kind != "whitespace" else last
    except jinja2.TemplateSyntaxError:
        return False  # transformers will say so
    return False


@contextlib.contextmanager
def _memory(more: int) -> Iterator[None]:
    """The process may map so many bytes more, inside; where the system knows no such limit it is not bounded."""
    try:
        import resource

        with open(_MAPPED) as file:
            mapped = int(re.split(r"\s", file.read(200))[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = mapped + more
        if limit >= min(value for value in (soft, hard, sys.maxsize) if value >= 0):
            raise OSError
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
