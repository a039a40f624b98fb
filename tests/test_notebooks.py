"""The notebooks run on the demo model, hold the cells of their sources, and show nothing that they should not."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from demo import GGUF, demo_model, refused, share

ROOT = Path(__file__).parents[1]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = _script()
NAMES: list[str] = notebooks.names()
#: Those that compare numbers with others made by hand, and what they say of their prompts: here they take fewer.
ALWAYS = {"cookbook": 'PROMPTS = {"limit": 24}', "from_elsewhere": "texts = ab.load_prompts(limit=24)"}
FEWER = {
    "cookbook": 'PROMPTS = {{"limit": 12, "harmful": {file!r}}}',
    "from_elsewhere": "texts = ab.load_prompts(limit=12, harmful={file!r})",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_source_says(name: str) -> None:
    kept = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    made = notebooks.notebook(name)
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (kept, made)]
    assert cells[0] == cells[1], "python scripts/notebooks.py makes it anew"
    nbformat.validate(kept)
    assert f"/notebooks/{name}.ipynb" in kept.cells[0].source
    assert "find_spec" in kept.cells[1].source


@pytest.mark.parametrize("name", NAMES)
def test_kept_outputs_are_whole_and_name_no_machine(name: str) -> None:
    kept = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert all(cell.execution_count == number for number, cell in enumerate(code, start=1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    text = str(outputs)
    assert len(text) > 1000
    assert not [place for place in ("/tmp", "/home", "/root", "Traceback", "Warning") if place in text]


def test_readme_and_notebooks_name_each_other() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"notebooks/{name}.ipynb" in readme


@demo_model
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its asserts hold what its text claims. What the others do is tested elsewhere; `make notebooks` runs all."""
    if name not in ALWAYS and "ABLITERATE_NOTEBOOKS" not in os.environ:
        pytest.skip("ABLITERATE_NOTEBOOKS=1 runs this one too, which takes minutes")
    monkeypatch.setenv("OMP_NUM_THREADS", str(share()))
    made = notebooks.notebook(name)
    if name in ALWAYS:
        (cell,) = (cell for cell in made.cells if ALWAYS[name] in cell.source)
        cell.source = cell.source.replace(ALWAYS[name], FEWER[name].format(file=str(refused(tmp_path))))
    notebooks.executed(made, GGUF)
