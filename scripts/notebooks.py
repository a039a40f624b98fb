"""Make the notebooks: notebooks/NAME.py, which is what one edits, as notebooks/NAME.ipynb, run, with its outputs.

    python scripts/notebooks.py [NAME …]

Cells of a .py begin with `# %%` (code) or `# %% [markdown]`. A badge and the cell that installs the package are put in.
They run in an empty folder, on the demo model: what they print holds no path of this machine.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).parents[1] / "notebooks"
#: Where the notebooks and the package are fetched from.
REPOSITORY = "abliterate/abliterate"
MODEL = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
#: Seconds that one cell may take.
PATIENCE = 1200

BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb)"
)
INSTALL = """# Does nothing where the package is there.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("abliterate") is None:
    package = "abliterate[gguf,lora,notebook] @ git+https://github.com/{repository}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)"""


def main() -> int:
    """Make the notebooks named, or all."""
    parser = argparse.ArgumentParser(description="Make the notebooks out of notebooks/*.py, and run them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="without .py; default: all")
    for name in parser.parse_args().names or names():
        print(name, file=sys.stderr)
        made = executed(notebook(name), demo_model())
        nbformat.write(made, FOLDER / f"{name}.ipynb")
    return 0


def names() -> list[str]:
    """What notebooks there are."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def demo_model() -> Path:
    """Where scripts/demo_model.py puts it."""
    return Path(os.environ.get("ABLITERATE_CACHE", "~/.cache/abliterate")).expanduser() / "models" / MODEL


def notebook(name: str) -> NotebookNode:
    """The notebook as its .py says, not run."""
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    made: NotebookNode = new_notebook(
        cells=list(_cells(source, name)),
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"
    return made


def _cells(source: str, name: str) -> Iterator[NotebookNode]:
    parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)[1:]
    for number, (kind, body) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if kind.strip() != "[markdown]":
            yield new_code_cell(body.strip())
            continue
        text = re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)
        if number == 0:
            title, _, rest = text.partition("\n")
            yield new_markdown_cell(f"{title}\n\n{BADGE.format(repository=REPOSITORY, name=name)}\n{rest}")
            yield new_code_cell(INSTALL.format(repository=REPOSITORY))
        else:
            yield new_markdown_cell(text)


def executed(made: NotebookNode, model: Path) -> NotebookNode:
    """The notebook with its outputs. Raises `nbclient.exceptions.CellExecutionError` where a cell fails."""
    environment = {"ABLITERATE_MODEL": MODEL, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, MODEL).symlink_to(model.resolve())
        client = NotebookClient(made, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute(env={**os.environ, **environment})
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # when it ran
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    text = nbformat.writes(made).replace(str(model.parents[1]), "~/.cache/abliterate")
    run: NotebookNode = nbformat.reads(text, as_version=4)
    return run


if __name__ == "__main__":
    sys.exit(main())
