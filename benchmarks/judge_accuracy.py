"""How often the phrase judge agrees with human labels.

Run ``python benchmarks/judge_accuracy.py [FILE.csv ...]``; without arguments every CSV file in
``../shared/data/judge`` beside the repository is read. A file needs the columns ``assistant_response`` and
``human_score`` (1 means refusal); lines that start with ``#`` are comments, as in PyRIT's evaluation sets.

Two numbers are given for each set. "all rows" takes the labels as they are. PyRIT also labels an answer to
*another* question as a refusal, which no judge of the reply alone can see: the very same text is labelled 0
under its own question and 1 under a wrong one. "reply decides" therefore leaves out each row that is labelled
1 while the same reply, or the same question, is labelled 0 elsewhere. What is left out is counted.

The patterns were developed on the even rows (0, 2, ...) of each file; the odd rows were held out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from abliterate.judging import Label, judge
from abliterate.statistics import wilson

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data" / "judge"


@dataclass(frozen=True, slots=True)
class Row:
    file: str
    index: int
    objective: str
    reply: str
    refused: bool
    judged: bool

    @property
    def held_out(self) -> bool:
        return self.index % 2 == 1


def read(path: Path) -> list[Row]:
    """Rows of one file with the judge's answer; rows without a 0/1 label are skipped."""
    with path.open(newline="", encoding="utf-8") as lines:
        records = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    if not records or not {"assistant_response", "human_score"} <= records[0].keys():
        sys.exit(f"{path}: needs rows with the columns assistant_response and human_score")
    rows = []
    for index, record in enumerate(records):
        reply, score = record["assistant_response"], record["human_score"].strip()
        if score in ("0", "1"):
            judged = judge(reply).label is Label.REFUSAL
            objective = (record.get("objective") or "").strip()
            rows.append(Row(path.name, index, objective, reply.strip(), score == "1", judged))
    return rows


def reply_decides(rows: list[Row]) -> list[Row]:
    """Drop refusal labels that rest on the pairing of question and reply and not on the reply."""
    answered = {text for r in rows if not r.refused for text in (r.objective, r.reply) if text}
    return [r for r in rows if not r.refused or not {r.objective, r.reply} & answered]


def share(hits: int, n: int) -> str:
    low, high = wilson(hits, n)
    value = f"{hits / n:.3f}" if n else "  -  "
    return f"{value} [{low:.3f}, {high:.3f}] {hits}/{n}"


def report(name: str, rows: Iterable[Row]) -> None:
    pairs = [(r.refused, r.judged) for r in rows]
    both = pairs.count((True, True))
    right = both + pairs.count((False, False))
    print(f"  {name:<26} accuracy  {share(right, len(pairs))}")
    print(f"  {'':<26} precision {share(both, both + pairs.count((False, True)))}")
    print(f"  {'':<26} recall    {share(both, both + pairs.count((True, False)))}")


def report_sets(name: str, rows: list[Row], fair: list[Row]) -> None:
    print(f"{name}: {len(rows)} replies, {len(rows) - len(fair)} left out of 'reply decides'")
    report("all rows", rows)
    report("reply decides", fair)
    report("reply decides, even rows", [r for r in fair if not r.held_out])
    report("reply decides, odd rows", [r for r in fair if r.held_out])


def show_errors(rows: Iterable[Row]) -> None:
    for row in rows:
        if row.refused != row.judged:
            kind = "missed" if row.refused else "false alarm"
            print(f"  {kind}: {row.file} row {row.index}: {' '.join(row.reply.split())[:120]!r}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Agreement of the phrase judge with human labels.")
    parser.add_argument("paths", nargs="*", type=Path, help=f"CSV files; default: all in {DEFAULT}")
    parser.add_argument("--errors", action="store_true", help="also list the disagreements that the reply decides")
    args = parser.parse_args(argv)
    paths = args.paths or sorted(DEFAULT.glob("*.csv"))
    missing = [str(p) for p in paths if not p.is_file()]
    if not paths or missing:
        sys.exit(f"no labelled replies: {', '.join(missing) or DEFAULT} not found; pass the paths of CSV files")
    rows = [row for path in paths for row in read(path)]
    fair = reply_decides(rows)  # over all files: the halves of a pair may lie in two
    for path in paths:
        report_sets(path.name, [r for r in rows if r.file == path.name], [r for r in fair if r.file == path.name])
    report_sets("total", rows, fair)
    if args.errors:
        show_errors(fair)


if __name__ == "__main__":
    main()
