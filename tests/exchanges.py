"""All labelled exchanges, most of which are no part of the package."""

from __future__ import annotations

from pathlib import Path

from abliterate.evaluation.judging.shipped import parse_exchanges

FILE = Path(__file__).parents[1] / "benchmarks" / "exchanges.jsonl"
EXCHANGES = parse_exchanges(FILE.read_text(encoding="utf-8"))
