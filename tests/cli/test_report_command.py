"""`report` writes the page of a record and says where it is."""

from __future__ import annotations

import json
from pathlib import Path

from test_show_command import record
from typer.testing import CliRunner

from abliterate.cli.app import app
from abliterate.record import write_record
from abliterate.report.html import render


def test_the_page_is_written_and_its_path_printed(tmp_path: Path) -> None:
    out = tmp_path / "with [bold]brackets"
    out.mkdir()
    write_record(record(), out)
    result = CliRunner().invoke(app, ["report", str(out)], env={"COLUMNS": "40"})
    assert (result.exit_code, result.output) == (0, f"Report: {out / 'report.html'}\n")
    assert (out / "report.html").read_text(encoding="utf-8") == render(record())
    result = CliRunner().invoke(app, ["report", str(out), "--json"])
    assert json.loads(result.stdout) == {"report": str(out / "report.html")}


def test_without_a_record_nothing_is_written(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.stdout == ""
    assert "expected the record of a run, found none" in str(result.exception)
    assert list(tmp_path.iterdir()) == []
