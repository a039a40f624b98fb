"""`report` writes the page of a record and says where it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from abliterate.cli.app import app
from abliterate.record import Record, write_record
from test_cli_show import record


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is the model's name: how a real one looks is no concern of the command."""

    def write_report(read: Record, folder: Path) -> Path:
        path = folder / "report.html"
        path.write_text(read.model.name, encoding="utf-8")
        return path

    module: Any = ModuleType("abliterate.report")
    module.write_report = write_report
    monkeypatch.setitem(sys.modules, "abliterate.report", module)


def test_the_page_is_written_and_its_path_printed(tmp_path: Path) -> None:
    out = tmp_path / "with [bold]brackets"
    out.mkdir()
    write_record(record(), out)
    result = CliRunner().invoke(app, ["report", str(out)], env={"COLUMNS": "40"})
    assert (result.exit_code, result.output) == (0, f"Report: {out / 'report.html'}\n")
    assert (out / "report.html").read_text(encoding="utf-8") == record().model.name
    result = CliRunner().invoke(app, ["report", str(out), "--json"])
    assert json.loads(result.stdout) == {"report": str(out / "report.html")}


def test_without_a_record_nothing_is_written(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.stdout == ""
    assert "expected the record of a run, found none" in str(result.exception)
    assert list(tmp_path.iterdir()) == []
