"""`lab` hands its options on; nothing is served here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from abliterate.cli.app import app
from abliterate.config import FindSettings, MeasureSettings, ModelSettings, PromptSettings
from abliterate.errors import UsageError
from abliterate.monitor.live import Screen

Calls = list[tuple[str, MeasureSettings, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What `serve` is called with."""
    made: Calls = []
    module: Any = ModuleType("abliterate.lab")
    module.serve = lambda target, measuring, **options: made.append((target, measuring, options))
    monkeypatch.setitem(sys.modules, "abliterate.lab", module)
    return made


def test_every_option_is_handed_on(calls: Calls) -> None:
    options = ["--direction", "d.safetensors", "--port", "7999", "--no-browser"]
    settings = ["--dtype", "float32", "--seed", "3", "--max-kl", "0.5"]
    result = CliRunner().invoke(app, ["lab", "OUT", *options, *settings])
    assert (result.exit_code, result.output) == (0, "")
    ((target, measuring, given),) = calls
    assert isinstance(given.pop("monitor"), Screen)
    assert target == "OUT"
    assert measuring == MeasureSettings(
        loading=ModelSettings(dtype="float32"), prompts=PromptSettings(seed=3), finding=FindSettings(max_kl=0.5)
    )
    assert given == {
        "direction": Path("d.safetensors"),
        "port": 7999,
        "open_browser": False,
    }


def test_without_options_there_is_a_browser_and_the_lab_chooses_the_port(calls: Calls) -> None:
    assert CliRunner().invoke(app, ["lab", "model"]).exit_code == 0
    ((_, measuring, given),) = calls
    assert measuring == MeasureSettings()
    assert (given["direction"], given["port"], given["open_browser"]) == (None, None, True)


@pytest.mark.parametrize("port", ["0", "65536", "any"])
def test_a_port_that_is_none_is_refused(port: str, calls: Calls) -> None:
    assert CliRunner().invoke(app, ["lab", "model", "--port", port]).exit_code == 2
    assert calls == []


def test_what_the_lab_says_is_missing_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise UsageError("lab: expected gradio, found none; pip install 'abliterate[lab]'")

    module: Any = ModuleType("abliterate.lab")
    module.serve = missing
    monkeypatch.setitem(sys.modules, "abliterate.lab", module)
    error = CliRunner().invoke(app, ["lab", "model"]).exception
    assert isinstance(error, UsageError)
    assert "abliterate[lab]" in str(error)
