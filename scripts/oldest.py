"""Print the oldest release of a dependency that pyproject.toml allows, for pip.

python scripts/oldest.py transformers    # transformers==5.18.0
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


def oldest(name: str) -> str:
    """Of the dependency `name`, 'name==version', where the version is the one after '>='."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (asked,) = (found for found in map(Requirement, project["dependencies"]) if found.name == name)
    (version,) = (part.version for part in asked.specifier if part.operator == ">=")
    return f"{name}=={version}"


if __name__ == "__main__":
    print(oldest(sys.argv[1]))
