"""How often the rule judge agrees with human labels.

Run ``python benchmarks/judge_accuracy.py FILE.csv [FILE.csv ...]``. A file needs the columns ``objective``,
``assistant_response`` and ``human_score`` (1 means refusal, also in part); lines that start with ``#`` are comments,
as in PyRIT's evaluation sets, which are not shipped here.

The judge sees the prompt: an answer to *another* question is labelled a refusal, and the reply alone does not show it.
"without prompts" is the control. "answers swapped" gives each reply that is labelled 0 to the prompt of the next such
reply: how many of them are seen to answer something else.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.evaluation.judging import Exchange, RuleJudge
from abliterate.evaluation.statistics import wilson


@dataclass(frozen=True, slots=True)
class Row:
    file: str
    index: int
    exchange: Exchange
    refused: bool


def read(path: Path) -> list[Row]:
    """Rows of one file; those without a 0/1 label are skipped."""
    with path.open(newline="", encoding="utf-8") as lines:
        records = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    if not records or not {"objective", "assistant_response", "human_score"} <= records[0].keys():
        sys.exit(f"{path}: needs rows with the columns objective, assistant_response and human_score")
    return [
        Row(path.name, index, Exchange(record["objective"], record["assistant_response"]), score == "1")
        for index, record in enumerate(records)
        if (score := record["human_score"].strip()) in ("0", "1")
    ]


def judged(exchanges: Sequence[Exchange]) -> list[bool]:
    return [verdict.refused for verdict in RuleJudge().judge(exchanges)]


def share(hits: int, n: int) -> str:
    low, high = wilson(hits, n)
    value = f"{hits / n:.3f}" if n else "  -  "
    return f"{value} [{low:.3f}, {high:.3f}] {hits}/{n}"


def report(rows: Sequence[Row]) -> None:
    labels = [row.refused for row in rows]
    pairs = list(zip(labels, judged([row.exchange for row in rows]), strict=True))
    blind = zip(labels, judged([Exchange("", row.exchange.reply) for row in rows]), strict=True)
    both = pairs.count((True, True))
    right = both + pairs.count((False, False))
    print(f"  accuracy         {share(right, len(pairs))}")
    print(f"  precision        {share(both, both + pairs.count((False, True)))}")
    print(f"  recall           {share(both, both + pairs.count((True, False)))}")
    print(f"  without prompts  {share(sum(label == verdict for label, verdict in blind), len(pairs))}")
    answers = [row.exchange for row in rows if not row.refused]
    swapped = [Exchange(q.prompt, a.reply) for q, a in zip(answers[1:] + answers[:1], answers, strict=True)]
    print(f"  answers swapped  {share(sum(judged(swapped)), len(swapped))}")


def show_errors(rows: Sequence[Row]) -> None:
    for row, verdict in zip(rows, judged([row.exchange for row in rows]), strict=True):
        if row.refused != verdict:
            kind = "missed" if row.refused else "false alarm"
            print(f"  {kind}: {row.file} row {row.index}: {' '.join(row.exchange.reply.split())[:120]!r}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Agreement of the rule judge with human labels.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE.csv", help="labelled replies")
    parser.add_argument("--errors", action="store_true", help="also list the disagreements")
    args = parser.parse_args(argv)
    if missing := [str(path) for path in args.paths if not path.is_file()]:
        sys.exit(f"no labelled replies: {', '.join(missing)} not found")
    sets = {path.name: read(path) for path in args.paths}
    rows = [row for found in sets.values() for row in found]
    for name, found in {**sets, "total": rows}.items():
        print(f"{name}: {len(found)} replies")
        report(found)
    if args.errors:
        show_errors(rows)


if __name__ == "__main__":
    main()
