"""Every builtin behaviour found, searched and edited in one model: what is left of it, and what that costs.

    python benchmarks/behaviours.py MODEL [--limit 64] [--points 2] [--steps 16] [--tokens 96] [--only NAME …]

Prints a row for each: replies to held-out prompts that show it before and after the edit, the same on prompts where
nothing should change and, where it is to stay, on those; KL of the first token on the former; minutes. A behaviour that
the model hardly shows, or whose edit passes no gate, is said to be so.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import abliterate
from abliterate.config import EvalSettings, OutputSettings, PromptSettings, RunSettings, SearchSettings
from abliterate.errors import GateNotMet
from abliterate.prompts.behaviour import builtin_behaviours
from abliterate.record import RatePart, Record

HEAD = "| behaviour | before | after | others before | after | to stay before | after | KL | minutes |"


def main() -> None:
    """Run them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--points", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--only", nargs="+", default=builtin_behaviours())
    given = parser.parse_args()
    print(HEAD, "| --- | --- | --- | --- | --- | --- | --- | --- | --- |", sep="\n")
    for name in given.only:
        print(row(given, name), flush=True)


def row(given: argparse.Namespace, name: str) -> str:
    """One behaviour."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = RunSettings(
            model=given.model,
            prompts=PromptSettings(behaviour=name, limit=given.limit),
            searching=SearchSettings(points=given.points, steps=given.steps),
            evaluating=EvalSettings(max_new_tokens=given.tokens, no_control=True),
            output=OutputSettings(out=Path(folder) / "out"),
        )
        try:
            cells = list(measured(abliterate.run(settings)))
        except GateNotMet as gate:
            cells = [f"not edited: {gate}"]
    return f"| {name} | {' | '.join(cells)} | {(time.perf_counter() - began) / 60:.1f} |"


def measured(record: Record) -> Iterator[str]:
    """What a run says of its held-out prompts."""
    assert record.evaluation is not None
    before, after, shift = record.evaluation.before, record.evaluation.after, record.evaluation.shift
    for name in ("harmful", "harmless", "borderline"):
        for state in (before, after):
            yield "" if state is None else share(getattr(state, name))
    yield "" if shift is None or shift.kl_first_token is None else f"{shift.kl_first_token:.3f}"


def share(part: RatePart) -> str:
    """Replies that show it, of all."""
    return f"{part.refusals}/{part.n}" if part.n else ""


if __name__ == "__main__":
    main()
