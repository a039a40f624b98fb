"""The Python of README.md, run on a small model in the place of the large one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import abliterate as ab
from planted import plant
from test_pipeline import prompt_settings

README = Path(__file__).parents[1] / "README.md"
OPEN = 'ab.open_session("Qwen/Qwen2.5-1.5B-Instruct")'


def test_the_python_example_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert OPEN in code
    code = code.replace(OPEN, "ab.open_session(MODEL, prompts=PROMPTS)").replace(
        '"Qwen/Qwen2.5-1.5B-Instruct"', "MODEL"
    )
    assert "Qwen" not in code
    planted = plant(tmp_path / "planted")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"MODEL": str(planted.folder), "PROMPTS": prompt_settings(planted)}
    exec(compile(code, str(README), "exec"), names)
    (line,) = capsys.readouterr().out.splitlines()
    found = names["found"]
    assert line == repr(found.direction)
    assert ab.load_direction(tmp_path / "direction.safetensors") == found.direction
    assert float((found.basis @ planted.direction).abs()) > 0.9
    plan = ab.read_record(tmp_path / "out").plan
    assert plan is not None
    assert plan.edits, "something was edited"
