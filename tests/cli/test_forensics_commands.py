"""`audit`, `harden`, `inspect --out` and `repair` through the command line, and what is left when they are killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import forked
from abliterate import run
from abliterate.config import InspectSettings, OutputSettings, PromptSettings, RunSettings, SearchSettings
from abliterate.forensics.inspect import inspect
from abliterate.record import read_record
from calling import Cli
from planted import Planted, plant


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def prompts(planted: Planted) -> list[str]:
    named = {"harmful": planted.harmful, "harmless": planted.harmless, "borderline": planted.borderline}
    return [
        "--device",
        "cpu",
        "--limit",
        "32",
        *(part for name, path in named.items() for part in (f"--{name}", str(path))),
    ]


@pytest.fixture(scope="module")
def edited(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edited") / "out"
    prompts = PromptSettings(
        harmful=str(planted.harmful), harmless=str(planted.harmless), borderline=str(planted.borderline), limit=32
    )
    run(
        RunSettings(
            model=str(planted.folder),
            prompts=prompts,
            searching=SearchSettings(method="closed-form"),
            output=OutputSettings(out=out),
        )
    )
    return out


def test_audit_says_how_brittle_refusal_is(cli: Cli, planted: Planted, prompts: list[str], tmp_path: Path) -> None:
    done = cli("audit", planted.folder, *prompts, "-o", tmp_path / "audit")
    assert done.code == 0, done.err
    assert "refused" in done.out
    part = read_record(tmp_path / "audit").audit
    assert part is not None
    assert part.directions_needed == 1
    assert (tmp_path / "audit" / "report.html").is_file()
    again = cli("audit", planted.folder, *prompts, "--json", "-q")
    assert json.loads(again.out) == part.model_dump(mode="json")
    assert again.err == ""
    unknown = cli("audit", planted.folder, "--keep-completions")
    assert unknown.code == 2
    assert "No such option" in unknown.err


def test_harden_writes_a_model_and_what_it_is_worth(
    cli: Cli, planted: Planted, prompts: list[str], tmp_path: Path
) -> None:
    done = cli(
        *("harden", planted.folder, *prompts, "-o", tmp_path / "out", "--detectors", 0, "--strengthen", 1),
        *("--json", "-q"),
    )
    assert done.code == 0, done.err
    part = json.loads(done.out)
    assert (tmp_path / "out" / "config.json").is_file()
    record = read_record(tmp_path / "out")
    assert record.hardening is not None
    assert record.hardening.model_dump(mode="json") == part
    assert record.evaluation == record.hardening.evaluation
    assert part["before"]["protocol"] == part["after"]["protocol"]
    shown = cli("show", tmp_path / "out")
    assert shown.code == 0, shown.err
    for said in ("Before:", "After:", "tensors have an addition"):
        assert said in shown.out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "hardened" in page.lower()


def test_repair_leaves_a_record_of_how_exact_it_is(cli: Cli, planted: Planted, edited: Path, tmp_path: Path) -> None:
    done = cli("repair", edited, "--base", planted.folder, "-o", tmp_path / "out", "--json", "-q")
    assert done.code == 0, done.err
    part = json.loads(done.out)
    assert part["how"] == "base"
    record = read_record(tmp_path / "out")
    assert record.repair is not None
    assert record.repair.model_dump(mode="json") == part
    shown = cli("show", tmp_path / "out")
    assert "Restored from the base" in shown.out


def inspected_and_killed(folder: Path, wanted: str) -> None:
    """Inspect into the folder itself, and die when a file of that name is to be put into its place."""
    real = os.replace

    def die(source: str | Path, target: str | Path, **options: Any) -> None:
        if Path(target).name == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target, **options)

    os.replace = die  # type: ignore[assignment]
    inspect(str(folder), InspectSettings(out=folder))


@pytest.mark.parametrize("file", ["abliteration.json", "report.html"])
def test_an_inspection_killed_while_it_writes_leaves_the_record_that_undo_needs(
    cli: Cli, edited: Path, tmp_path: Path, file: str
) -> None:
    before = {name: (edited / name).read_bytes() for name in ("abliteration.json", "report.html")}
    killed = forked.start(inspected_and_killed, edited, file, log=tmp_path / "log")
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert (edited / "abliteration.json").read_bytes() == before["abliteration.json"]
    assert (edited / "report.html").read_bytes().rstrip().endswith(b"</html>")
    record = read_record(edited)
    assert record.plan is not None
    assert record.inspection is None
    undone = cli("undo", edited, "-o", tmp_path / "back", "--json")
    assert undone.code == 0, undone.err
    assert json.loads(undone.out)["exact"] is True
    for left in edited.glob(".abliteration.json.*"):
        left.unlink()
    for left in edited.glob(".report.html.*"):
        left.unlink()


def test_an_inspection_that_ends_adds_itself_to_the_record(cli: Cli, edited: Path) -> None:
    before = read_record(edited)
    done = cli("inspect", edited, "--out", edited, "--json", "-q")
    assert done.code == 3, done.err
    after = read_record(edited)
    assert after.inspection is not None
    assert after.inspection.model_dump(mode="json") == json.loads(done.out)
    pages = {"report.html": after.files["report.html"]}  # which shows the inspection
    assert after.model_copy(update={"inspection": None}) == before.model_copy(update={"files": before.files | pages})
