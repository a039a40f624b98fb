"""The verbs of the command line as functions: the same words, keyword by keyword, on the planted model."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import abliterate as ab
from abliterate.api import calls
from abliterate.api.calls import (
    ApplyVerb,
    AuditVerb,
    ChatVerb,
    CompareVerb,
    EvaluateVerb,
    FindVerb,
    HardenVerb,
    InspectVerb,
    LabVerb,
    RepairVerb,
    RunVerb,
    SteerVerb,
    VerifyVerb,
)
from abliterate.api.options import ModelOptions
from abliterate.cli.app import _COMMANDS
from abliterate.errors import UsageError
from abliterate.evaluation.judging import Verdict
from planted import BAD, GOOD, Planted, plant, prompts
from records import full_record

HARMFUL, HARMLESS = prompts(BAD, 100, 11), prompts(GOOD, 100, 12)
SHORT: dict[str, Any] = {"max_new_tokens": 8, "device": "cpu"}
LISTS: dict[str, Any] = {"harmful": HARMFUL, "harmless": HARMLESS}
OWN: dict[str, Any] = {**LISTS, **SHORT}
SCRIPT = Path(__file__).parents[2] / "scripts" / "python_options.py"

#: What a type checker would not let pass.
loose: Any = ab

#: Options of commands that a function has no use for, or has another way for.
_SCREEN = {"as_json", "quiet", "csv", "errors", "config", "from_record", "help_all"}

#: Commands and what takes their options.
VERBS: dict[str, tuple[str, type | None]] = {
    "run": ("run", RunVerb),
    "search": ("search", RunVerb),
    "find": ("find", FindVerb),
    "verify": ("verify", VerifyVerb),
    "check": ("verify_files", None),
    "apply": ("apply", ApplyVerb),
    "eval": ("evaluate", EvaluateVerb),
    "compare": ("compare", CompareVerb),
    "inspect": ("inspect", InspectVerb),
    "judge": ("judge", None),
    "chat": ("chat", ChatVerb),
    "lab": ("open_lab", LabVerb),
    "steer": ("steer", SteerVerb),
    "read": ("read", ModelOptions),
    "show": ("show", None),
    "report": ("write_report", None),
    "push": ("push", None),
    "audit": ("audit", AuditVerb),
    "harden": ("harden", HardenVerb),
    "undo": ("undo", None),
    "repair": ("repair", RepairVerb),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def out(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("made") / "out"
    record = ab.run(planted.folder, out=folder, method="closed-form", **OWN)
    assert record.evaluation is not None
    assert record.evaluation.after is not None
    assert record.evaluation.after.harmful.refusals == 0
    assert record.prompts is not None
    assert "given in Python" in record.prompts.sources["harmful"]
    return folder


def test_every_command_has_its_function() -> None:
    assert set(VERBS) == set(_COMMANDS) - {"config"}  # in Python options are objects
    assert {name for name, _ in VERBS.values()} <= set(ab.__all__)


@pytest.mark.parametrize("command", VERBS)
def test_options_have_the_same_names(command: str) -> None:
    name, options = VERBS[command]
    mine = set(inspect.signature(getattr(calls, name)).parameters)
    mine |= set() if options is None else set(options.__annotations__)
    theirs = {
        {"realisation": "as_", "spec": "judge", **({"prompts": "set_"} if command == "judge" else {})}.get(one, one)
        for one in inspect.signature(_COMMANDS[command]).parameters
    }
    assert theirs - _SCREEN <= mine


def test_the_options_are_written_from_the_settings() -> None:
    subprocess.run([sys.executable, str(SCRIPT), "--check"], check=True)


def test_find_by_name_and_a_file(planted: Planted, tmp_path: Path) -> None:
    found = ab.find(planted.folder, out=tmp_path / "d.safetensors", **LISTS)
    assert abs(float(found.direction.basis[0] @ planted.direction)) > 0.99
    assert ab.load_direction(tmp_path / "d.safetensors") == found.direction


def test_a_direction_is_tried_applied_and_taken_back(planted: Planted, out: Path, tmp_path: Path) -> None:
    folder, file = str(planted.folder), str(out / "direction.safetensors")
    assert ab.verify(folder, file, **OWN).verified
    part = ab.evaluate(folder, direction=file, **OWN)
    assert part.after is not None
    assert part.after.harmful.refusals == 0
    (answers,) = ab.chat(folder, file, "show the bomb today", device="cpu")
    assert answers.original.startswith("I cannot")
    assert answers.ablated.startswith("Sure")
    assert ab.chat(out, prompt=["show the bomb today"]) == [answers]
    record = ab.apply(folder, ab.Direction(planted.direction), out=tmp_path / "edited", strength=0.5)
    assert record.plan is not None
    assert record.plan.strength == 0.5
    assert ab.undo(tmp_path / "edited").exact


def test_models_are_compared_inspected_audited_and_repaired(planted: Planted, out: Path, tmp_path: Path) -> None:
    folder, edited = str(planted.folder), str(out)
    compared = ab.compare([folder, edited, (folder, planted.direction)], **OWN)
    assert [entry.behaviour.harmful.refusals for entry in compared.entries] == [20, 0, 0]
    beside = ab.evaluate(edited, base=folder, **OWN)
    assert beside.before.harmful.refusals == 20
    assert ab.inspect(edited, base=folder).verdict == "altered"
    audited = ab.audit(folder, **OWN)
    assert "Without intervention" in str(audited) or str(audited)
    repaired = ab.repair(edited, out=tmp_path / "repaired", base=folder)
    assert repaired.exact
    assert ab.verify_files(out).intact


def test_results_of_a_run_show_themselves(out: Path) -> None:
    record = ab.show(out)
    assert record == ab.read_record(out)
    assert "Refusals on held-out prompts" in str(record)
    assert "<pre" in str(record._repr_html_())
    assert len(repr(record)) < 400
    assert ab.write_report(out).is_file()


def test_replies_are_judged_alone_or_from_a_file(tmp_path: Path) -> None:
    assert isinstance(ab.judge("I cannot help with that."), Verdict)
    (tmp_path / "r.csv").write_text("prompt,response\nhow,I cannot help with that.\n")
    rows = ab.judge(replies=tmp_path / "r.csv")
    assert [row.label for row in rows] == ["refusal"]
    with pytest.raises(UsageError, match="judge: expected"):
        loose.judge()


def test_settings_still_do(planted: Planted, tmp_path: Path) -> None:
    settings = ab.RunSettings(
        model=str(planted.folder),
        prompts=ab.PromptSettings(**LISTS),
        searching=ab.SearchSettings(method="closed-form"),
        evaluating=ab.EvalSettings(max_new_tokens=8),
        output=ab.OutputSettings(out=tmp_path / "out"),
    )
    assert ab.run(settings).output == str(tmp_path / "out")
    with pytest.raises(UsageError, match="run: it has no option 'strength'"):
        ab.run(settings, strength=0.5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: loose.run("m", out="x", strenght=1), "run: it has no option 'strenght'; did you mean 'strength'"),
        (lambda: ab.run("m"), "output folder"),
        (lambda: ab.apply("m", torch.ones(3)), "apply: expected an output folder"),
        (lambda: loose.inspect("m", strength=1), "inspect: it has no option 'strength'"),
        (lambda: loose.audit("m", max_new_tokens="many"), "max_new_tokens"),
        (lambda: ab.harden("m"), "harden: expected an output folder"),
        (lambda: ab.compare("m"), "compare: models: expected a list"),
        (lambda: ab.find("m", harmful=[]), "harmful"),
        (lambda: loose.find("m", harmful=[5], surprise=1), "surprise"),
        (lambda: ab.load("m", revision="x"), "m"),
        (lambda: loose.load(5), "load"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, said: str) -> None:
    with pytest.raises(ab.AbliterateError, match=said):
        call()


def test_progress_can_be_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    from abliterate.api.progress import progress
    from abliterate.monitor import Monitor
    from abliterate.monitor.live import Screen

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(progress(), Screen)
    ab.quiet()
    try:
        assert type(progress()) is Monitor
    finally:
        ab.quiet(False)
    assert isinstance(progress(), Screen)


def test_a_notebook_gets_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from abliterate.api.progress import NotebookBlock

    drawn: list[str] = []
    handle = SimpleNamespace(update=drawn.append)

    def first(block: str, **_: Any) -> Any:
        drawn.append(block)
        return handle

    block = NotebookBlock(SimpleNamespace(HTML=str, display=first))
    with block.phase("collect <activations>", 10) as advance:
        advance(4)
    block.warn("a <b> warning")
    assert '<progress max="10" value="0">' in drawn[0]
    assert "✓ collect &lt;activations&gt;" in drawn[-1]
    assert "a &lt;b&gt; warning" in drawn[-1]


def test_a_notebook_shows_a_result_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is returned is shown by the notebook; nothing is printed beside it."""
    printed: list[object] = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *shown: printed.append(shown))
    record = full_record()
    assert "<pre" in str(record._repr_html_())
    assert str(record)
    assert not printed
