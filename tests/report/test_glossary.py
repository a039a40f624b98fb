"""One glossary: what the report shows is what the documentation says, and help points to it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from abliterate.report.glossary import GLOSSARY

DOCS = Path(__file__).parents[2] / "docs"


def test_documentation_and_report_have_the_same_words() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (DOCS / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows[2:]) == GLOSSARY
    assert len(rows[2:]) == len(GLOSSARY)


def test_help_points_to_the_glossary() -> None:
    shown = subprocess.check_output([sys.executable, "-m", "abliterate", "--help"], text=True)
    assert "glossary" in shown
