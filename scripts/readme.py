"""Put what a real run prints into docs/demo.md, and its last lines into README.md.

make demo && python scripts/readme.py demo-out
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from abliterate.record import Record, read_record
from abliterate.report.tables.run import show_end, show_run, show_timings

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo -->", "<!-- /demo -->"


def main(out: Path) -> None:
    """Render the record in `out` as the command line shows it."""
    record = read_record(out)
    whole, last = io.StringIO(), io.StringIO()
    screen = Console(file=whole, width=100)
    show_run(record, screen)
    show_timings(record, screen)
    show_end(record, screen)
    show_end(record, Console(file=last, width=100))
    put(ROOT / "docs" / "demo.md", whole.getvalue(), f"{about(record)}\n")
    put(ROOT / "README.md", last.getvalue(), "")


def about(record: Record) -> str:
    """What was run, for the page with all of it."""
    asked, day = record.settings["evaluating"], f"{record.created:.10}"
    return (
        f"`make demo` of version {record.versions['abliterate']} on {day}: replies of at most "
        f"{asked['max_new_tokens']} tokens, judge {asked['judge'] or 'rules'}, {record.model.device}."
    )


def put(page: Path, printed: str, above: str) -> None:
    """Replace what stands between the two markers of a page."""
    lines = [("    " + line).rstrip() for line in printed.splitlines()]
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    middle = "\n".join([BEGIN, "", *([above] if above else []), *lines, "", END])
    page.write_text(head + middle + tail, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
