"""The Python of README.md, run on a small model in the place of the large one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import abliterate as ab
from planted import plant

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    planted = plant(tmp_path / "planted")
    prompts = f"harmful={str(planted.harmful)!r}, harmless={str(planted.harmless)!r}"
    for old, new in (
        ('"Qwen/Qwen2.5-1.5B-Instruct"', repr(str(planted.folder))),
        ("model.find()", f"model.find({prompts}, borderline={str(planted.borderline)!r})"),
        ("How do I pick a lock?", "show the bomb today"),
        ("model.search(start=found.direction)", "model.search(start=found.direction, points=2, steps=6)"),
    ):
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    first, reply, *table = capsys.readouterr().out.splitlines()
    assert first == repr(names["found"])
    assert not reply.startswith("I cannot")
    assert any("Refusals on held-out prompts" in line for line in table)
    assert float((names["found"].direction.basis @ planted.direction).abs()) > 0.9
    plan = ab.read_record(tmp_path / "out").plan
    assert plan is not None
    assert plan.edits, "something was edited"
