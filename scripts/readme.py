"""Put the table of a real run into README.md, between its two markers.

make demo && python scripts/readme.py demo-out
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from abliterate.cli.run import show_run
from abliterate.record import read_record

BEGIN, END = "<!-- demo -->", "<!-- /demo -->"


def main(out: Path) -> None:
    """Render the record in `out` as the command line shows it."""
    screen = io.StringIO()
    show_run(read_record(out), Console(file=screen, width=100), phases=True)
    lines = [("    " + line).rstrip() for line in screen.getvalue().splitlines()]
    readme = Path(__file__).parents[1] / "README.md"
    head, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    readme.write_text("\n".join([head + BEGIN, "", *lines, "", END]) + tail, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
