"""What models are heard to say while they are measured: results hold counts, and replies only in part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from abliterate.evaluation.examine import Examiner, Sets


@contextlib.contextmanager
def listening() -> Iterator[list[Sets]]:
    """All answers that examiners are given inside a `with`, in the order in which they ask."""
    ask, heard = Examiner.ask, list[Sets]()

    def noted(examiner: Examiner, *given: Any, **named: Any) -> Sets:
        heard.append(ask(examiner, *given, **named))
        return heard[-1]

    with mock.patch.object(Examiner, "ask", noted):
        yield heard
